"""loggers.py: the same numbers in other logs, which a resumed run goes on with."""

import importlib.util
import sys
import types

import pytest
from conftest import log_of

import mae
from common import loggers


@pytest.fixture
def installed(monkeypatch):
    """As where tensorboard and wandb are installed: the packages note what they are given, in this dict of lists."""
    noted = {"scalars": [], "purged": [], "init": [], "log": [], "ended": []}

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            noted["purged"].append((folder, purge_step))

        def add_scalar(self, name, value, step):
            noted["scalars"].append((step, name, value))

        def flush(self):
            pass

        def close(self):
            noted["ended"].append("tensorboard")

    def init(**words):
        noted["init"].append(words)
        return types.SimpleNamespace(log=lambda values, step: noted["log"].append((step, values)),
                                     finish=lambda: noted["ended"].append("wandb"))

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec",
                        lambda name: True if name in ("tensorboard", "wandb") else real(name))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    return noted


def rows_of(out):
    """(step, name, number) of every number in log.jsonl."""
    return [(line["step"], name, value) for line in log_of(out) for name, value in line.items() if name != "step"]


@pytest.fixture
def run(tiny, call, tmp_path):
    """`run(**changes)`: a run in tmp_path / "run"."""
    def words(**changes):
        done = call(mae.main, tiny(out=tmp_path / "run", **changes))
        assert done.code == 0 and done.err == "", done.err
        return tmp_path / "run"
    return words


def test_csv_holds_the_numbers_of_the_log_after_a_resume_too(run):
    run(max_steps=3, logger="csv")
    out = run(max_steps=6, logger="csv", resume=True)
    first, *rows = (out / "log.csv").read_text().splitlines()
    assert first == "step,name,value" and {row.split(",")[0] for row in rows} == set("123456")
    assert [row.split(",") for row in rows] == [[str(cell) for cell in row] for row in rows_of(out)]


def test_csv_forgets_what_a_killed_run_wrote_beyond_its_checkpoint(run):
    out = run(max_steps=3)
    with open(out / "log.csv", "a") as file:
        file.write("4,loss,9.0\n")
    out = run(max_steps=4, logger="csv", resume=True)
    assert "9.0" not in (out / "log.csv").read_text() and "\n1,loss," in (out / "log.csv").read_text()


def test_tensorboard(run, installed):
    run(max_steps=3, logger="tensorboard")
    out = run(max_steps=5, logger="tensorboard", resume=True)
    assert installed["scalars"] == rows_of(out) and installed["ended"] == ["tensorboard"] * 2
    assert installed["purged"] == [(str(out / "tensorboard"), 1), (str(out / "tensorboard"), 4)]


def test_wandb_goes_on_in_the_same_run_and_begins_another_after_overwrite(run, installed):
    run(max_steps=3, logger="wandb")
    out = run(max_steps=5, logger="wandb", resume=True)
    assert [(step, name, value) for step, values in installed["log"] for name, value in values.items()] == rows_of(out)
    run(max_steps=1, logger="wandb", overwrite=True)
    ids = [words["id"] for words in installed["init"]]
    assert ids[0] == ids[1] != ids[2] and all(words["resume"] == "allow" for words in installed["init"])
    assert installed["init"][0]["config"]["mask_ratio"] == 0.75 and installed["ended"] == ["wandb"] * 3


@pytest.mark.parametrize("kind", ["tensorboard", "wandb"])
def test_a_logger_that_is_not_installed_is_one_line(kind, tiny, call, tmp_path, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == kind else real(name))
    done = call(mae.main, tiny(out=tmp_path / "run", logger=kind))
    assert done.code == 2 and done.err == f"error: --logger {kind} needs a package: pip install {kind}\n"
    assert not (tmp_path / "run").exists()


def test_only_numbers_are_kept():
    assert loggers.values({"step": 3, "loss": 0.5, "grad_norm": None, "per_class": {"a": 1}}) == {"loss": 0.5}
