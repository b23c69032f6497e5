"""neighbours.py: features in order, neighbours that vote, and a probe that gives the number of an evaluation."""

import contextlib
import types

import pytest
import torch
import torch.nn as nn

from common import evaluate, neighbours, transforms

HERE = types.SimpleNamespace(rank=0, world_size=1, is_main=True, device=torch.device("cpu"), dtype=torch.float32,
                             autocast=contextlib.nullcontext, cfg=None)


class Loader(list):
    """Batches (imgs, labels, indices) that are made up."""

    def __init__(self, batches, classes):
        super().__init__(batches)
        self.classes, self.num_images = list(classes), sum(len(batch[0]) for batch in batches)


# Neighbours


@pytest.mark.parametrize("k", [1, 3, 20, 50])
def test_neighbours_vote_as_brute_force_says(k):
    """One query after the other, one neighbour after the other; a bank of fewer than k votes as a whole."""
    draw = torch.Generator().manual_seed(k)
    bank, queries = torch.randn(40, 8, generator=draw), torch.randn(300, 8, generator=draw)
    labels = torch.randint(0, 4, (40,), generator=draw)
    scores = neighbours.neighbours(bank, labels, queries, 4, k=k, temperature=0.5)
    for query, votes in zip(queries, scores, strict=True):
        cosines = [(torch.dot(query, item) / query.norm() / item.norm()).item() for item in bank]
        expected = [0.0] * 4
        for place in sorted(range(40), key=lambda i: -cosines[i])[:k]:
            expected[labels[place]] += torch.tensor(cosines[place] / 0.5).exp().item()
        assert votes.tolist() == pytest.approx(expected, rel=1e-4)


# Features


class Brightness(nn.Module):
    """An encoder whose feature is an image's mean."""
    width, num_prefix = 1, 0

    def embed(self, imgs):
        return transforms.denormalize(imgs).mean(dim=(1, 2, 3)).view(-1, 1, 1)

    def encode(self, tokens, noise=None):
        return tokens


def test_features_come_in_order_and_without_what_is_left_out():
    """Two batches in any order, index 2 missing; label 0 is a label."""
    imgs = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 3, 4, 4)
    labels = torch.tensor([0, 1, 0, 1, 0])
    batches = [(imgs[i], labels[i], i) for i in (torch.tensor([3, 4]), torch.tensor([0, 1]))]
    loader = Loader(batches, "ab")
    loader.num_images = 5
    features, found = neighbours.extract(HERE, Brightness(), loader)
    torch.testing.assert_close(features[:, 0] * 255, torch.tensor([0.0, 1, 3, 4]))
    assert found.tolist() == [0, 1, 1, 0]


# The probe


@pytest.mark.parametrize("collapsed", [False, True])
def test_a_probe_logs_the_accuracy_of_an_evaluation(monkeypatch, collapsed):
    """Also of an encoder that gives all images the same features, where as many neighbours vote for several classes."""
    draw = torch.Generator().manual_seed(0)
    bank, queries = Loader([], "abcdefgh"), Loader([], "abcdefgh")
    features = {}
    for loader, n in ((bank, 16), (queries, 40)):
        rows = torch.ones(n, 4) if collapsed else torch.randn(n, 4, generator=draw)
        features[id(loader)] = rows, torch.arange(n) % 8
    monkeypatch.setattr(neighbours, "extract", lambda run, encoder, loader, pool: features[id(loader)])
    notes, lines = [], []
    run = types.SimpleNamespace(is_main=True, note=lambda **line: notes.append(line),
                                bar=types.SimpleNamespace(write=lines.append))
    neighbours.probe(run, 4, None, bank, queries)
    result = evaluate.nearest(run, None, bank, queries)
    assert notes == [{"step": 5, "knn_top1": result["top1"]}] and 0 < result["top1"] < 100
    assert lines == [f"step 5: k-NN top-1 {result['top1']:.2f} % of 40 images"]
