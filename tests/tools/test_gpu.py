"""gpu.py: a plan that loses no step to another one, and tables that say what was found. Steps run on a CPU, in tiny
sizes; docs/gpu.md shows what ran on a GPU."""

import json
import os
import time
import types
from pathlib import Path

import pytest
from conftest import ROOT
from test_runs import RECIPES, script_of

from tools import gpu, gpu_checks, gpu_speed, gpu_table, tables
from tools.trials import finish, fork


def options(tmp_path, **more):
    return types.SimpleNamespace(**{"dry": True, "minutes": 1, "only": "", "cifar": None, "out": tmp_path, **more})


# The plan


def test_the_plan_has_everything_once(tmp_path):
    steps = gpu.plan_of(options(tmp_path, cifar=Path("cifar10.zip")))
    assert len({(step.group, step.name) for step in steps}) == len(steps)
    assert list(dict.fromkeys(step.group for step in steps)) == list(gpu.AT_ONCE)
    smoke = {gpu_checks.SCRIPTS[step.name] for step in steps if step.group == "smoke"}
    assert smoke == {script_of(recipe) for recipe in RECIPES}
    published = [pair for pair in gpu_table.PAIRS if pair[2].startswith("time")]
    assert len(published) > 3 and all({a, b} <= set(gpu.SPEED) for a, b, _ in published)


def test_only_takes_groups_and_steps(tmp_path):
    steps = gpu.plan_of(options(tmp_path, only="faults, lut"))
    assert [step.name for step in steps] == ["lut", "torchrun", "sigterm", "nan", "out_of_memory"]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_script_of_a_recipe(recipe):
    if "cifar10" not in recipe.stem:
        assert gpu_checks.SCRIPTS[gpu_speed.recipe_script(recipe.stem)] is script_of(recipe)


def test_unknown_step_is_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        gpu.main(["--dry", "--only", "no such step"])
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


# Its steps


def good(args, number):
    yield "one", {"ok": True, "number": number}
    yield "two", {"ok": False}


def crashes(args):
    yield "one", {"ok": True}
    raise ValueError(f"no such luck in {ROOT / 'runs'}")


def dies(args):
    yield "one", {"ok": True}
    os._exit(3)


def hangs(args):
    yield "one", {"ok": True}
    time.sleep(1000)


def test_a_step_loses_nothing_but_itself(tmp_path):
    steps = [gpu.Step("speed", "hangs", hangs, 1), gpu.Step("speed", "crashes", crashes, 20),
             gpu.Step("faults", "dies", dies, 20), gpu.Step("cifar", "good", good, 20, (7,))]
    results = {step.name: result for step, result in gpu.run_all(steps, options(tmp_path))}
    assert list(results) == ["hangs", "crashes", "dies", "good"]
    assert results["hangs"]["ended"] == "stopped after 1 s"
    assert results["crashes"]["ended"] == "failed: ValueError: no such luck in runs"
    assert results["dies"]["ended"].startswith("failed")
    assert results["good"]["ended"] == "ended"
    assert results["good"]["found"] == {"one": {"ok": True, "number": 7}, "two": {"ok": False}}
    assert all(results[name]["found"] == {"one": {"ok": True}} for name in ("hangs", "crashes", "dies"))


def test_time_ends_for_all(tmp_path):
    """The step that runs is stopped; the others are not begun."""
    steps = [gpu.Step("speed", "hangs", hangs, 100), gpu.Step("cifar", "good", good, 100, (7,))]
    begin = time.monotonic()
    args = options(tmp_path, minutes=(gpu.SPARE + 1) / 60)
    results = {step.name: result for step, result in gpu.run_all(steps, args)}
    assert time.monotonic() - begin < 10
    assert results["hangs"]["ended"].startswith("stopped") and results["good"]["ended"] == "not run: no time"


def test_a_dry_run_of_some_steps(tmp_path):
    """A script in every way, faults, speed; a second call adds what was missing."""
    words = ["-m", "tools.gpu", "--dry", "--minutes", 2, "--out", tmp_path]
    code, out, err = finish(fork(*words, "--only", "um_mae,nan,out_of_memory,UM-MAE PVT-S,vit_b_16 224"))
    assert code == 0, err
    assert "not as it should be" not in out and "did not end" not in out
    results = json.loads((tmp_path / "dry.json").read_text())["results"]
    parts = results["smoke"]["um_mae"]["found"]
    assert list(parts) == ["bf16", "fp32", "resumed", "as on a CPU"]
    assert parts["resumed"]["largest relative difference"] == 0
    assert "try --micro_batch 4" in results["faults"]["out_of_memory"]["found"]["--micro_batch 8"]["line"]
    assert results["speed"]["UM-MAE PVT-S"]["found"]["compiled"]["images/s"] > 0

    code, out, err = finish(fork(*words, "--only", "recipes 1 of 4"))
    assert code == 0, err
    again = json.loads((tmp_path / "dry.json").read_text())["results"]
    assert again["memory"]["recipes 1 of 4"]["ended"] == "ended" and again["smoke"] == results["smoke"]


# Its tables


RECORD = {
    "what": "gpu", "commit": "abc", "date": "today", "machine": {"torch": "2"}, "results": {
        "machine": {"machine": {"ended": "ended", "found": {"GPU": {"ok": True, "name": "H200", "GB": 150.0}}}},
        "smoke": {"mae": {"ended": "ended", "found": {"bf16": {"ok": True, "loss": 1.5}, "resumed": {"ok": False}}}},
        "speed": {
            "UM-MAE Swin-T": {"ended": "ended", "found": {"eager": {"ok": True, "ms a step": 100.0, "peak GB": 2.0}}},
            "SimMIM Swin-T as in UM-MAE":
                {"ended": "stopped after 90 s", "found": {"eager": {"ok": True, "ms a step": 210.0, "peak GB": 5.0}}}}}}


def test_the_tables(tmp_path):
    (tmp_path / "gpu.json").write_text(json.dumps(RECORD))
    text = tables.as_markdown(tmp_path / "gpu.json")
    assert text.startswith("H200, torch 2")
    assert "| mae: resumed | **no** |" in text and "| mae: bf16 | yes | loss: 1.50 |" in text
    assert "| SimMIM Swin-T as in UM-MAE / UM-MAE Swin-T, eager | 2.10 | 2.50 | time 1.97, memory 2.8 (UM-MAE" in text
    assert "| speed: SimMIM Swin-T as in UM-MAE | stopped after 90 s |" in text
    assert "CIFAR" not in text


def test_the_page_says_what_ran_on_a_gpu():
    """It shows the table of every file, or says that there is none."""
    page, files = (ROOT / "docs" / "gpu.md").read_text(), sorted(ROOT.glob("results/gpu_*.json"))
    for file in files:
        assert f"<!-- table: python -m tools.tables print results/{file.name} -->" in page
    assert ("No run on a GPU has been made yet" in page) == (not files)
