"""What an encoder is worth: probes that change nothing, neighbours that vote, one number on any number of processes."""

import json

import pytest
import torch
from conftest import equal, finish, start, torchrun

import evaluate
import mae
import simmim
import um_mae


def one_line(done, *names):
    """Exit code 2, and one line on stderr that says all the names."""
    assert done.code == 2 and len(done.err.splitlines()) == 1 and done.err.startswith("error: "), (done.out, done.err)
    assert all(str(name) in done.err for name in names), done.err


def lines_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


# Neighbours


@pytest.mark.parametrize("k", [1, 3, 20, 50])
def test_neighbours_vote_as_brute_force_says(k):
    """One query after the other, one neighbour after the other; a bank of fewer than k votes as a whole."""
    draw = torch.Generator().manual_seed(k)
    bank, queries = torch.randn(40, 8, generator=draw), torch.randn(300, 8, generator=draw)
    labels = torch.randint(0, 4, (40,), generator=draw)
    scores = evaluate.neighbours(bank, labels, queries, 4, k=k, temperature=0.5)
    for query, votes in zip(queries, scores, strict=True):
        cosines = [(torch.dot(query, item) / query.norm() / item.norm()).item() for item in bank]
        expected = [0.0] * 4
        for place in sorted(range(40), key=lambda i: -cosines[i])[:k]:
            expected[labels[place]] += torch.tensor(cosines[place] / 0.5).exp().item()
        assert votes.tolist() == pytest.approx(expected, rel=1e-4)


# The probe beside pre-training

METHODS = {
    "mae": (mae, {}),
    "simmim": (simmim, {"mask_unit": 8, "decoder_depth": None, "decoder_width": None, "decoder_heads": None}),
    "um_mae": (um_mae, {"patch_size": 4, "unit": 4, "img_size": 16})}


@pytest.mark.parametrize("name", METHODS)
def test_a_probe_does_not_change_training(tiny, call, tmp_path, name):
    script, changes = METHODS[name]
    for out, epochs in (("without", 0), ("with", 0.5)):
        words = tiny(**changes, crop_scale="0.3,1", max_steps=5, probe_epochs=epochs, out=tmp_path / out)
        done = call(script.main, words)
        assert done.code == 0 and done.err == "", done.err
    one, two = (torch.load(tmp_path / out / "last.pt") for out in ("without", "with"))
    assert equal(one, two)
    probes = [line for line in lines_of(tmp_path / "with") if "knn_top1" in line]
    assert [line["step"] for line in probes] == [2, 4, 5] and "k-NN top-1" in done.out
    assert not any("knn_top1" in line for line in lines_of(tmp_path / "without"))
    share = probes[-1]["knn_top1"] / 100 * 15  # validation images
    assert share == pytest.approx(round(share))


def test_a_probe_of_other_data_with_few_labels(tiny, folder, call, tmp_path):
    """Pre-training on a flat folder, the probe on a labelled one."""
    done = call(mae.main, tiny(data=folder / "train" / "ant", probe_data=folder, probe_labels=6, probe_epochs=1,
                               max_steps=1, out=tmp_path / "run"))
    assert done.code == 0, done.err
    assert "knn_top1" in lines_of(tmp_path / "run")[-1]


@pytest.mark.parametrize("changes,names", [({"probe_data": "{}/train/ant"}, ["ant", "labels"]),
                                           ({"probe_labels": 2}, ["--labels 2", "3 classes"]),
                                           ({"probe_epochs": -1}, ["--probe_epochs"])], ids=repr)
def test_a_probe_without_labels_is_refused_at_once(tiny, folder, call, tmp_path, changes, names):
    changes = {key: str(value).format(folder) for key, value in changes.items()}
    one_line(call(mae.main, tiny(**{"probe_epochs": 1, **changes, "out": tmp_path / "run"})), *names)
    assert not list(tmp_path.iterdir())


def test_processes_probe_alike(tiny, call, tmp_path):
    """The learning rate is 0 in the first step, so that the encoder is the same, and only the counting is compared."""
    words = dict(probe_epochs=1, max_steps=1, micro_batch=2, batch_size=12)
    assert call(mae.main, tiny(**words, out=tmp_path / "one")).code == 0
    code, _, err = finish(start(*torchrun(3, "mae.py", *tiny(**words, out=tmp_path / "many"))))
    assert code == 0, err
    one, many = (lines_of(tmp_path / out)[-1]["knn_top1"] for out in ("one", "many"))
    assert one == many
