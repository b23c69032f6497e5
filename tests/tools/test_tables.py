"""tables.py: what is compared are equal runs, and what is printed is what a file under results/ holds."""

import argparse
import importlib
import json
import re
import statistics
from pathlib import Path

import pytest
from conftest import ROOT

from common import config
from tools import convert, demo, learning, runner, tables

FILES = sorted((ROOT / "results").rglob("*.json"))


def record_of(path):
    return json.loads(Path(path).read_text())


def numbers_of(text):
    return [float(number.replace(",", "")) for number in re.findall(r"-?\d[\d.,]*\d|-?\d", text)]


def test_the_sweep_tries_every_rate_of_both_arms(made_up, capsys):
    """On validation images; what is no method of its own has the rate of its recipe alone."""
    tables.main(["sweep", "--methods", "MAE ViT;FastMIM ViT;LUT ViT, plain views", "--out", "runs", "--jobs", "2"])
    commands = made_up()
    scripts = [c for c in commands if not c.startswith("finetune.py")]
    for name, beyond in {"MAE ViT": [], "FastMIM ViT": [2.5e-4]}.items():
        own = [c for c in scripts if c.startswith(learning.METHODS[name] + " ") and "--max_steps" not in c]
        tried = [float(rate) for c in own for rate in re.findall(r" --base_lr (\S+)", c)]
        assert sorted(tried) == sorted([*learning.RATES, *beyond])
    assert len(scripts) == 2 * len(learning.RATES) + 1 + 1 + 1  # the random weights of one network are made once
    tuning = [c for c in commands if c.startswith("finetune.py")]
    assert len(tuning) == len(learning.TUNING_RATES) * (len(scripts) + 1)  # scratch has a longer budget, too
    assert all(" --split val " in c and " --labels 500 " in c for c in tuning)
    results = record_of("runs/sweep.json")["results"]
    columns = {f"fine-tuning {rate:g}": [50] for rate in learning.TUNING_RATES}
    rows = ["pre-training 0.0005", "pre-training 0.001", "pre-training 0.002"]
    assert results[f"MAE ViT: {learning.VALIDATION}"] == dict.fromkeys([*learning.SCRATCH, *rows], columns)
    assert results[f"LUT ViT, plain views: {learning.VALIDATION}"] == {"pre-training": columns}
    assert "| pre-training 0.001 | 50.0 | 50.0 | 50.0 | 50.0 |" in capsys.readouterr().out


def test_learning_rates_are_the_best_of_the_sweep():
    """Of the committed ones, which are on validation images."""
    for path in (ROOT / "results").glob("sweep_*.json"):
        for title, rows in record_of(path)["results"].items():
            name, best = title.removesuffix(f": {learning.VALIDATION}"), {}
            for row, cells in rows.items():
                arm = "pre-trained" if row.startswith("pre-training") else row
                for column, [top1] in cells.items():
                    best[arm] = max(best.get(arm, (0.0, "", "")), (top1, row, column))
            assert best["pre-trained"][1] == f"pre-training {learning.PRETRAINED[name]:g}"
            tried = sorted(float(row.split()[-1]) for row in rows if row.startswith("pre-training"))
            assert tried[0] < learning.PRETRAINED[name] < tried[-1]  # what is best at an end may be better beyond it
            for arm, (_, row, _) in best.items():
                tuned = sorted(float(column.split()[-1]) for column in rows[row])
                assert tuned[0] < learning.TUNED[name][arm] < tuned[-1]
            chosen = {arm: f"fine-tuning {rate:g}" for arm, rate in learning.TUNED[name].items()}
            assert {arm: column for arm, (_, _, column) in best.items()} == chosen
    assert {arm: rate for arm, (_, rate) in demo.ARMS.items()} == learning.TUNED["MAE ViT"]


def test_dense_prediction_has_the_best_settings_of_its_sweep():
    """Of the committed one: for each column of the table, the best mode and rate on validation images."""
    results = record_of(ROOT / "results" / "dense_sweep.json")["results"]
    for task, (score, title) in tables.SCORES.items():
        found = {"MAE": [(), ()], "supervised": [(), ()], "random": [(), ()]}  # encoder: best of each column
        for row, cells in results[f"{title}, validation"].items():
            name, mode = row.split(", ", maxsplit=1)
            for rate, [value] in cells.items():
                entry = (-value if score == "rmse" else value, mode, float(rate))
                found[name][mode != "frozen"] = max(found[name][mode != "frozen"], entry)
        best = {name: tuple(entry[1:] for entry in columns) for name, columns in found.items()}
        assert best == tables.CHOSEN[task]
        for mode, rate in (pair for columns in best.values() for pair in columns):
            tried = tables.MODES[mode][1]
            assert min(tried) < rate < max(tried)  # what is best at an end may be better beyond it


