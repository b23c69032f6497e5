"""tables.py: what is compared are equal runs, and what is printed is what a file under results/ holds."""

import argparse
import json
import re
import statistics
from pathlib import Path

import pytest
from conftest import ROOT

from common import config
from tools import convert, demo, runner, tables

FILES = sorted((ROOT / "results").glob("*.json"))
RUNS = 2 * (1 + len(tables.TESTS))  # of a method and a seed: two encoders, and what they are put to


def record_of(path):
    return json.loads(Path(path).read_text())


def numbers_of(text):
    return [float(number.replace(",", "")) for number in re.findall(r"\d[\d.,]*\d|\d", text)]


def test_learns_compares_equal_runs(made_up, capsys):
    """Both arms are the same commands, but for where they start: at a pre-training, or at one stopped at once."""
    tables.main(["learns", "--seeds", "0 1 2", "--out", "runs", "--jobs", "2"])
    commands = made_up()
    assert len(commands) == 3 * len(tables.LEARNS) * RUNS
    pretrained, scratch = ([c for c in commands if f"/{arm}" in c] for arm in ("pre-trained", "scratch"))
    stopped = [c for c in scratch if "finetune.py" not in c]
    assert len(stopped) == 3 * len(tables.LEARNS) and all(" --max_steps 1 " in c for c in stopped)
    alike = [c.replace(" --max_steps 1 ", " ") if c in stopped else c for c in scratch]
    assert sorted(pretrained) == sorted(c.replace("/scratch", "/pre-trained") for c in alike)
    record = record_of("runs/learns.json")
    tops = {f"{test}: {arm}": [top1] * 3 for test in tables.TESTS for arm, top1 in
            (("pre-trained", 50), ("scratch", 40))}
    assert record["results"] == {demo.TITLE: dict.fromkeys(tables.LEARNS, tops)}
    ends = [{"step": 100, "loss": 2.0}, {"step": 1250, "loss": 1.0}]
    assert record["log"] == {name: dict.fromkeys("012", ends) for name in tables.LEARNS}
    assert "| UM-MAE PVT | 50.0 (50.0 to 50.0) | 40.0 (40.0 to 40.0) |" in capsys.readouterr().out


def test_learns_goes_on_where_it_was_stopped(made_up):
    """A command that failed, or that is another one than before, runs; one that ended well does not run again."""
    words = ["learns", "--methods", "MAE ViT,UM-MAE Swin", "--out", "runs", "--jobs", "1"]
    with pytest.raises(SystemExit, match="failed"):
        tables.main([*words, "--seeds", "0 13"])
    commands = made_up()
    assert len([c for c in commands if " --seed 0 " in c]) == 2 * RUNS and " --resume" in commands[-1]
    assert record_of("runs/learns.json")["results"][demo.TITLE]["MAE ViT"]["200 labels: scratch"] == [40, None]
    tables.main([*words, "--seeds", "0"])
    assert made_up() == commands
    for seed in (1, 2, 2):
        list(runner.run([runner.training("mae.py", "--seed", seed, out="runs/one")]))
    assert len(made_up()) == len(commands) + 2


def test_learns_from_longer_pretraining(made_up, capsys):
    """Of some methods, beside what shorter ones left."""
    for epochs in (2, 8):
        tables.main(["learns", "--epochs", str(epochs), "--methods", "LUT ViT", "--out", "runs"])
    commands = made_up()
    long = [c for c in commands if c.startswith("lut.py") and " --epochs 8 --warmup_epochs 0.64 " in c]
    assert len(long) == 2 and len(commands) == 2 * RUNS
    assert list(record_of("runs/learns_8_epochs.json")["results"][demo.TITLE]) == ["LUT ViT"]
    with pytest.raises(SystemExit, match="2"):
        tables.main(["learns", "--methods", "LUT ViT,BEiT"])
    assert "--methods: BEiT is not one of MAE ViT, " in capsys.readouterr().err


def test_protocols_put_every_method_through_all_that_suits_it(made_up, tmp_path, capsys):
    elsewhere = tmp_path / "some" / "cifar"
    tables.main(["protocols", "--cifar10_mini", str(elsewhere), "--out", "runs"])
    tuning = [c for c in made_up() if c.startswith("finetune.py")]
    assert len(tuning) == 2 * (5 * len(tables.PROTOCOLS) + len(tables.OF_RANDOM))
    assert all(" --labels 500 " in c and " --split test " in c for c in tuning)
    after = [c for c in tuning if "after_the_other_data" in c]
    assert len(after) == 10
    for command in after:
        other = "shapes_all" if f"--data {elsewhere} " in command else "cifar10_mini_all"
        assert f"seed0/{other}/encoder.pt " in command
    record = record_of("runs/protocols.json")
    assert str(elsewhere) not in json.dumps(record) and any("--data DIR " in c for c in record["commands"])
    assert set(record["results"]["shapes"]) == set(record["results"]["cifar10_mini"]) == set(tables.PROTOCOLS)
    printed = capsys.readouterr().out
    assert "| k-NN | 50.0 | 50.0 | 50.0 | 50.0 | 50.0 | 50.0 |\n" in printed
    assert "| half a block | 50.0 | 50.0 | 50.0 | 50.0 | 50.0 |  |\n" in printed


