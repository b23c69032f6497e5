"""runner.py: the queue with real processes, and tables and records by hand."""

import json
import multiprocessing
import os
import re
import signal
import time
import types
from pathlib import Path

import pytest
import torch
from conftest import ROOT, equal

import mae
from common import config
from tools import runner

FORK = multiprocessing.get_context("fork")  # which knows what a test has put into runner.SCRIPTS


@pytest.fixture
def acts(monkeypatch, tmp_path):
    """`acts()`: [(when, "begins" or "ends", name, process id)] of what `job(name, seconds)` did."""
    diary = tmp_path / "diary.txt"

    def main(words):
        name, seconds = words[0], float(words[1])
        begins = time.monotonic()
        with open(diary, "a") as file:
            file.write(json.dumps([begins, "begins", name, os.getpid()]) + "\n")
        print("\n".join(f"line {i} of {name}" for i in range(20)), flush=True)
        if name.startswith("logs"):
            log = Path("runs", name, "log.jsonl")
            log.write_text('{"probe": 1}\n{"step": 20, "loss": 2.4321}\n{"step": 40, "lo')
        os.system(f"echo {name} from outside")
        time.sleep(seconds)
        if name.startswith("bad"):
            raise SystemExit(3)
        with open(diary, "a") as file:
            file.write(json.dumps([time.monotonic(), "ends", name, os.getpid()]) + "\n")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner, "PROCESSES", FORK)
    monkeypatch.setitem(runner.SCRIPTS, "mae.py", types.SimpleNamespace(main=main))

    def read():
        lines = diary.read_text().splitlines() if diary.exists() else []
        return sorted(tuple(json.loads(line)) for line in lines)

    return read


def job(name, seconds=0.0, needs=(), again="--resume"):
    return runner.training(f"mae.py {name} {seconds}", out=f"runs/{name}", needs=needs, again=again)


def names(acts, kind):
    return [name for _, act, name, _ in acts() if act == kind]


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


# -------------------- The queue --------------------

def test_a_job_begins_after_those_it_needs(acts):
    first, second = job("first", 0.3), job("second", 0.1)
    third = job("third", needs=[first, second])
    ended = list(runner.run([job("fourth", needs=[third]), third], workers=3))
    assert [one.out.name for one in ended] == ["second", "first", "third", "fourth"]
    when = {(act, name): moment for moment, act, name, _ in acts()}
    assert when["begins", "third"] > max(when["ends", "first"], when["ends", "second"])
    assert when["begins", "second"] < when["ends", "first"]  # beside each other
    assert when["begins", "fourth"] > when["ends", "third"]


def test_the_first_loss_of_a_run_is_printed_while_it_runs(acts, capsys):
    list(runner.run([job("logs", 2.5), job("silent", 2.5)], workers=2))
    assert re.findall(r"s  (runs/.*)", capsys.readouterr().out) == ["runs/logs: step 20, loss 2.43"]


def test_a_loss_of_an_earlier_run_is_not_printed(acts, capsys):
    folder = Path("runs/overwritten")
    folder.mkdir(parents=True)
    (folder / "log.jsonl").write_text('{"step": 20, "loss": 2.4321}\n')
    os.utime(folder / "log.jsonl", (1, 1))
    list(runner.run([job("overwritten", 1.5)]))
    assert "loss" not in capsys.readouterr().out


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_no_more_at_a_time_than_workers(acts, workers):
    list(runner.run([job(f"job{i}", 1.0) for i in range(5)], workers))
    running = most = 0
    for _, act, _, _ in acts():
        running += 1 if act == "begins" else -1
        most = max(most, running)
    assert most == workers and sorted(names(acts, "ends")) == [f"job{i}" for i in range(5)]


def test_what_it_prints_is_kept_also_from_outside_of_python(acts, capfd):
    list(runner.run([job("one")]))
    lines = (job("one").out / "output.txt").read_text().splitlines()
    assert "line 0 of one" in lines and "one from outside" in lines
    assert capfd.readouterr().out == f"          python {job('one').command}\n"


def test_a_failed_job_ends_all_others_and_shows_its_last_lines(acts):
    slow, bad = job("slow", 60), job("bad", 0.3)
    begin = time.monotonic()
    with pytest.raises(SystemExit) as stop:
        list(runner.run([slow, bad, job("after", needs=[bad])], workers=2))
    message = str(stop.value).splitlines()
    assert message[0] == f"{bad.command} failed:" and "line 19 of bad" in message and "line 0 of bad" not in message
    assert len(message) == 16 and time.monotonic() - begin < 30
    assert sorted(names(acts, "begins")) == ["bad", "slow"] and not names(acts, "ends")
    assert not any(alive(pid) for *_, pid in acts())
    assert not any((one.out / "ended.txt").exists() for one in (slow, bad))


def test_what_has_ended_well_is_not_run_again(acts):
    one = job("one")
    two = job("two", needs=[one])
    for _ in range(2):
        assert list(runner.run([one, two])) == [one, two]
    assert names(acts, "begins") == ["one", "two"]
    list(runner.run([job("one", 0.1)]))  # another command in the same folder
    assert names(acts, "begins") == ["one", "two", "one"]
    list(runner.run([job("one")]))
    assert names(acts, "begins") == ["one", "two", "one", "one"]
    for _ in range(2):
        list(runner.run([job("two", again="--overwrite")]))
    assert names(acts, "begins") == ["one", "two", "one", "one", "two", "two"]


