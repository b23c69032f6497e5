"""published.py: what torchvision's classes hold comes as it is, in their splits, or is refused in one line."""

import json

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchvision.datasets.utils import verify_str_arg

import data
import mae
from common import engine
from common.images import Broken


def paint(path, value, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 16), (value, 0, 255 - value)).convert(mode).save(path)


@pytest.fixture
def food(tmp_path):
    """torchvision:Food101 of two classes: six training images, four for testing. Returns --data_dir."""
    for split, numbers in (("train", range(3)), ("test", range(3, 5))):
        names = {name: [f"{name}/{i}" for i in numbers] for name in ("apple_pie", "waffles")}
        (tmp_path / "food-101" / "meta").mkdir(parents=True, exist_ok=True)
        (tmp_path / "food-101" / "meta" / f"{split}.json").write_text(json.dumps(names))
        for label, paths in enumerate(names.values()):
            for i, path in zip(numbers, paths, strict=True):
                paint(tmp_path / "food-101" / "images" / f"{path}.jpg", 100 * label + 10 * i)
    return tmp_path


def open_food(food, split="train", **options):
    return data.open_source("torchvision:Food101", split, data_dir=str(food), **options)


def test_images_and_labels_are_those_of_torchvision(food, capsys):
    source = open_food(food, labelled=True)
    assert len(source) == 6 and source.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert source.classes == ["apple pie", "waffles"] or source.classes == ["apple_pie", "waffles"]
    image, label = source.load(4)
    assert image.shape == (3, 16, 20) and image.dtype == torch.uint8 and label == 1
    assert image[0].float().mean() == pytest.approx(110, abs=3)
    assert "its" not in capsys.readouterr().out
    for split in ("val", "test"):
        other = open_food(food, split, labelled=True)
        assert len(other) == 4 and other.load(3)[0][0].float().mean() == pytest.approx(140, abs=3)
    assert capsys.readouterr().out == "torchvision:Food101: its test is taken for val\n"


def test_pretraining_needs_no_labels_and_takes_other_channels(food):
    source = open_food(food)
    assert source.classes is None and source.labels.tolist() == [-1] * 6 and source.load(0)[1] == -1
    assert [open_food(food, in_chans=C).load(0)[0].shape[0] for C in (1, 3, 4)] == [1, 3, 4]
    with pytest.raises(ValueError, match="--in_chans 5"):
        open_food(food, in_chans=5)


def test_some_labels_are_picked(food):
    source = open_food(food, labelled=True, pick=lambda labels: np.flatnonzero(labels == 1)[1:])
    assert source.labels.tolist() == [1, 1] and source.load(0)[0][0].float().mean() == pytest.approx(110, abs=3)


def test_a_broken_image_is_named(food):
    (food / "food-101" / "images" / "waffles" / "1.jpg").write_bytes(b"no image")
    with pytest.raises(Broken, match=r"torchvision:Food101, image 4: UnidentifiedImageError"):
        open_food(food).load(4)


def test_a_run_takes_one(food, tiny, call):
    words = tiny(data="torchvision:Food101", data_dir=food, batch_size=2, micro_batch=2, max_steps=2,
                 out=food / "run")
    assert call(mae.main, words).code == 0
    assert engine.describe_images(open_food(food))["number"] == 6


def test_a_data_set_without_splits_serves_pretraining_alone(tmp_path):
    for label, name in enumerate(("Forest", "River")):
        paint(tmp_path / "eurosat" / "2750" / name / "1.jpg", 100 * label)
    source = data.open_source("torchvision:EuroSAT", "train", data_dir=str(tmp_path))
    assert len(source) == 2 and source.classes is None
    with pytest.raises(ValueError, match=r"torchvision:EuroSAT.*no splits"):
        data.open_source("torchvision:EuroSAT", "val", labelled=True, data_dir=str(tmp_path))


def one_line(name, tmp_path, call, *words):
    done = call(mae.main, ["--config", "configs/tiny.yaml", "--data", name, "--data_dir", str(tmp_path), "--out",
                           str(tmp_path / "run"), *words])
    assert done.code == 2 and done.err.count("\n") == 1, done.err
    return done.err


def test_what_is_not_there_ends_in_one_line(tmp_path, call):
    assert "did you mean torchvision:Flowers102?" in one_line("torchvision:Flower102", tmp_path, call)
    assert "it has LSUN" in one_line("torchvision:?", tmp_path, call)
    for name in ("Food101", "STL10", "EuroSAT", "CIFAR10", "OxfordIIITPet", "MNIST"):
        line = one_line(f"torchvision:{name}", tmp_path, call)
        assert f"--data torchvision:{name} in {tmp_path}" in line and "--download fetches it" in line
    assert not [path for path in tmp_path.iterdir() if path.name != "run" and any(path.rglob("*.*"))]


