"""fastmim_p.py: phases are ordinary runs of fastmim.py that hand their weights on."""

import os
import shlex
import signal

import pytest
import torch
from conftest import ROOT, equal, flags, log_of, snapshot

import fastmim
from tools import fastmim_p
from tools.trials import finish, start

OWN = {"sizes": "32,64x96", "epochs": "1,1", "batches": "4,6"}
WORDS = {"micro_batch": 2, "max_steps": 0, "model": "swin_tiny", "patch_size": 0, "mask_unit": 16, "window": 2,
         "base_lr": 0.032, "warmup_epochs": 0, "log_every": 1, "device": "cpu"}
FOLDERS = ("phase1_32px", "phase2_64x96px")
SHORT = {"epochs": "0.12,0.4"}  # one step, then two


def words_of(folder, out, **changes):
    """Words of the tool: its own options, then those of fastmim.py."""
    own = {**OWN, "out": out, **{name: value for name, value in changes.items() if name in OWN}}
    others = {name: value for name, value in changes.items() if name not in OWN}
    behind = {"config": ROOT / "configs" / "fastmim_tiny.yaml", "data": folder, **WORDS, **others}
    return [*flags(**own), "--", *flags(**behind)]


@pytest.fixture
def run(folder, call, tmp_path, monkeypatch):
    """`run(name, **changes)`: two phases on a few images, in this process, in OUT = tmp_path / name."""
    def in_this_process(command):
        assert command[1].endswith("fastmim.py")
        try:
            return fastmim.main(command[2:]) and 0  # a process does not say that a signal came in its last step
        except SystemExit as stop:
            return stop.code

    monkeypatch.setattr(fastmim_p, "run", in_this_process)
    return lambda name, *own, **changes: call(fastmim_p.main, [*own, *words_of(folder, tmp_path / name, **changes)])


def test_phases_are_runs_that_hand_their_weights_on(run, folder, tmp_path):
    """36 images: 9 steps of 4, then 6 of 6. Stopped, moved and resumed it ends bit-identical, without what the phase
    that had ended left; in two processes each, they take the same steps."""
    words = words_of(folder, tmp_path / "two", max_steps=None, micro_batch=1)
    two = start("-m", "tools.fastmim_p", "--nproc-per-node", 2, *words)
    done = run("one")
    assert done.code == 0 and done.err == "", done.err
    first, second = (log_of(tmp_path / "one" / name) for name in FOLDERS)
    assert (len(first), len(second)) == (9, 6)
    assert second[0]["lr"] == pytest.approx(1.5 * first[0]["lr"]) and first[0]["lr"] > 0  # the batch grew from 4 to 6
    small, large = (torch.load(tmp_path / "one" / name / "encoder.pt") for name in FOLDERS)
    assert [saved["arch"]["options"]["window"] for saved in (small, large)] == [2, 4]
    assert "weights start from" in done.out and "2x2 to 4x4" in done.out

    real = fastmim_p.run
    def stopped_in_the_second(command):
        return real([*command, "--max_steps", "2"]) or 143 if FOLDERS[1] in str(command) else real(command)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fastmim_p, "run", stopped_in_the_second)
        done = run("parts")
        assert done.code == 143 and "stopped in phase 2 of 2; --resume goes on" in done.out
    assert len(log_of(tmp_path / "parts" / FOLDERS[1])) == 2
    (tmp_path / "parts").rename(tmp_path / "moved")
    for path in (tmp_path / "moved" / FOLDERS[0]).glob("*last.pt"):  # it has ended, and is not read again
        path.write_bytes(b"damaged")
    done = run("moved", "--resume")
    assert done.code == 0 and done.err == "" and "phase 1 of 2" not in done.out, done.err
    one, moved = (torch.load(tmp_path / out / FOLDERS[1] / "last.pt") for out in ("one", "moved"))
    assert equal(one["model"], moved["model"]) and equal(one["optimizer"], moved["optimizer"])
    assert equal(*(torch.load(tmp_path / out / FOLDERS[1] / "encoder.pt")["model"] for out in ("one", "moved")))

    code, out, err = finish(two, timeout=300)
    assert code == 0 and out.count("torch.distributed.run") == 2, err[-2000:]
    for name in FOLDERS:
        one, two = (log_of(tmp_path / out / name) for out in ("one", "two"))
        for key in ("loss", "grad_norm"):
            assert [line[key] for line in two] == pytest.approx([line[key] for line in one], rel=1e-3)


def test_the_printed_commands_are_the_phases(run, call, tmp_path):
    """Run by hand they make the same runs; seeds differ, the window grows, the first one starts from nothing."""
    done = run("one", **SHORT)
    commands = [shlex.split(line.partition(": ")[2]) for line in done.out.splitlines() if line.startswith("phase ")]
    assert [command[:2] for command in commands] == 2 * [["python", os.path.relpath(ROOT / "fastmim.py")]]
    configs = [fastmim.config.parse(fastmim.Config, "", command[2:]) for command in commands]
    assert [cfg.window for cfg in configs] == [2, 4] and [cfg.epochs for cfg in configs] == [0.12, 0.4]
    assert [cfg.batch_size for cfg in configs] == [4, 6] and [cfg.img_size for cfg in configs] == [(32, 32), (64, 96)]
    assert [cfg.seed for cfg in configs] == [fastmim.randomness.seed_of(0, "phase", i) for i in range(2)]
    assert configs[0].init == "none" and configs[1].init == str(tmp_path / "one" / FOLDERS[0] / "last.pt")
    (tmp_path / "one").rename(tmp_path / "kept")
    for command in commands:
        assert call(fastmim.main, command[2:]).code == 0
    assert equal(*(torch.load(tmp_path / out / FOLDERS[1] / "last.pt") for out in ("one", "kept")))