def test_a_job_that_many_need_runs_once(acts):
    list(runner.run([job(f"job{i}", needs=[job("first")]) for i in range(3)]))
    assert names(acts, "begins").count("first") == 1 and len(names(acts, "ends")) == 4


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_children(acts, number):
    jobs = [job("one", 60), job("two", 60), job("three", 60)]
    queue = FORK.Process(target=lambda: list(runner.run(jobs, workers=2)))
    queue.start()
    while len(acts()) < 2:
        time.sleep(0.05)
    os.kill(queue.pid, number)
    queue.join(30)
    assert queue.exitcode == 130
    assert len(acts()) == 2 and not any(alive(pid) for *_, pid in acts())


def test_who_stops_reading_ends_the_children(acts):
    jobs = runner.run([job("one"), job("two", 60)], workers=2)
    assert next(jobs) == job("one")
    jobs.close()
    assert not any(alive(pid) for *_, pid in acts()) and names(acts, "ends") == ["one"]


def test_handlers_of_signals_come_back(acts):
    before = signal.getsignal(signal.SIGTERM)
    list(runner.run([job("one")]))
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_fork_computes_what_the_command_alone_does(monkeypatch, tmp_path, tiny, tuned, call):
    monkeypatch.setattr(runner, "PROCESSES", FORK)
    pretraining = runner.training("mae.py", *tiny(max_steps=4), out=tmp_path / "queue")
    words = tuned(max_steps=2, init=tmp_path / "queue" / "encoder.pt")
    tuning = runner.training("finetune.py", *words, out=tmp_path / "tuned", needs=[pretraining])
    ended = list(runner.run([tuning]))
    assert ended == [pretraining, tuning] and (tmp_path / "tuned" / "result.json").exists()
    assert call(mae.main, [*tiny(max_steps=4), "--out", tmp_path / "alone"]).code == 0
    one, other = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("queue", "alone"))
    assert equal(one, other)
    assert "command: mae.py --data" in (tmp_path / "queue" / "config.yaml").read_text()


def test_without_fork_a_fresh_process_runs_the_command(monkeypatch, tmp_path):
    """As on macOS and Windows. The option does not exist, which is known after the scripts were imported."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(runner, "PROCESSES", multiprocessing.get_context("spawn"))
    with pytest.raises(SystemExit, match="no_such_option"):
        list(runner.run([runner.training("mae.py --no_such_option 1", out=tmp_path / "out")]))


# -------------------- Records --------------------

def test_a_record_says_where_its_numbers_come_from(tmp_path):
    record = runner.new_record("one", ["python mae.py"], [0, 1], results={"a": {}})
    assert list(record) == ["what", "commit", "date", "machine", "seeds", "commands", "results"]
    assert record["machine"]["torch"] == torch.__version__ and record["machine"]["processor"]
    assert record["seeds"] == [0, 1] and record["commit"] == config.git_commit()
    runner.write(tmp_path / "new" / "record.json", record)
    assert json.loads((tmp_path / "new" / "record.json").read_text()) == record


def test_without_proc_the_machine_has_a_name(monkeypatch):
    class Nowhere(type(ROOT)):
        def exists(self):
            return False
    monkeypatch.setattr(runner, "Path", Nowhere)
    machine = runner.machine(threads=2)
    assert machine["processor"] and machine["bf16_instructions"] == [] and machine["threads"] == 2


def test_measure_keeps_what_is_known_when_a_job_fails(made_up, capsys):
    """One number a seed, None until it is known, and the commands of the first seed."""
    cells = [runner.Cell("title", "row", "column", seed, runner.training("mae.py", "--seed", seed, out=f"runs/{seed}"))
             for seed in (4, 13)]
    with pytest.raises(SystemExit, match="failed"):
        runner.measure("some", cells, "some.json", workers=1)
    with open("some.json") as file:
        record = json.load(file)
    assert record["results"] == {"title": {"row": {"column": [50, None]}}} and record["seeds"] == [4, 13]
    assert record["commands"] == ["python mae.py --seed 4 --out runs/4 --resume"]
    assert record["commits_of_runs"] == ["1111111"]
    assert " s  row, column, seed 4: 50.0\n" in capsys.readouterr().out


# -------------------- Tables --------------------

@pytest.mark.parametrize("value, text", [
    (57.03, "57.0"), (9.7, "9.70"), (1.126, "1.13"), (0.01824, "0.0182"), (100, "100"), (999.4, "999"),
    (1000, "1,000"), (2834006016, "2,834,006,016"), (0, "0.00"), (-57.03, "-57.0")])
def test_three_digits(value, text):
    assert runner.number(value) == text


@pytest.mark.parametrize("values, text", [
    ([59.55, 54.75, 56.75], "57.0 (54.8 to 59.5)"), ([86.1], "86.1"), ([86.1, None, None], "86.1 (1 of 3 seeds)"),
    ([32.5, 27.4, None], "29.9 (27.4 to 32.5, 2 of 3 seeds)"), ("as it is", "as it is"), ("", "")])
def test_a_cell_has_mean_and_range(values, text):
    assert runner.cell_text(values) == text


def test_a_table_by_hand():
    rows = {"MAE": {"200 labels": [50.0, 60.0], "500 labels": [70.0, 80.0]}, "random": {"500 labels": [10.0, 20.0]}}
    assert runner.markdown("top-1", rows) == (
        "| top-1 | 200 labels | 500 labels |\n|---|---|---|\n"
        "| MAE | 55.0 (50.0 to 60.0) | 75.0 (70.0 to 80.0) |\n| random |  | 15.0 (10.0 to 20.0) |")
    assert runner.markdown("top-1", runner.by_seed({"random": rows["random"]}, [3, 4])) == (
        "| top-1 | seed 3 | seed 4 | mean |\n|---|---|---|---|\n"
        "| random, 500 labels | 10.0 | 20.0 | 15.0 (10.0 to 20.0) |")