BACKBONES = {"vit_tiny": "ViT", "swin_tiny": "Swin", "pvt_tiny": "PVT", "pvtv2_tiny": "PVTv2",
             "torchvision:resnet18": "ResNet-18"}


def test_commands_of_recipes_have_the_rates_of_the_sweep(monkeypatch):
    """Those in the comments of configs/*tiny.yaml, of every method and backbone."""
    monkeypatch.chdir(ROOT)
    found = {}
    for recipe in (ROOT / "configs").glob("*tiny.yaml"):
        for command in re.findall(r"^# +python (\w+)\.py (.*?)(?: +# .*)?$", recipe.read_text(), re.M):
            script = importlib.import_module(command[0])
            cfg = config.parse(script.Config, script.__doc__, command[1].split())
            if hasattr(script, "reconstruct"):
                name = script.__doc__.partition(":")[0] + " " + BACKBONES[cfg.model]
                found[name] = cfg.base_lr * cfg.batch_size / cfg.lr_batch
    assert found == learning.PRETRAINED


def test_learns_compares_equal_runs(made_up, capsys):
    """Both arms are the same commands, but for where they start, and the rate that the sweep chose for each."""
    tables.main(["learns", "--seeds", "0 1 2", "--out", "runs", "--jobs", "2"])
    commands = made_up()
    networks = set(learning.METHODS) - set(learning.SAME_NETWORK)
    stopped = [c for c in commands if " --max_steps 1 " in c and not c.startswith("finetune.py")]
    assert len(stopped) == 3 * len(networks)
    for name, command in learning.METHODS.items():
        pretrained = [c for c in commands if c.startswith(f"{command} --seed") and c not in stopped]
        assert len(pretrained) == 3 and all(f" --base_lr {learning.PRETRAINED[name]} " in c for c in pretrained)
    tuning = [c for c in commands if c.startswith("finetune.py")]
    assert all(" --split test " in c for c in tuning)
    plain = {re.sub(r" --(init|base_lr|out) \S+", "", c) for c in tuning}
    for seed in range(3):
        for more in ("", " --epochs 32", " --mode linear --max_steps 1 --head_l2 0"):
            assert f"{demo.FINETUNE} --labels 500 --epochs 8{more} --split test --seed {seed} --resume" in plain
    record = record_of("runs/learns.json")
    row = record["results"][demo.TITLE]["UM-MAE PVT"]
    assert list(row) == [f"{test}: {arm}" for test, (_, arms) in learning.TESTS.items() for arm in arms]
    assert set(map(tuple, row.values())) == {(50, 50, 50), (40, 40, 40)}
    ends = [{"step": 100, "loss": 2.0}, {"step": 1250, "loss": 1.0}]
    assert record["log"] == {name: dict.fromkeys("012", ends) for name in learning.METHODS}
    assert "| UM-MAE PVT | 50.0 (50.0 to 50.0) | 40.0 (40.0 to 40.0) | 40.0" in capsys.readouterr().out


def test_learns_goes_on_where_it_was_stopped(made_up, capsys):
    """A command that failed, or that is another one than before, runs; one that ended well does not run again."""
    words = ["learns", "--methods", "MAE ViT;UM-MAE Swin", "--out", "runs", "--jobs", "1"]
    with pytest.raises(SystemExit, match="failed"):
        tables.main([*words, "--seeds", "0 13"])
    commands = made_up()
    runs = 2 * (2 + sum(len(arms) for _, arms in learning.TESTS.values()))
    assert len([c for c in commands if " --seed 0 " in c]) == runs and " --resume" in commands[-1]
    assert record_of("runs/learns.json")["results"][demo.TITLE]["MAE ViT"]["500 labels: scratch"] == [40, None]
    tables.main([*words, "--seeds", "0"])
    assert made_up() == commands
    for seed in (1, 2, 2):
        list(runner.run([runner.training("mae.py", "--seed", seed, out="runs/one")]))
    assert len(made_up()) == len(commands) + 2
    with pytest.raises(SystemExit, match="2"):
        tables.main(["learns", "--methods", "LUT ViT;BEiT"])
    assert "--methods: BEiT is not one of MAE ViT; " in capsys.readouterr().err


