"""evaluate.py: how accuracy is counted, by one process or several."""

import types

import pytest
import torch
import torch.nn as nn
from test_neighbours import HERE, Loader

import data
import finetune
from common import evaluate, neighbours, transforms


def accuracy(model, dataset, micro_batch=4, **process):
    """evaluate.accuracy in this process, or in one that calls itself another one of several."""
    run = types.SimpleNamespace(**{**vars(HERE), **process})
    cfg = types.SimpleNamespace(micro_batch=micro_batch, workers=0)
    return evaluate.accuracy(run, model, data.evaluation(dataset, cfg, run))


@pytest.fixture(scope="module")
def classified(folder):
    """A classifier that is right about some, and the validation images."""
    cfg = finetune.Config(model="vit_tiny", patch_size=4, in_chans=3, img_size=(16, 16), data=str(folder))
    torch.manual_seed(0)
    model = finetune.build_classifier(cfg, None, ["ant", "bee", "cat"])
    nn.init.normal_(model.head.weight)
    return model, data.labelled_set(cfg, "val")


def test_accuracy_counts_every_image_once(classified):
    model, dataset = classified
    imgs, labels = zip(*[dataset[0, i, i][:2] for i in range(len(dataset))], strict=True)
    labels = torch.tensor(labels)
    with torch.no_grad():
        guesses = model.eval()(transforms.normalize(torch.stack(imgs))).argmax(dim=1)
    for micro in (1, 2, 4, 7, 15, 100):
        result = accuracy(model, dataset, micro)
        assert result["images"] == 15 and result["top5"] == 100  # there are but three classes
        assert result["top1"] == pytest.approx(100 * (guesses == labels).float().mean().item())
        confusion = torch.tensor(result["confusion"])
        assert confusion.sum(dim=1).tolist() == [5, 5, 5]
        for true in range(3):
            assert confusion[true].tolist() == torch.bincount(guesses[labels == true], minlength=3).tolist()
            assert result["per_class"][dataset.source.classes[true]] == 20.0 * confusion[true, true]
    assert 0 < result["top1"] < 100


@pytest.mark.parametrize("world", [2, 3, 4])
def test_processes_share_the_images_out(classified, world, monkeypatch):
    """15 images over 2, 3 or 4 processes, counts added up as the all-reduce would: the same integers."""
    model, dataset = classified
    whole = accuracy(model, dataset)["confusion"]
    counts = []
    monkeypatch.setattr(evaluate.dist, "broadcast", lambda tensor, source: None)
    monkeypatch.setattr(evaluate.dist, "all_reduce", lambda tensor: counts.append(tensor.clone()))
    for rank in range(world):
        accuracy(model, dataset, rank=rank, world_size=world)
    assert sum(counts)[:-1].view(3, 3).tolist() == whole and sum(counts)[-1] == 15


class Fixed(nn.Module):
    def forward(self, imgs):
        return torch.arange(7.0).flip(0).repeat(len(imgs), 1)


def test_top5_by_hand():
    """Seven classes, logits that put the true one at a known rank."""
    ranks = torch.tensor([0, 0, 1, 4, 5, 6])
    batches = [(torch.zeros(6, 3, 4, 4, dtype=torch.uint8), ranks, torch.arange(6))]
    result = evaluate.accuracy(HERE, Fixed(), Loader(batches, "abcdefg"))
    assert result["top1"] == pytest.approx(100 * 2 / 6) and result["top5"] == pytest.approx(100 * 4 / 6)
    assert result["confusion"][5] == [1, 0, 0, 0, 0, 0, 0]


def test_many_classes_need_no_confusion_matrix(monkeypatch):
    """Beyond LARGEST classes the numbers are the same, but for the matrix."""
    scores, labels = torch.randn(300, 12, generator=torch.Generator().manual_seed(0)), torch.arange(300) % 11
    few = evaluate.summary(evaluate.count(scores, labels), list("abcdefghijkl"))
    monkeypatch.setattr(evaluate, "LARGEST", 11)
    many = evaluate.summary(evaluate.count(scores, labels), list("abcdefghijkl"))
    assert few.pop("confusion") and few == many
    assert len(evaluate.count(torch.randn(4, 8142), torch.arange(4))) == 2 * 8142 + 1


def test_a_class_without_votes_is_not_among_the_five_best(monkeypatch):
    """Wherever ties are broken: of eight images of each class, the neighbours are of two classes alone."""
    bank, val = Loader([], "abcdefgh"), Loader([], "abcdefgh")
    features = {id(bank): (torch.eye(8)[:3], torch.tensor([0, 0, 7])), id(val): (torch.eye(8), torch.arange(8))}
    monkeypatch.setattr(neighbours, "extract", lambda run, encoder, loader, pool: features[id(loader)])
    result = evaluate.nearest(None, None, bank, val, k=3)
    assert result["top5"] == 100 * 2 / 8
