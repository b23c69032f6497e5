"""tools/torture.py: rows are tried and counted, and one that does not hold is said so."""

import json
import random

import pytest
import torch

from common import config
from tools import hostile, torture


def test_rows_are_tried_counted_and_added_to_what_is_there(call, tmp_path):
    """Real ones: a second run, and a pipe as last.pt."""
    words = ["--json", tmp_path / "numbers.json", "--out", tmp_path / "runs", "--minutes", 1.5]
    done = call(torture.main, ["--only", "two runs", *words])
    assert done.code == 0 and "two runs in one --out: held 1 of 1" in done.out, done.out
    words[-1] = 20 / len(hostile.ALL)
    done = call(torture.main, ["--only", "hostile", *words])
    assert done.code == 0 and "hostile files: held 1 of 1" in done.out, done.out
    record = json.loads((tmp_path / "numbers.json").read_text())
    assert record["results"] == {"what is tried": {"two runs in one --out": {"held": "1 of 1"},
                                                   "hostile files": {"held": "1 of 1"}}}
    assert len(record["commands"]) == 2 and record["rows"]["hostile files"]["commit"] == config.git_commit()
    assert not (tmp_path / "runs" / "tried").exists()


def test_what_does_not_hold_is_counted_and_said(call, tmp_path, monkeypatch):
    def trial(place, draw, i):
        if i == 1:
            raise torture.Broke(f"no checkpoint at {place.out / 'a.pt'}")

    monkeypatch.setattr(torture, "ROWS", {"a row": (trial, 4), "another": (trial, 1)})
    done = call(torture.main, ["--json", tmp_path / "numbers.json", "--out", tmp_path / "runs"])
    assert done.code == 1 and "a row: held 3 of 4\n           trial 1: no checkpoint at a.pt\n" in done.out
    rows = json.loads((tmp_path / "numbers.json").read_text())["rows"]
    assert (rows["a row"]["held"], rows["a row"]["of"], rows["another"]["held"]) == (3, 4, 1)
    done = call(torture.main, ["--only", "nothing", "--json", tmp_path / "none.json"])
    assert done.code == 2 and "there are a row; another" in done.err and not (tmp_path / "none.json").exists()


@pytest.mark.parametrize("kind,name", hostile.ALL, ids=lambda word: word)
def test_a_hostile_file_is_made(tmp_path, kind, name):
    """In the place of a good one; what it would execute has not been, yet."""
    path = tmp_path / "a.png"
    if kind in ("last.pt", "encoder.pt"):
        torch.save({"model": {"weight": torch.ones(1000)}, "step": 3, "arch": {}}, path)
    else:
        path.write_bytes(b"good" * 100)
    before = path.read_bytes()
    made = hostile.KINDS[kind][name](path, tmp_path / "mark", random.Random(0)) or path
    assert made.is_symlink() or not made.is_file() or made.read_bytes() != before
    assert not (tmp_path / "mark").exists()