def test_ablations_change_one_option_of_a_row_of_learns(made_up):
    """The row with the default is a run of `learns`, which is not made again."""
    tables.main(["learns", "--out", "runs", "--jobs", "2"])
    learned = made_up()
    tables.main(["ablations", "--out", "runs", "--jobs", "2"])
    results = record_of("runs/ablations.json")["results"]
    assert len(results) == len(learning.ABLATIONS)
    for title, (name, rows) in learning.ABLATIONS.items():
        assert list(rows.values()).count("") == 1 and len(set(rows.values())) == len(rows) > 1
        found = results[f"{name}, {title}: {demo.TITLE}"]
        assert list(found) == list(rows)
        assert all(list(cells) == ["500 labels", "linear, 500 labels"] for cells in found.values())
    new = [c for c in made_up() if not c.startswith("finetune.py")][len(
        [c for c in learned if not c.startswith("finetune.py")]):]
    changed = {options for _, rows in learning.ABLATIONS.values() for options in rows.values() if options}
    assert len(new) == len(changed) and all(any(f" {options} " in c for c in new) for options in changed)


def test_photographs_have_the_arms_of_one_network(made_up, tmp_path):
    """All seeds for MAE and scratch, the first one for the others; no path of this machine in the record."""
    elsewhere = tmp_path / "some" / "cifar"
    tables.main(["cifar10", "--data", str(elsewhere), "--seeds", "0 1", "--out", "runs"])
    commands = made_up()
    assert len([c for c in commands if not c.startswith("finetune.py")]) == 5 + 1
    tuning = [c for c in commands if c.startswith("finetune.py")]
    assert all(" --model vit_tiny --patch_size 4 " in c for c in tuning)
    record = record_of("runs/cifar10.json")
    assert str(elsewhere) not in json.dumps(record) and all("--data DIR " in c for c in record["commands"])
    (rows,) = record["results"].values()
    assert rows["MAE"]["50,000 labels"] == [50, 50] and rows["LUT"]["50,000 labels"] == [50, None]
    assert rows["scratch, 4x budget"] == {f"{labels:,} labels": [40, 40] for labels in learning.CIFAR10_BUDGET}
    for labels, epochs in learning.CIFAR10_BUDGET.items():
        budgets = [c for c in tuning if f" --labels {labels} " in c and " --seed 1 " in c]
        assert sorted(re.search(r"--epochs (\d+)", c)[1] for c in budgets) == sorted(
            [str(epochs), str(epochs), str(4 * epochs)])


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


def test_protocols_begin_with_the_encoders_of_learns(made_up, tmp_path):
    def pretrained():
        return [c for c in made_up() if not c.startswith(("finetune.py", "-m")) and "--max_steps 1" not in c]

    tables.main(["protocols", "--cifar10_mini", str(tmp_path), "--out", "runs"])
    assert len(pretrained()) == 5
    tables.main(["learns", "--methods", ";".join(f"{name} ViT" for name in tables.METHODS[:-1]), "--out", "runs"])
    assert len(pretrained()) == 5


def test_dense_trains_encoders_once(made_up, capsys):
    tables.main(["dense", "--seeds", "0 1", "--out", "runs"])
    commands = made_up()
    assert len([c for c in commands if not c.startswith("-m tools.dense")]) == 2
    assert len(commands) == 2 + 2 * 3 * 3 * 2  # seeds, tasks, encoders, modes
    for name, start in {"MAE": "runs/mae/", "supervised": "runs/supervised/"}.items():
        own = [c for c in commands if re.search(rf"runs/test_(segment|depth|keypoints)_\S+_{name}_", c)]
        assert len(own) == 12 and all(f"--init {start}encoder.pt " in c for c in own)
    results = record_of("runs/dense.json")["results"]
    assert results[tables.SUPERVISED_TITLE] == {"supervised": {"20,000 labels": [50, None]}}
    for task, value in {"segment": 80, "depth": 1.25, "keypoints": 70}.items():
        modes = {"frozen": [value] * 2, "fine-tuned": [value] * 2}
        assert results[tables.SCORES[task][1]] == dict.fromkeys(["MAE", "supervised", "random"], modes)
    assert Path("runs/dense.png").stat().st_size > 1000
    assert "| random | 1.25 (1.25 to 1.25) | 1.25 (1.25 to 1.25) |" in capsys.readouterr().out


