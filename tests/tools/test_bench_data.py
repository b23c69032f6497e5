"""bench_data.py: all ways make the same images, and what is printed is what was measured."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from common import jpeg
from tools import bench_data, tables


@pytest.fixture
def photos(tmp_path):
    for i in range(3):
        low = np.random.default_rng(i).integers(0, 256, (6, 8, 3), np.uint8)
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.fromarray(low).resize((250, 180)).save(tmp_path / "photos" / f"{i}.jpg")
    threads = torch.get_num_threads()
    yield tmp_path / "photos"
    torch.set_num_threads(threads)


def test_all_ways_make_the_same_batch(photos):
    """But torchvision's, whose crops are random in another way."""
    made, number = bench_data.ways(photos)
    batches = {name: function(3, [0, 2, 1, 0]) for name, function in made.items()}
    theirs = batches.pop("torchvision: ImageFolder, crops by Pillow")
    assert number == 3 and theirs.shape == (4, 3, 224, 224) and len(batches) == 3
    one, *others = [batch[0].float() for batch in batches.values()]
    assert all(batch.shape == one.shape == (4, 3, 224, 224) for batch in others)
    assert all((batch - one).abs().mean() < 1.5 for batch in others)


def test_what_is_printed_is_what_was_measured(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench_data, "CLASSES", 4)
    monkeypatch.setattr(bench_data, "LINKS", 5)
    path = tmp_path / "bench.json"
    bench_data.main([str(photos), "--images", "4", "--rounds", "2", "--files", "12", "--list_rounds", "2", "--json",
                     str(path)])
    printed, record = capsys.readouterr().out, json.loads(path.read_text())
    assert record["versions"]["jpeg"] == jpeg.decoder() and str(tmp_path / "photos") not in record["commands"][0]
    loading, listing = record["results"].values()
    for name, cells in loading.items():
        rates, base = cells["images/s"], loading[bench_data.COPYING]["images/s"]
        assert cells["times as fast as with copies"] == pytest.approx([a / b for a, b in zip(rates, base, strict=True)])
        assert f"| {name} | " in printed
    assert {len(values) for cells in listing.values() for values in cells.values()} == {2}
    tables.main(["print", str(path)])
    assert printed.endswith(capsys.readouterr().out)


def test_a_folder_that_is_missing_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        bench_data.main([str(tmp_path / "none")])
    assert capsys.readouterr().err.count("\n") == 1
