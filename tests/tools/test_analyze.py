"""analyze.py: measures by hand, and every command on a few images."""

import json

import pytest
import torch

from common.transforms import normalize
from tools import analyze


def test_change_by_hand():
    """The share does not depend on units, nor on the mean of a target."""
    target = torch.tensor([0.0, 2.0, 4.0, 6.0]).view(1, 1, 2, 2)  # variance 5, range 6
    found = target + torch.tensor([1.0, -1.0, 1.0, -1.0]).view(1, 1, 2, 2)
    assert analyze.change(found, target) == {"share": 0.2, "psnr": pytest.approx(15.56)}  # 10 log10(36)
    assert analyze.change(3 * found + 7, 3 * target + 7) == analyze.change(found, target)
    assert analyze.change(target, target)["share"] == 0


def test_targets_are_those_that_are_trained_on():
    imgs = normalize(torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8))
    assert {name: target(imgs).shape[1:] for name, target in analyze.TARGETS.items()} == {
        "pixels": (3, 32, 48), "norm_pixels": (3, 32, 48), "hog": (27, 4, 6)}
    patch = analyze.norm_pixels_map(imgs)[0, :, 16:, 16:32]
    assert patch.mean().abs() < 1e-5 and patch.std().item() == pytest.approx(1, abs=1e-4)


def test_hog_stability(call, folder, tmp_path):
    done = call(analyze.main, ["hog_stability", "--data", folder, "--out", tmp_path / "new" / "hog", "--size", 48,
                               "--images", 4])
    assert done.code == 0 and done.err == "", done.err
    saved = json.loads((tmp_path / "new" / "hog.json").read_text())
    assert (tmp_path / "new" / "hog.png").exists() and saved["about"]["images"] == 4
    assert str(folder) not in json.dumps(saved)
    results = saved["results"]
    ways = ["another size", "another size and back", "noise"]
    assert list(results) == [f"{measure}, {way}" for way in ways for measure in ("share", "psnr")]
    assert all(list(rows) == ["pixels", "norm_pixels", "hog"] for rows in results.values())
    for target in results["share, noise"]:
        assert list(results["share, another size"][target]) == ["16", "32"]
        shares = [share for [share] in results["share, noise"][target].values()]
        assert shares == sorted(shares) and shares[0] > 0
    pixels = results["share, noise"]["pixels"]
    assert pixels["8"][0] == pytest.approx(16 * pixels["2"][0], rel=0.05)


def test_a_missing_folder_is_one_line(call, tmp_path):
    done = call(analyze.main, ["hog_stability", "--data", "/no/such", "--out", tmp_path / "hog"])
    assert done.code == 2 and "/no/such" in done.err and done.err.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [["--size", 100], ["--size", 16], ["--size", 0], ["--images", 0], ["--images", -3]])
def test_numbers_that_make_no_measure_are_one_line(words, call, tmp_path):
    done = call(analyze.main, ["hog_stability", "--data", "shapes", "--out", tmp_path / "out", *words])
    assert done.code == 2 and done.err.count("\n") == 1 and "--size takes a multiple of 16" in done.err
    assert not list(tmp_path.iterdir())
