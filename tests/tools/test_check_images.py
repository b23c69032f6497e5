"""check_images.py: what is broken, odd-sized or unlabelled is listed, and the exit code says whether anything is."""

import numpy as np
import pytest
from PIL import Image
from processes import finish, start

from tools import check_images


def write(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


@pytest.fixture
def folder(tmp_path):
    for split, count in (("train", 6), ("val", 3)):
        for label, name in enumerate(("ant", "bee")):
            for i in range(count):
                write(tmp_path / "set" / split / name / f"{i}.png", noise(40, 48, 3, seed=100 * label + i))
    return tmp_path / "set"


def run_check(*words):
    with pytest.raises(SystemExit) as stop:
        check_images.main(list(map(str, words)))
    return int(stop.value.code)


def test_check(folder, tmp_path, capsys):
    write(folder / "stray.png", noise(8, 200, 3))
    assert run_check(folder) == 0
    printed = capsys.readouterr().out
    for line in ("train/ant 6", "RGB 19", "40x48 18", "broken: 0", "odd-sized: 1", "stray.png: 8x200", "unlabelled: 1"):
        assert line in printed
    (folder / "train" / "ant" / "0.png").write_bytes(b"")
    assert run_check(folder) == 1
    printed = capsys.readouterr().out
    assert "broken: 1" in printed and "ant/0.png" in printed and "RGB 18" in printed


def test_check_of_a_bad_path_is_one_line_and_code_2(tmp_path, capsys):
    for words in ((tmp_path / "nowhere",), (tmp_path, tmp_path), ()):
        assert run_check(*words) == 2
        assert capsys.readouterr().err.count("\n") == 1
    code, _, err = finish(start("-m", "tools.check_images", tmp_path / "nowhere"))
    assert code == 2 and err.count("\n") == 1 and "no such folder" in err
