"""engine.py: the statistics, the log, what is due, and the checks that stop a run."""

import io
import json
import math
import re
import resource
import sys
import time
import types

import pytest
import torch
import tqdm

import mae
from common import config, engine


def small(**options):
    return mae.Config(**{"model": "vit_tiny", "img_size": (32, 32), "patch_size": 8, "decoder_depth": 1,
                         "decoder_width": 32, "decoder_heads": 2, "precision": "fp32", "data": "shapes", **options})


def make_run(tmp_path, **options):
    """A Run of 10 steps, 5 an epoch, as if it had begun."""
    run = engine.Run(small(out=str(tmp_path), **options))
    run.last_step, run.steps_per_epoch = 10, 5
    run.bar = tqdm.tqdm(disable=True)
    return run


def test_log_averages_over_its_interval(tmp_path, capsys):
    run = make_run(tmp_path, log_every=4)
    for step in range(10):
        run.log(step, 8, float(step), 0.1, 2.0)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 8, 10]  # and the last step, whatever log_every
    assert [line["loss"] for line in lines] == [1.5, 5.5, 8.5]
    assert [line["epoch"] for line in lines] == [0.8, 1.6, 2.0] and lines[0]["grad_norm"] == 2.0
    assert "step 4/10" in capsys.readouterr().out


def test_a_disk_that_fills_leaves_no_half_a_line(tmp_path, capsys):
    run = make_run(tmp_path)
    run.note(step=1, loss=0.5)
    before, limits = (tmp_path / "log.jsonl").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in (0, 1, 9):
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + room, limits[1]))
        try:
            with pytest.raises(SystemExit):
                run.note(step=2, loss=0.25)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert (tmp_path / "log.jsonl").read_bytes() == before and "log.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize("error,said", [
    (MemoryError(), "not enough memory"), (torch.OutOfMemoryError("CUDA out of memory."), "CUDA out of memory"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), "--micro_batch")])
def test_want_of_memory_is_one_line(capsys, error, said):
    def main(argv=None):
        raise error

    with pytest.raises(SystemExit) as stop:
        engine.record(main)()
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and said in err


def test_a_mistake_is_no_want(capsys):
    def main(argv=None):
        raise RuntimeError("a mistake")

    with pytest.raises(RuntimeError, match="a mistake"):
        engine.record(main)()


def test_lines_stay_in_a_terminal_too(tmp_path, capsys):
    """Above the bar, whose loss says what it is the mean of."""
    run, screen = make_run(tmp_path, log_every=4), io.StringIO()
    run.bar = tqdm.tqdm(total=10, file=screen, ncols=200)
    for step in range(10):
        run.log(step, 8, float(step), 0.1, 2.0)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("step ")] == ["4/10", "8/10", "10/10"]
    assert "loss 8.5000 (mean of 2 steps)" in screen.getvalue()


def test_a_compiling_run_says_so_until_its_first_step(tmp_path, capsys, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    run = make_run(tmp_path, compile=True)
    assert isinstance(run.distribute(torch.nn.Linear(1, 1)), torch.nn.Linear)
    assert "compiling" in capsys.readouterr().out
    run.timed(iter(()))
    assert run.bar.desc.startswith("compiling")
    run.log(0, 8, 1.0, 0.1, 1.0)
    assert run.bar.desc == ""


def test_a_title_names_method_ratio_step_and_loss(tmp_path):
    run = make_run(tmp_path, log_every=100)
    run.model = types.SimpleNamespace()
    run.log(6, 8, 0.12345, 0.1, 1.0)
    assert run.picture_title(6) == "SimpleNamespace, mask_ratio 0.75, step 7, loss 0.1235"


def test_how_to_go_on_is_the_command_that_was_typed(monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["python3", "-u", "mae.py", "--out", "a b", "--overwrite"])
    assert engine.command_again(1) == "python3 mae.py --out 'a b' --resume"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert engine.command_again(2) == "torchrun --nproc-per-node 2 mae.py --out 'a b' --resume"
    monkeypatch.setattr(sys, "orig_argv", ["bin/python3", "mae.py", "--resume"])
    assert engine.command_again(4) == "bin/torchrun --nproc-per-node 2 --nnodes 2 ... mae.py --resume"
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    monkeypatch.setattr(sys, "orig_argv", ["bin/python3", "mae.py", "--max_steps", "6", "--out", "a"])
    assert engine.command_again(1) == "bin/python3 mae.py --max_steps 6 --out a --resume"
    assert engine.command_again(1, to_the_end=True) == "bin/python3 mae.py --out a --resume"
    assert config.typed(["-m", "tools.show", "a b.png"]) == "bin/python3 -m tools.show 'a b.png'"


@pytest.mark.parametrize("limit", ["--max_steps=2", "--max-steps 2", "--max-steps=2", ""])
@pytest.mark.parametrize("switch", ["--overwrite true", "--overwrite=True", "--overwrite", "--no-overwrite",
                                    "--overwrite false", "--resume true", "--resume=false"])
def test_how_to_go_on_whatever_the_words_were(monkeypatch, limit, switch):
    words = f"bin/python3 mae.py {switch} {limit} --out a --value_range -1,1".split()
    monkeypatch.setattr(sys, "orig_argv", words)
    expected = "bin/python3 mae.py --out a --value_range=-1,1 --resume"
    assert engine.command_again(1, to_the_end=True) == expected
    monkeypatch.setattr(sys, "orig_argv", [*words, "--config=a.yaml"])  # which may have a max_steps of its own
    assert engine.command_again(1, to_the_end=True) == expected.replace("--resume", "--config=a.yaml --resume "
                                                                        "--max_steps 0")


def test_log_is_silent_on_other_processes(tmp_path, capsys):
    run = make_run(tmp_path, log_every=1)
    run.is_main = False
    run.log(0, 8, 1.0, 0.1, 1.0)
    assert not (tmp_path / "log.jsonl").exists() and capsys.readouterr().out == ""


def test_due_and_save_due(tmp_path):
    run = make_run(tmp_path, save_epochs=20, save_minutes=1)
    assert [step + 1 for step in range(10) if run.due(step, 3 / 5)] == [3, 6, 9, 10]
    assert [step + 1 for step in range(10) if run.due(step, 2.6 / 5)] == [3, 6, 9, 10]
    assert all(run.due(step, 0.02) for step in range(10))
    assert [step + 1 for step in range(10) if run.due(step, 0)] == [10]
    run.save_time = time.monotonic()
    assert not run.save_due(3)
    run.save_time -= 61
    assert run.save_due(3)
    run.save_time = time.monotonic()
    run.stop_requested = True
    assert run.save_due(3)


def test_probes_and_pictures_are_due(tmp_path):
    run = make_run(tmp_path, probe_epochs=1, picture_epochs=0)
    assert [step + 1 for step in range(10) if run.probe_due(step)] == [5, 10]
    assert [step + 1 for step in range(10) if run.picture_due(step)] == [10]
    assert not any(make_run(tmp_path).probe_due(step) for step in range(10))
    run = make_run(tmp_path, picture_epochs=1)
    assert [step + 1 for step in range(10) if run.picture_due(step)] == [1, 5, 10]
    run = make_run(tmp_path, picture_epochs=9, epochs=2)
    assert [step + 1 for step in range(10) if run.picture_due(step)] == [10]


def test_statistics_of_one_process(tmp_path):
    run = make_run(tmp_path)
    assert run.all_reduce_stats(0, 0.1, torch.tensor(1.5), torch.tensor(2.0)) == (1.5, 2.0)
    assert run.stop_requested is False
    run.catch(15, None)
    run.all_reduce_stats(0, 0.1, torch.tensor(1.5), torch.tensor(2.0))
    assert run.stop_requested is True


@pytest.mark.parametrize("loss,norm", [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)])
def test_what_is_not_finite_stops_the_run_and_names_the_step(tmp_path, capsys, loss, norm):
    run = make_run(tmp_path)
    run.all_reduce_stats(3, 0.1, torch.tensor(1.0), torch.tensor(1.0))
    with pytest.raises(SystemExit) as stop:
        run.all_reduce_stats(1234, 0.125, torch.tensor(loss), torch.tensor(norm))
    err = capsys.readouterr().err
    assert stop.value.code == 2 and len(err.splitlines()) == 1
    assert all(word in err for word in ("1234", str(loss), str(norm), "1.250e-01"))


