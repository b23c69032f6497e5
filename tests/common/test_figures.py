"""figures.py: pictures of images, and a run that goes on without matplotlib."""

import importlib.util

import numpy as np
import pytest
import torch
from PIL import Image

import mae
from common import figures


@pytest.fixture
def no_matplotlib(monkeypatch):
    """As on a machine where it is not installed."""
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else real(name))
    figures.can_draw.cache_clear()
    yield
    figures.can_draw.cache_clear()


@pytest.mark.parametrize("C", [1, 2, 3, 5])
def test_a_grid_has_a_row_for_each_name(tmp_path, C):
    figures.grid(tmp_path / "new" / "a.png", {"one": torch.rand(4, C, 8, 16), "two": torch.rand(4, 1, 8, 16)})
    with Image.open(tmp_path / "new" / "a.png") as picture:
        assert picture.width > 2 * picture.height


def test_a_grid_says_what_its_colours_mean(tmp_path):
    """The legend has a patch of every colour below the images, and no name is a formula; the bar runs from black to
    white at their right."""
    rows = {"one": torch.full((4, 3, 16, 16), 0.5)}
    figures.grid(tmp_path / "a.png", rows, legend={"_moon": (1.0, 0.0, 0.0), "$\\star_$": (0.0, 0.0, 1.0)})
    figures.grid(tmp_path / "b.png", rows, bar=(0.0, 20.0, "metres"))
    with Image.open(tmp_path / "a.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
        below = pixels[pixels.shape[0] * 2 // 3 :].reshape(-1, 3)
        assert all((below == colour).all(axis=1).sum() > 20 for colour in ([255, 0, 0], [0, 0, 255]))
    with Image.open(tmp_path / "b.png") as picture:
        right = np.asarray(picture.convert("L"))[:, picture.width * 3 // 4 :]
        assert len(np.unique(right)) > 100


def test_without_matplotlib_nothing_is_drawn_and_that_is_said_once(no_matplotlib, tiny, call, tmp_path):
    done = call(mae.main, tiny(max_steps=4, picture_epochs=0.1, out=tmp_path / "run"))
    assert done.code == 0 and done.err == "", done.err
    assert done.out.count("no pictures are drawn") == 1 and not (tmp_path / "run" / "pictures").exists()
    assert (tmp_path / "run" / "encoder.pt").exists()
