"""corruptions.py: each corruption by its own measure; accuracies that depend on the classifier and the images alone."""

import json
import shutil

import pytest
import torch
from conftest import snapshot

import finetune
from tools import corruptions


@pytest.fixture(scope="module")
def init(tuned, tmp_path_factory):
    """encoder.pt of a short fine-tuning, with its result.json beside it."""
    out = tmp_path_factory.mktemp("runs") / "run"
    finetune.main([str(w) for w in tuned(max_steps=6, base_lr=0.3, out=out)])
    return out / "encoder.pt"


@pytest.fixture
def words_of(init, tuned, tmp_path):
    """`words_of(**changes)`: words for corruptions.py in OUT `corrupted`, unless they say otherwise."""
    def words(**changes):
        return tuned(**{"init": init, "model": None, "patch_size": None, "out": tmp_path / "corrupted", **changes})
    return words


@pytest.fixture
def measure(words_of, call):
    """`measure(**changes)` runs corruptions.py."""
    return lambda **changes: call(corruptions.main, words_of(**changes))


def one_line(done, *names):
    assert done.code == 2 and len(done.err.splitlines()) == 1 and done.err.startswith("error: "), (done.out, done.err)
    assert all(name in done.err for name in names), done.err


def result_of(out):
    return json.loads((out / "result.json").read_text())


def test_corruptions_are_the_same_every_time(measure, tmp_path, init):
    """Whatever the micro-batch and the seed; on images as they are, the accuracy is that of the run."""
    done = measure()
    assert done.code == 0 and done.err == "", done.err
    assert all(f"{kind} " in done.out for kind in corruptions.CORRUPTIONS)
    first = result_of(tmp_path / "corrupted")
    assert list(first["corruptions"]) == list(corruptions.CORRUPTIONS)
    assert {len(top1) for top1 in first["corruptions"].values()} == {5}
    assert first["confusion"] == result_of(init.parent)["confusion"]
    for name, changes in (("batch", {"micro_batch": 8}), ("seed", {"seed": 1})):
        assert measure(**changes, out=tmp_path / name).code == 0
        assert (tmp_path / name / "result.json").read_text() == (tmp_path / "corrupted" / "result.json").read_text()


def test_each_corruption_by_its_own_measure():
    draw = torch.Generator().manual_seed(0)
    image = torch.randint(90, 166, (3, 64, 64), generator=draw, dtype=torch.uint8)
    def corrupt(kind, strength):
        out = corruptions.corruption(kind, strength, (64, 64))(image)
        assert out.dtype == torch.uint8 and out.shape == image.shape
        return out.float()

    for strength in range(5):
        noise = (corrupt("noise", strength) - image).flatten()
        assert strength > 1 or noise.std().item() / 255 == pytest.approx((0.08, 0.12)[strength], rel=0.05)
        faded = corrupt("contrast", strength).std() / image.float().std()
        assert faded.item() == pytest.approx(corruptions.CORRUPTIONS["contrast"][strength], abs=0.02)
    blur = [corrupt("blur", strength).std().item() for strength in range(5)]
    assert blur == sorted(blur, reverse=True) and blur[0] < image.float().std()
    coarse = corrupt("pixelate", 4)  # a quarter of the side: 16 x 16 pixels of 4 x 4
    assert torch.equal(coarse.unfold(1, 4, 4).unfold(2, 4, 4).amax(dim=(3, 4)),
                       coarse.unfold(1, 4, 4).unfold(2, 4, 4).amin(dim=(3, 4)))


def test_a_broken_image_is_left_out_and_named_once(measure, tmp_path, folder):
    """Its score is that of a folder without it."""
    for name in ("spoiled", "whole"):
        shutil.copytree(folder, tmp_path / name)
    (tmp_path / "spoiled" / "val" / "bee" / "2.png").write_bytes(b"no image")
    (tmp_path / "whole" / "val" / "bee" / "2.png").unlink()
    done = measure(data=tmp_path / "spoiled")
    assert done.code == 0 and done.err.startswith("left out a broken image: ") and done.err.count("\n") == 1, done.err
    assert measure(data=tmp_path / "whole", out=tmp_path / "other").code == 0
    one, two = result_of(tmp_path / "corrupted"), result_of(tmp_path / "other")
    assert one == two and one["images"] == 14


def test_what_has_no_corruptions_is_one_line(measure, tmp_path, init, tuned, call, folder):
    one_line(measure(mode="knn"), "--mode knn")
    one_line(measure(init="none", model="vit_tiny"), "needs a classifier")
    saved = torch.load(init)
    del saved["classifier"]
    torch.save(saved, tmp_path / "encoder.pt")
    one_line(measure(init=tmp_path / "encoder.pt"), "no classifier")
    four = tuned(in_chans=4, rand_augment="false", max_steps=1, out=tmp_path / "four")
    assert call(finetune.main, four).code == 0
    one_line(measure(init=tmp_path / "four" / "encoder.pt"), "grey and RGB", "--in_chans 4")
    assert not (tmp_path / "corrupted").exists()
    before = snapshot(init.parent)
    one_line(measure(out=init.parent, overwrite="true"), "name another")
    assert snapshot(init.parent) == before