def test_fp16_takes_an_infinite_gradient_but_no_nan_loss(tmp_path):
    run = make_run(tmp_path)
    run.scaler = types.SimpleNamespace(is_enabled=lambda: True)
    one, infinite = torch.tensor(1.0), torch.tensor(math.inf)
    run.all_reduce_stats(0, 0.1, one, infinite)  # GradScaler skips the step and lowers its scale
    with pytest.raises(SystemExit):
        run.all_reduce_stats(0, 0.1, torch.tensor(math.nan), one)


def test_timed_counts_waiting(tmp_path):
    def slow():
        for i in range(3):
            time.sleep(0.02)
            yield i

    run = make_run(tmp_path)
    assert list(run.timed(slow())) == [0, 1, 2] and 0.06 <= run.data_wait < 1


@pytest.fixture
def mac(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.amp, "is_autocast_available", lambda kind: True)


@pytest.mark.parametrize("precision,dtype", [("auto", torch.float32), ("bf16", torch.bfloat16)])
def test_the_gpu_of_a_mac(mac, precision, dtype):
    assert engine.choose_device(small(device="mps", precision=precision)) == (torch.device("mps"), dtype)


def test_a_mac_is_asked_for(mac):
    assert engine.choose_device(small(device="auto"))[0].type != "mps"


@pytest.mark.parametrize("words,world,said", [({"precision": "fp16"}, 1, "fp16 needs a GPU of --device cuda"),
                                              ({"precision": "bf16"}, 1, "--precision bf16"),
                                              ({}, 2, "one process")])
def test_what_a_mac_cannot(mac, monkeypatch, words, world, said):
    monkeypatch.setattr(torch.amp, "is_autocast_available", lambda kind: False)
    monkeypatch.setenv("WORLD_SIZE", str(world))
    with pytest.raises(ValueError, match=said):
        engine.choose_device(small(device="mps", **words))


def test_mps_elsewhere_is_refused():
    with pytest.raises(ValueError, match="--device mps, but torch sees no GPU of a Mac"):
        engine.choose_device(small(device="mps"))


@pytest.mark.parametrize("batch,micro,world,fits", [(8, 4, 1, 0), (8, 4, 2, 0), (8, 4, 3, None), (10, 4, 1, 2),
                                                    (12, 4, 2, 3), (8, 100, 2, 0)])
def test_batches_that_do_not_divide(batch, micro, world, fits):
    """0: they divide; None: by no micro-batch; else the one that the message names."""
    cfg = small(batch_size=batch, micro_batch=micro)
    if fits == 0:
        return engine.check_batch(cfg, world)
    with pytest.raises(ValueError) as error:
        engine.check_batch(cfg, world)
    named = re.findall(r"--micro_batch (\d+) does", str(error.value))
    assert named[-1:] == ([str(fits)] if fits else []) and "--batch_size" in str(error.value)