def test_the_sweep_of_dense_prediction_tries_what_the_table_takes(made_up):
    """On validation images, from the encoders of the table."""
    tables.main(["dense_sweep", "--out", "runs"])
    commands = [c for c in made_up() if c.startswith("-m tools.dense")]
    assert len(commands) == 3 * 3 * 3 * 4 and all(" --split val " in c for c in commands)  # task, encoder, mode, rate
    tables.main(["dense", "--out", "runs"])
    before, after = ({re.sub(r" --(split|out) \S+", "", c) for c in made} for made in (commands, made_up()))
    assert before >= {c for c in after if c.startswith("-m tools.dense")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_committed_file_prints_as_its_numbers(path, capsys):
    tables.main(["print", str(path)])
    printed, record = capsys.readouterr().out, record_of(path)
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines() if "|" in line]
    lines = [line for line in lines if set("".join(line)) != {"-"}]
    if isinstance(record["results"], list):  # bench.py
        assert len(lines) == 1 + len(record["results"])
        for (name, ratio, other, *_), row in zip(lines[1:], record["results"], strict=True):
            a, b = row["pair"]
            assert name == f"{b} / {a}, {row['precision']}, batch {row['batch']}"
            ratios = row["ratios"]
            assert numbers_of(ratio) == pytest.approx([statistics.median(ratios), min(ratios), max(ratios)], rel=0.006)
            if b.endswith(": compiled"):
                assert other == f"{row['first_seconds']:.0f} s"
            else:
                assert float(other) == pytest.approx(row["flops"][1] / row["flops"][0], abs=0.006)
        return
    for title, rows in record["results"].items():
        header, body, lines = lines[0], lines[1 : 1 + len(rows)], lines[1 + len(rows) :]
        assert header[0] == title and [line[0] for line in body] == list(rows)
        for line, cells in zip(body, rows.values(), strict=True):
            assert set(cells) <= set(header[1:])
            for column, text in zip(header[1:], line[1:], strict=True):
                if isinstance(cells.get(column), str):  # "held 12 of 12"
                    assert text == cells[column]
                    continue
                known = [value for value in cells.get(column, []) if value is not None]
                shown = numbers_of(re.sub(r"[(,] ?\d of \d seeds", "", text))
                expected = [statistics.mean(known)] if known else []
                expected += [min(known), max(known)] if len(known) > 1 else []
                assert shown == pytest.approx(expected, rel=0.006), (title, line[0], column)
    assert not lines


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_committed_file_says_where_its_numbers_come_from(path):
    record = record_of(path)
    assert {"what", "commit", "date", "machine", "seeds", "commands", "results"} <= record.keys()
    assert {"processor", "torch", "threads"} <= record["machine"].keys()
    assert record["commands"] and all(command.startswith("python ") for command in record["commands"])
    assert not re.search(r"/(work|home|root|tmp)/", json.dumps(record))


def test_a_missing_file_is_one_line(call, tmp_path):
    done = call(tables.main, ["print", tmp_path / "none.json"])
    assert done.code == 2 and "none.json" in done.err and done.err.count("\n") == 1
    (tmp_path / "cut.json").write_text('{"what": ')
    done = call(tables.main, ["print", tmp_path / "cut.json"])
    assert done.code == 2 and "cut.json is no JSON" in done.err and done.err.count("\n") == 1


@pytest.mark.parametrize("name", ["demo", "sweep_vit", "sweep_pyramids", "learns_vit", "learns_pyramids", "ablations",
                                  "cifar10", "protocols", "dense"])
def test_readme_shows_what_was_measured(name):
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    shown = "\n".join(page.read_text() for page in pages)
    for title, rows in record_of(ROOT / "results" / f"{name}.json")["results"].items():
        if title != tables.SUPERVISED_TITLE:
            assert runner.markdown(title, rows) in shown, title


def test_every_command_of_a_table_can_be_parsed(tmp_path, call):
    """An option that a script lost would only be found after hours of measuring."""
    args = argparse.Namespace(out=tmp_path, seeds=[0], data=tmp_path, cifar10_mini=tmp_path)
    for cells_of in (learning.sweep, learning.learns, learning.ablations, learning.cifar10, tables.protocols,
                     tables.dense_sweep, tables.dense):
        args.methods = list(learning.CIFAR10 if cells_of is learning.cifar10 else learning.METHODS)
        for job in runner.with_needs([cell.job for cell in cells_of(args)]):
            words = [word for word in job.words if word != "-m"]
            script = runner.SCRIPTS[words.pop(0)]
            if script is convert:  # it gets as far as looking for the encoder
                assert "no checkpoint at" in call(convert.main, words).err
            else:
                config.parse(script.Config, script.__doc__, words).check()
