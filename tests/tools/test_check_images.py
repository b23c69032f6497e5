"""check_images.py: what is broken, odd-sized or unlabelled is listed, and the exit code says whether anything is."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tools import check_images
from tools.trials import ROOT, finish, fork, start


def write(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


@pytest.fixture
def photos(tmp_path):
    for split, count in (("train", 6), ("val", 3)):
        for label, name in enumerate(("ant", "bee")):
            for i in range(count):
                write(tmp_path / "set" / split / name / f"{i}.png", noise(40, 48, 3, seed=100 * label + i))
    return tmp_path / "set"


def run_check(*words):
    with pytest.raises(SystemExit) as stop:
        check_images.main(list(map(str, words)))
    return int(stop.value.code)


def test_check(photos, tmp_path, capsys):
    write(photos / "stray.png", noise(8, 200, 3))
    assert run_check(photos) == 0
    printed = capsys.readouterr().out
    for line in ("train/ant 6", "RGB 19", "40x48 18", "broken: 0", "odd-sized: 1", "stray.png: 8x200", "unlabelled: 1"):
        assert line in printed
    (photos / "train" / "ant" / "0.png").write_bytes(b"")
    assert run_check(photos) == 1
    printed = capsys.readouterr().out
    assert "broken: 1" in printed and "ant/0.png" in printed and "RGB 18" in printed


def test_pipes_and_devices_are_named_and_never_read(photos, tmp_path, tiny):
    """Each of them is the first of the images whose range is taken."""
    images = shutil.copytree(photos, tmp_path / "images")
    os.mkfifo(images / "train" / "ant" / "-.png")
    os.mkfifo(images / "train" / "ant" / "-.npy")
    (images / "train" / "ant" / "-.tif").symlink_to("/dev/zero")
    code, out, err = finish(fork("-m", "tools.check_images", images), timeout=30)
    assert code == 1 and "broken: 3\n" in out and out.count("is not a regular file") == 3, (out, err)
    words = tiny(data=images, out=tmp_path / "run", max_bad=0.5, epochs=1)
    code, _, err = finish(fork("mae.py", *words), timeout=30)
    assert code == 0 and err.count("is not a regular file") == err.count("\n") == 3, err


def test_what_is_in_the_files_is_summed_up(tmp_path, capsys):
    """A scan of 12 bits is neither "broken: 0" and black, nor what its first bytes say."""
    for i, value in enumerate((0, 300, 600)):
        write(tmp_path / "set" / "train" / "a" / f"{i}.png", np.full((40, 40), value, np.uint16))
    pair = noise(40, 40, 3)
    write(tmp_path / "set" / "train" / "b" / "0.png", pair)
    np.save(tmp_path / "set" / "train" / "b" / "1.npy", np.full((40, 40, 2), 7, np.int32))
    (tmp_path / "set" / "a.heic").touch()
    (tmp_path / "set" / "b.txt").touch()
    assert run_check(tmp_path / "set") == 0
    printed = capsys.readouterr().out
    assert "--value_range 0,600" in printed
    assert "files: 5 images, 4 .png, 1 .npy; passed over: 1 .heic, 1 .txt" in printed
    assert "I;16, 1 channel(s): minimum 0, mean 300, maximum 600" in printed
    assert "npy of int32, 2 channel(s): minimum 7,7, mean 7,7, maximum 7,7" in printed
    means = ",".join(f"{m:.4g}" for m in pair.reshape(-1, 3).mean(axis=0))
    assert f"RGB, 3 channel(s): minimum 0,0,0, mean {means}, maximum 255,255,255" in printed
    # 0, 128, 255 in three grey images, as RGB, beside the fourth
    pixels = np.concatenate([np.repeat([[0], [128], [255]], 1600, axis=0).repeat(3, axis=1), pair.reshape(-1, 3)]) / 255
    mean, std = (",".join(f"{n:.4g}" for n in numbers) for numbers in (pixels.mean(axis=0), pixels.std(axis=0)))
    assert f"--mean {mean} --std {std}" in printed
    assert run_check(tmp_path / "set", "--value_range", "-100,1000") == 0 and "black is" not in capsys.readouterr().out


def test_names_that_a_terminal_would_obey_or_cannot_print(tmp_path):
    """The report comes whole, on a terminal of ASCII alone that forgives nothing; from names, nothing but text."""
    names = [b"caf\xe9.png", "é.png".encode(), b"a\nb.png", b"\x1b[31mred.png"]
    (tmp_path / "set").mkdir()
    for name in names:
        (tmp_path / "set" / os.fsdecode(name)).touch()
    process = subprocess.run([sys.executable, "-m", "tools.check_images", tmp_path / "set"], cwd=ROOT, check=False,
                             capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii:strict"})
    assert process.returncode == 1, process.stderr
    lines = process.stdout.decode("ascii").splitlines()
    assert "broken: 4" in process.stdout.decode() and not any("\x1b" in line for line in lines)
    for shown in (r"caf\udce9.png", r"\xe9.png", r"a\nb.png", r"\x1b[31mred.png"):
        assert any(shown in line for line in lines), (shown, lines)


def test_check_of_a_bad_path_is_one_line_and_code_2(tmp_path, capsys):
    for words in ((tmp_path / "nowhere",), (tmp_path, tmp_path), ()):
        assert run_check(*words) == 2
        assert capsys.readouterr().err.count("\n") == 1
    code, _, err = finish(start("-m", "tools.check_images", tmp_path / "nowhere"))
    assert code == 2 and err.count("\n") == 1 and "no such folder" in err