class Fake(torchvision.datasets.VisionDataset):
    """A data set whose items and labels a test names."""
    items, names = [], "train unlabeled train+unlabeled test"

    def __init__(self, root, split="train", download=False):
        super().__init__(root)
        verify_str_arg(split, "split", self.names.split())
        self.split, self.download = split, download

    def __getitem__(self, i):
        return self.items[i]

    def __len__(self):
        return len(self.items)


@pytest.fixture
def fake(monkeypatch):
    """`fake(items, **attributes)` makes a class of torchvision:Fake."""
    def make(items, **attributes):
        made = type("Fake", (Fake,), {"items": items, **attributes})
        monkeypatch.setattr(torchvision.datasets, "Fake", made, raising=False)

    monkeypatch.setattr(torchvision.datasets, "__all__", (*torchvision.datasets.__all__, "Fake"))
    return make


PICTURE = Image.new("RGB", (4, 4))


@pytest.mark.parametrize("names,split,labelled,taken", [
    ("train unlabeled train+unlabeled test", "train", False, "train+unlabeled"),
    ("train unlabeled train+unlabeled test", "train", True, "train"),
    ("train unlabeled train+unlabeled test", "val", True, "test"), ("train valid test", "val", True, "valid"),
    ("trainval test", "train", True, "trainval"), ("train val", "test", False, "val"),
    ("train val test", "test", True, "test"), ("train val test", "val", True, "val")])
def test_splits_are_called_as_the_class_calls_them(fake, capsys, names, split, labelled, taken):
    fake([(PICTURE, 0), (PICTURE, 1)], names=names, labels=[0, 1])
    source = data.open_source("torchvision:Fake", split, labelled=labelled)
    assert source.dataset.split == taken
    expected = "" if taken == split else f"torchvision:Fake: its {taken} is taken for {split}\n"
    assert capsys.readouterr().out == expected


def test_a_class_without_a_fitting_split_is_refused(fake):
    fake([(PICTURE, 0)], names="byclass bymerge")
    with pytest.raises(ValueError, match="--data torchvision:Fake in data: Unknown value"):
        data.open_source("torchvision:Fake", "train")


def test_nothing_is_fetched_unless_asked_for_and_by_one_process(fake, monkeypatch):
    fake([(PICTURE, 0)])
    assert not data.open_source("torchvision:Fake", "train").dataset.download
    assert data.open_source("torchvision:Fake", "train", download=True).dataset.download
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not data.open_source("torchvision:Fake", "train", download=True).dataset.download


ODD = {"none": {}, "boxes": {"targets": [{"box": 1}, {"box": 2}]}, "attributes": {"targets": np.zeros((2, 40), int)},
       "floats": {"labels": [0.5, 1.0]}, "too few": {"labels": [0]}, "unequal": {"y": [[1], [1, 2]]},
       "unlabelled": {"labels": [-1, -1]}, "another": {"labels": [1, 0]}, "words": {"targets": ["a", "b"]}}


@pytest.mark.parametrize("attributes", ODD.values(), ids=ODD)
def test_targets_that_are_no_labels_are_refused_and_serve_pretraining(fake, attributes):
    fake([(PICTURE, 0), (PICTURE, 1)], **attributes)
    with pytest.raises(ValueError, match="--data torchvision:Fake: its targets are no class labels"):
        data.open_source("torchvision:Fake", "train", labelled=True)
    assert len(data.open_source("torchvision:Fake", "train")) == 2


def test_labels_may_stand_in_pairs(fake):
    fake([(PICTURE, 0), (PICTURE, 1)], _samples=[("a.jpg", 0), ("b.jpg", 1)])
    source = data.open_source("torchvision:Fake", "train", labelled=True)
    assert source.labels.tolist() == [0, 1] and source.classes == ["0", "1"]


@pytest.mark.parametrize("items,why", [([], "no images"), ([(torch.zeros(3, 4, 4), 0)], "no pictures"),
                                       ([PICTURE], "no pictures")])
def test_items_that_are_no_pictures_are_refused(fake, items, why):
    fake(items)
    with pytest.raises(ValueError, match=rf"torchvision:Fake.*{why}"):
        data.open_source("torchvision:Fake", "train")
