"""tools/features.py: features in a file are those that k-NN sees, row by row with their files."""

import numpy as np
import pytest
import torch
from conftest import flags

import mae
from common import neighbours, transforms
from common.images import decode
from models import from_arch
from tools import features


@pytest.fixture(scope="module")
def init(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("features") / "run"
    mae.main([str(word) for word in tiny(max_steps=2, out=out)])
    return out / "encoder.pt"


def take(call, tmp_path, init, data, **more):
    """The arrays that the tool writes."""
    words = flags(init=init, data=data, device="cpu", micro_batch=4, out=tmp_path / "new" / "features.npz", **more)
    done = call(features.main, words)
    assert done.code == 0, done.err
    with np.load(tmp_path / "new" / "features.npz") as arrays:
        return dict(arrays)


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_every_row_is_that_of_its_file(pool, init, folder, call, tmp_path):
    found = take(call, tmp_path, init, folder, pool=pool)
    assert found["features"].shape == (15, 96) and found["features"].dtype == np.float32
    assert list(found["classes"]) == ["ant", "bee", "cat"] and sorted(found["names"]) == list(found["names"])
    assert [found["classes"][label] for label in found["labels"]] == [name.split("/")[0] for name in found["names"]]
    saved = torch.load(init)
    encoder = from_arch(saved["arch"]).eval()
    encoder.load_state_dict(saved["model"])
    for row, name in list(zip(found["features"], found["names"], strict=True))[::7]:
        imgs = transforms.normalize(decode(str(folder / "val" / name), 3)[None])
        with torch.no_grad():
            one = neighbours.pooled(encoder, imgs, pool)[0]
        torch.testing.assert_close(torch.from_numpy(row), one, rtol=1e-4, atol=1e-5)


def test_a_folder_without_labels(init, folder, call, tmp_path):
    found = take(call, tmp_path, init, folder / "train" / "bee")
    assert len(found["features"]) == 12 and set(found["labels"]) == {-1} and len(found["classes"]) == 0
    assert "3.png" in found["names"]


def test_images_without_files_have_numbers(init, call, tmp_path, monkeypatch):
    monkeypatch.setitem(features.data.SPLITS, "val", (1_000_000, 6))
    found = take(call, tmp_path, init, "shapes")
    assert list(found["names"]) == list("012345") and len(found["classes"]) == 10


def test_what_is_wrong_is_one_line(init, folder, call, tmp_path):
    done = call(features.main, flags(init=init, data=tmp_path / "none", out=tmp_path / "a.npz"))
    assert done.code == 2 and done.err.count("\n") == 1 and "no such folder" in done.err
    assert not (tmp_path / "a.npz").exists()
