"""show.py: the class of each image file, the picture of a confusion, and one line about what is wrong."""

import json

import numpy as np
import pytest
import torch
from conftest import snapshot
from PIL import Image

import finetune
import models
from common import transforms
from common.images import decode
from tools import show


@pytest.fixture(scope="module")
def run(tuned, tmp_path_factory):
    """The folder of a short fine-tuning."""
    out = tmp_path_factory.mktemp("runs") / "run"
    finetune.main([str(w) for w in tuned(max_steps=12, base_lr=0.3, out=out)])
    return out


def one_line(done, *names):
    assert done.code == 2 and len(done.err.splitlines()) == 1 and done.err.startswith("error: "), (done.out, done.err)
    assert all(name in done.err for name in names), done.err


def test_the_class_of_each_file(run, call, tmp_path, folder):
    files = [folder / "val" / "ant" / "0.png", folder / "val" / "cat" / "1.png"]
    before = snapshot(run)
    done = call(show.main, [*files, "--init", run / "encoder.pt", "--device", "cpu"])
    assert done.code == 0 and done.err == "" and snapshot(run) == before and not list(tmp_path.iterdir())
    model = finetune.build_classifier(*finetune.resolve(finetune.Config(
        init=str(run / "encoder.pt"), eval=True)), ["ant", "bee", "cat"]).eval()
    lines = done.out.splitlines()[-2:]
    for line, file in zip(lines, files, strict=True):
        with torch.no_grad():
            share, best = model(transforms.normalize(decode(str(file)))[None])[0].softmax(dim=0).max(dim=0)
        assert line == f"{file}: {('ant', 'bee', 'cat')[best]} {100 * share:.1f} %"
    done = call(show.main, [files[0], "--init", run / "encoder.pt", "--img_size", "24x16"])
    assert done.code == 0 and "positions resized from 4x4 to 6x4" in done.out
    Image.fromarray(np.full((16, 16), 700, np.uint16)).save(tmp_path / "wide.png")
    done = call(show.main, [tmp_path / "wide.png", "--init", run / "encoder.pt"])
    assert done.code == 0 and "--value_range 700,701" in done.out
    done = call(show.main, [tmp_path / "wide.png", "--init", run / "encoder.pt", "--value_range", "-5,1000"])
    assert done.code == 0 and "--value_range" not in done.out
    (tmp_path / "bad.png").write_bytes(b"")
    one_line(call(show.main, [tmp_path / "bad.png", "--init", run / "encoder.pt"]), "bad.png")


def test_what_is_wrong_with_a_classifier_or_for_it(run, call, tmp_path, folder):
    image = folder / "val" / "ant" / "0.png"
    saved = torch.load(run / "encoder.pt")
    saved["classifier"]["tensors"]["head.weight"].fill_(3e38)
    torch.save(saved, tmp_path / "huge.pt")
    one_line(call(show.main, [image, "--init", tmp_path / "huge.pt"]), "0.png", "not finite")
    model = finetune.Classifier(models.build("vit_tiny", (16, 16), 4, 6), 7)
    six = {"arch": model.encoder.arch, "model": model.encoder.state_dict(), "method": "Classifier", "step": 5,
           "classifier": model.export([f"class {i}" for i in range(7)])}
    torch.save(six, tmp_path / "six.pt")
    one_line(call(show.main, [image, "--init", tmp_path / "six.pt"]), "0.png", "--in_chans is 6", ".npy")
    del saved["classifier"]
    torch.save(saved, tmp_path / "bare.pt")
    one_line(call(show.main, [image, "--init", tmp_path / "bare.pt"]), "no classifier")
    one_line(call(show.main, [image, "--init", tmp_path / "nowhere.pt"]), "nowhere.pt")


@pytest.mark.parametrize("words", [[], ["a.png"], ["--init", "b.pt"], ["a.png", "--init", "b.pt", "--confusion", "c"],
                                   ["--init", "b.pt", "--confusion", "c"]], ids=repr)
def test_words_that_do_not_belong_together(call, words):
    one_line(call(show.main, words), "--init", "--confusion")


def test_a_confusion_is_drawn_beside_its_numbers(run, call):
    done = call(show.main, ["--confusion", run / "result.json"])
    assert done.code == 0 and done.err == "", done.err
    assert (run / "pictures" / "confusion.png").stat().st_size > 1000 and "confusion.png" in done.out


@pytest.mark.parametrize("content", ["", "[]", '{"top1": 3}', '{"confusion": [[1]], "per_class": {"a": 1, "b": 2}}',
                                     '{"confusion": 3, "per_class": {"a": 1}}'])
def test_a_file_without_a_confusion_is_one_line(call, tmp_path, content):
    (tmp_path / "result.json").write_text(content)
    one_line(call(show.main, ["--confusion", tmp_path / "result.json"]), "result.json", "no confusion matrix")
    one_line(call(show.main, ["--confusion", tmp_path / "nowhere.json"]), "nowhere.json")
    assert len(list(tmp_path.iterdir())) == 1


def test_names_of_classes_are_drawn_as_they_are(tmp_path, call):
    """matplotlib would take a$\\foo$ for a formula, and cannot draw what is no text."""
    classes = ["a$\\foo$", "b\udcff", "c\nd", "e$"]
    path = tmp_path / "result.json"
    counts = [[int(i == k) for k in range(4)] for i in range(4)]
    path.write_text(json.dumps({"confusion": counts, "per_class": dict.fromkeys(classes, 100.0)}))
    done = call(show.main, ["--confusion", path])
    assert done.code == 0 and done.err == "" and (tmp_path / "pictures" / "confusion.png").stat().st_size > 1000


def test_many_classes_are_drawn_without_numbers(tmp_path):
    classes = [f"class {i}" for i in range(25)]
    counts = [[int(i == k) for k in range(25)] for i in range(25)]
    path = tmp_path / "result.json"
    path.write_text(json.dumps({"confusion": counts, "per_class": dict.fromkeys(classes, 100.0)}))
    show.draw_confusion(tmp_path / "confusion.png", *show.read_confusion(path))
    assert (tmp_path / "confusion.png").exists()
