"""demo.py: what it runs, and what it leaves. The runs themselves are made up."""

import json
from pathlib import Path

from tools import demo

TOP1 = {"pre-trained": 50.0, "scratch": 40.0, "scratch, 4x budget": 40.0}


def test_demo_runs_everything_anew(made_up):
    for _ in range(2):
        demo.main(["--out", "runs"])
    commands = made_up()
    assert len(commands) == 2 * (1 + 2 * len(demo.ARMS)) and all("--overwrite" in c for c in commands)


def test_arms_differ_in_where_they_start_and_how_long_they_train(made_up):
    demo.main(["--out", "runs", "--seeds", "3", "--jobs", "1"])
    pretraining, *tuning = made_up()
    assert pretraining == "mae.py --config configs/tiny.yaml --seed 3 --out runs/seed3/mae --overwrite"
    for labels, epochs in demo.BUDGET.items():
        for arm, (times, rate) in demo.ARMS.items():
            out = f"runs/seed3/{demo.slug(arm)}_{labels}"
            start = "--init runs/seed3/mae/encoder.pt" if arm == "pre-trained" else "--model vit_tiny --patch_size 8"
            words = f"{start} --labels {labels} --epochs {times * epochs} --base_lr {rate} --split test --seed 3"
            tuning.remove(f"finetune.py --config configs/finetune_tiny.yaml {words} --out {out} --overwrite")
    assert not tuning


def test_numbers_figure_and_table(made_up, capsys):
    demo.main(["--out", "runs", "--seeds", "0 1 2", "--json", "kept/demo.json"])
    record = json.loads(Path("kept/demo.json").read_text())
    assert record["seeds"] == [0, 1, 2] and record["seconds"] >= 0
    cells = {arm: {"200 labels": [top1] * 3, "500 labels": [top1] * 3} for arm, top1 in TOP1.items()}
    assert record["results"] == {demo.TITLE: cells}
    log = [{"step": 100, "loss": 2.0}, {"step": 1250, "loss": 1.0}]
    assert record["pretraining_log"] == dict.fromkeys("012", log)
    assert Path("runs/demo.png").stat().st_size > 1000
    printed = capsys.readouterr().out
    assert "| pre-trained, 500 labels | 50.0 | 50.0 | 50.0 | 50.0 (50.0 to 50.0) |" in printed
    assert "numbers          kept/demo.json\n" in printed and "runs/seed2/mae/pictures/step.png" in printed


def test_what_is_measured_stays_below_runs_unless_asked_for(made_up, tmp_path):
    demo.main(["--seeds", "0 1 2"])
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