def test_dense_trains_encoders_once(made_up, capsys):
    tables.main(["dense", "--seeds", "0 1", "--out", "runs"])
    commands = made_up()
    assert len([c for c in commands if not c.startswith("-m tools.dense")]) == 2
    assert len(commands) == 2 + 2 * 2 * 3 * 2  # seeds, tasks, encoders, modes
    for name, start in {"MAE": "runs/mae/", "supervised": "runs/supervised/"}.items():
        own = [c for c in commands if re.search(f"runs/(segment|depth)_[a-z-]+_{name}_", c)]
        assert len(own) == 8 and all(f"--init {start}encoder.pt " in c for c in own)
    results = record_of("runs/dense.json")["results"]
    assert results[tables.SUPERVISED_TITLE] == {"supervised": {"20,000 labels": [50, None]}}
    for task, value in {"segment": 80, "depth": 1.25}.items():
        modes = {"frozen": [value] * 2, "fine-tuned": [value] * 2}
        assert results[tables.SCORES[task][1]] == dict.fromkeys(["MAE", "supervised", "random"], modes)
    assert Path("runs/dense.png").stat().st_size > 1000
    assert "| random | 1.25 (1.25 to 1.25) | 1.25 (1.25 to 1.25) |" in capsys.readouterr().out


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_committed_file_prints_as_its_numbers(path, capsys):
    tables.main(["print", str(path)])
    printed, record = capsys.readouterr().out, record_of(path)
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines() if "|" in line]
    lines = [line for line in lines if set("".join(line)) != {"-"}]
    if isinstance(record["results"], list):  # bench.py
        assert len(lines) == 1 + len(record["results"])
        for (name, ratio, flops, *_), row in zip(lines[1:], record["results"], strict=True):
            a, b = row["pair"]
            assert name == f"{b} / {a}, {row['precision']}, batch {row['batch']}"
            ratios = row["ratios"]
            assert numbers_of(ratio) == pytest.approx([statistics.median(ratios), min(ratios), max(ratios)], rel=0.006)
            assert float(flops) == pytest.approx(row["flops"][1] / row["flops"][0], abs=0.006)
        return
    for title, rows in record["results"].items():
        header, body, lines = lines[0], lines[1 : 1 + len(rows)], lines[1 + len(rows) :]
        assert header[0] == title and [line[0] for line in body] == list(rows)
        for line, cells in zip(body, rows.values(), strict=True):
            assert set(cells) <= set(header[1:])
            for column, text in zip(header[1:], line[1:], strict=True):
                known = [value for value in cells.get(column, []) if value is not None]
                shown = numbers_of(re.sub(r"[(,] ?\d of \d seeds", "", text))
                expected = [statistics.mean(known)] if known else []
                expected += [min(known), max(known)] if len(known) > 1 else []
                assert shown == pytest.approx(expected, rel=0.006), (title, line[0], column)
    assert not lines


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_committed_file_says_where_its_numbers_come_from(path):
    record = record_of(path)
    assert {"what", "commit", "date", "machine", "seeds", "commands", "results"} <= record.keys()
    assert {"processor", "torch", "threads"} <= record["machine"].keys()
    assert record["commands"] and all(command.startswith("python ") for command in record["commands"])
    assert not re.search(r"/(work|home|root|tmp)/", json.dumps(record))


def test_a_missing_file_is_one_line(call, tmp_path):
    done = call(tables.main, ["print", tmp_path / "none.json"])
    assert done.code == 2 and "none.json" in done.err and done.err.count("\n") == 1


@pytest.mark.parametrize("name", ["demo", "learns", "learns_8_epochs", "protocols", "dense"])
def test_readme_shows_what_was_measured(name):
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    shown = "\n".join(page.read_text() for page in pages)
    for title, rows in record_of(ROOT / "results" / f"{name}.json")["results"].items():
        if title != tables.SUPERVISED_TITLE:
            assert runner.markdown(title, rows) in shown, title


def test_every_command_of_a_table_can_be_parsed(tmp_path, call):
    """An option that a script lost would only be found after hours of measuring."""
    args = argparse.Namespace(out=tmp_path, seeds=[0], epochs=2, methods=list(tables.LEARNS), cifar10_mini=tmp_path)
    for cells_of in (tables.learns, tables.protocols, tables.dense):
        for job in runner.with_needs([cell.job for cell in cells_of(args)]):
            words = [word for word in job.words if word != "-m"]
            script = runner.SCRIPTS[words.pop(0)]
            if script is convert:  # it gets as far as looking for the encoder
                assert "no checkpoint at" in call(convert.main, words).err
            else:
                config.parse(script.Config, script.__doc__, words).check()
