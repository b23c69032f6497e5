"""figures.py: pictures of images, and a run that goes on without matplotlib."""

import importlib.util

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


def test_without_matplotlib_nothing_is_drawn_and_that_is_said_once(no_matplotlib, tiny, call, tmp_path):
    done = call(mae.main, tiny(max_steps=4, picture_epochs=0.1, out=tmp_path / "run"))
    assert done.code == 0 and done.err == "", done.err
    assert done.out.count("no pictures are drawn") == 1 and not (tmp_path / "run" / "pictures").exists()
    assert (tmp_path / "run" / "encoder.pt").exists()