@pytest.mark.parametrize("changes,said", [
    ({"init": f"{FOLDERS[1]}/last.pt"}, "phase1_32px: --resume"), ({}, "phase1_32px: --resume"),
    ({"sizes": "64,64x96"}, "phase2_64x96px: --resume"), ({"overwrite": "true"}, "--overwrite knows one phase")],
    ids=["init", "again", "another first phase", "overwrite"])
def test_phases_replace_nothing(changes, said, run, tmp_path):
    """Else a run that is stopped in its first phase would go on with the second of the run it replaced."""
    assert run("run", **SHORT).code == 0
    before = snapshot(tmp_path / "run")
    done = run("run", **{**SHORT, **changes})
    assert done.code == 2 and said in done.err and done.err.count("\n") == 1, done.err
    assert snapshot(tmp_path / "run") == before


def test_phases_resume_from_a_predecessor_and_without_config_yaml(run, call, tmp_path):
    """A kill between two renames leaves previous.last.pt alone; one of the machine may leave half a config.yaml. The
    config.yaml of a phase makes the same run again."""
    assert run("run", **SHORT).code == 0
    assert run("parts", **SHORT, max_steps=1).code == 0
    (tmp_path / "parts").rename(tmp_path / "moved")
    phase = tmp_path / "moved" / FOLDERS[1]
    (phase / "last.pt").rename(phase / "previous.last.pt")
    (phase / "config.yaml").write_text("half: [")
    done = run("moved", "--resume", **SHORT)
    assert done.code == 0 and done.err == "", done.err
    assert equal(*(torch.load(tmp_path / out / FOLDERS[1] / "last.pt")["model"] for out in ("run", "moved")))
    recipe = tmp_path / "run" / FOLDERS[0] / "config.yaml"
    assert call(fastmim.main, flags(config=recipe, out=tmp_path / "again", device="cpu")).code == 0
    assert equal(*(torch.load(path / "last.pt")["model"] for path in (recipe.parent, tmp_path / "again")))


def test_a_signal_stops_the_phase_it_comes_in(folder, tmp_path):
    """Passed on once to the process that trains; --resume goes on, and ends as if nothing had happened."""
    words = ["-m", "tools.fastmim_p", *words_of(folder, tmp_path / "run", epochs="30,0.4", log_every=1)]
    process = start(*words)
    for line in process.stdout:
        if line.startswith("step 3/"):
            break
    process.send_signal(signal.SIGTERM)
    code, out, err = finish(process)
    assert code == 128 + signal.SIGTERM and "stopped in phase 1 of 2; --resume goes on" in out, err
    stopped = torch.load(tmp_path / "run" / FOLDERS[0] / "last.pt")["step"]
    assert 3 <= stopped < 270 and not (tmp_path / "run" / FOLDERS[1]).exists()


def test_a_signal_in_the_last_step_ends_the_command_there(tmp_path):
    """What it runs ends as planned, with exit code 0, and the tool with the signal's."""
    script = tmp_path / "stub.py"
    script.write_text("import signal, os, sys, time\n"
                      "signal.signal(signal.SIGINT, lambda *_: sys.exit(int(sys.argv[1])))\n"
                      "os.kill(os.getppid(), signal.SIGINT)\ntime.sleep(60)\n")
    before = signal.getsignal(signal.SIGINT)
    assert fastmim_p.run([os.sys.executable, str(script), "0"]) == 128 + signal.SIGINT
    assert fastmim_p.run([os.sys.executable, str(script), "7"]) == 7
    assert fastmim_p.run([os.sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]) == 128 + 9
    assert signal.getsignal(signal.SIGINT) is before


def test_what_fails_stops_the_phases(run, tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(fastmim_p, "run", lambda command: ran.append(command) or 2)
    done = run("run", **SHORT)
    assert done.code == 2 and len(ran) == 1 and "stopped in phase 1 of 2" in done.out


def test_plan_plans_every_phase(run, tmp_path):
    done = run("run", "--plan", "--nproc-per-node", 2)
    assert done.code == 0 and done.err == "" and done.out.count("trained parameters") == 2
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("changes,said", [
    ({"epochs": "1"}, "one number for every phase"), ({"sizes": "32,x"}, "--sizes"),
    ({"epochs": "1,many"}, "--epochs"), ({"batches": "4,5"}, "--micro_batch 2 does not divide"),
    ({"batches": "4,64"}, "36 images make no batch of 64"), ({"epochs": "1,0.01"}, "phase 2 of 2 makes no"),
    ({"sizes": "0,32"}, "no such images"), ({"lr_batch": 0}, "--lr_batch must be 1 or more"),
    ({"sizes": "32,40"}, "40x40 must be divisible"), ({"model": "swim"}, "unknown --model"),
    ({"phase_sizes": "32"}, "unknown option")], ids=lambda value: str(value)[:30])
def test_phases_that_do_not_fit_are_refused_before_the_first(changes, said, run, tmp_path):
    done = run("run", **changes)
    assert done.code == 2 and said in done.err and done.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_it_is_not_for_torchrun_and_a_bare_call_is_short(run, call, monkeypatch):
    done = call(fastmim_p.main, [])
    assert done.code == 2 and done.err.count("\n") <= 2
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = run("run")
    assert done.code == 2 and "--nproc-per-node" in done.err and done.err.count("\n") == 1
