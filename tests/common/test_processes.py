"""processes.py: what a run has started ends with it, and a run ends with torchrun; one looks for files, for all."""

import os
import signal
import time

import pytest
import torch
from conftest import log_of

from common import processes
from tools.trials import children, ended_within, finish, fork, start, torchrun, wait_for


@pytest.mark.parametrize("script", ["mae", "finetune"])
def test_a_run_ends_when_a_worker_is_killed(tiny, tuned, tmp_path, script):
    words = {"mae": tiny, "finetune": tuned}[script]
    process = fork(f"{script}.py", *words(out=tmp_path / "run", epochs=500, workers=2))
    wait_for(process, "step 3/")
    [run] = children(process.pid)
    workers = children(run)
    os.kill(workers[0], signal.SIGKILL)
    begin = time.monotonic()
    code, _, err = finish(process, timeout=30)
    assert code == 2, err
    assert time.monotonic() - begin < 10 and ended_within(2, workers)
    assert err.count("\n") == 1 and err.startswith("error: an image-loading process was killed"), err


@pytest.mark.parametrize("stopped", [False, True], ids=["workers", "stuck workers"])
def test_a_run_with_workers_ends_after_an_exception(tiny, tmp_path, stopped):
    """Also when they hang: here they were stopped."""
    script = f"""
import os, runpy, signal, sys, torch
sys.path.insert(0, ".")
import mae
real, calls = mae.MAE.loss, []
def loss(self, *words):
    calls.append(1)
    if len(calls) > 6:
        me = os.getpid()
        workers = open(f"/proc/{{me}}/task/{{me}}/children").read().split()
        print("workers", *workers, flush=True)
        for pid in workers if {stopped} else ():
            os.kill(int(pid), signal.SIGSTOP)
        raise ZeroDivisionError("a mistake")
    return real(self, *words)
mae.MAE.loss = loss
mae.main(sys.argv[1:])
"""
    (tmp_path / "mistake.py").write_text(script)
    process = fork(tmp_path / "mistake.py", *tiny(out=tmp_path / "run", workers=2))
    workers = next(line for line in process.stdout if line.startswith("workers"))
    begin = time.monotonic()
    code, _, err = finish(process, timeout=30)
    assert time.monotonic() - begin < 10 and code == 1 and "ZeroDivisionError: a mistake" in err
    assert len(workers.split()) == 3 and ended_within(2, map(int, workers.split()[1:]))


def test_a_save_goes_on_when_a_worker_is_killed_in_it(tiny, tmp_path):
    """The death of a worker is noticed where a batch is waited for, and not in the midst of a checkpoint."""
    script = """
import os, signal, sys, time
sys.path.insert(0, ".")
import mae
from common import checkpoint
real = checkpoint.write_temporary
def write(*words):
    me = os.getpid()
    for pid in open(f"/proc/{me}/task/{me}/children").read().split():
        os.kill(int(pid), signal.SIGKILL)
    time.sleep(0.2)
    real(*words)
checkpoint.write_temporary = write
mae.main(sys.argv[1:])
"""
    (tmp_path / "save.py").write_text(script)
    words = tiny(out=tmp_path / "run", workers=2, epochs=500, save_epochs=0.5)
    code, _, err = finish(fork(tmp_path / "save.py", *words))
    assert code == 2 and err.startswith("error: an image-loading process was killed") and err.count("\n") == 1, err
    assert torch.load(tmp_path / "run" / "last.pt")["step"] == 2


def test_ranks_end_with_a_torchrun_that_was_killed(tiny, tmp_path):
    process = start(*torchrun(2, "mae.py", *tiny(out=tmp_path / "run", epochs=500)))
    wait_for(process, "step 4/")
    ranks = children(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=30)
    assert len(ranks) == 2 and ended_within(20, ranks)
    assert torch.load(tmp_path / "run" / "last.pt")["step"] >= 4  # and have saved


def test_a_restart_of_torchrun_goes_on(tiny, tmp_path):
    """Of two attempts that share a store, none reads what the one before has left there."""
    out = tmp_path / "run"
    words = tiny(out=out, resume="true", epochs=500, save_epochs=0.5, max_steps=60)
    process = start(*torchrun(2, "--max-restarts", "2", "mae.py", *words))
    wait_for(process, "step 6/")
    os.kill(children(process.pid)[-1], signal.SIGKILL)
    code, rest, err = finish(process)
    assert code == 0, err[-2000:]
    assert "to 60 of 2000" in rest and [line["step"] for line in log_of(out)] == list(range(1, 61))


def test_one_process_does_the_work_of_all(folder, tmp_path):
    """Of two, the second finds no file itself, and both get the same list, and the same error."""
    script = f"""
import os, sys
sys.path.insert(0, ".")
import torch.distributed as dist
from common import images, processes
rank = int(os.environ["RANK"])
dist.init_process_group("gloo", rank=rank, world_size=2)
real = images.files_below
def files_below(root):
    assert rank == 0
    return real(root)
images.files_below = files_below
source = images.Folder({str(folder)!r}, "train", labelled=True)
errors = []
for error in (ValueError("no"), FileNotFoundError("nothing")):
    def refuse():
        raise error
    try:
        processes.of_main(refuse)
    except type(error) as caught:
        errors.append(str(caught))
dist.destroy_process_group()
line = f"{{len(source)}} {{hash(source.paths.tobytes()) % 1000}} {{sum(source.labels)}} {{' '.join(errors)}}"
open({str(tmp_path)!r} + f"/{{rank}}.txt", "w").write(line)
"""
    (tmp_path / "share.py").write_text(script)
    code, _, err = finish(fork(tmp_path / "share.py", world=2))
    assert code == 0, err[-2000:]
    lines = [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)]
    assert lines[0] == lines[1] and lines[0].startswith("36 ") and lines[0].endswith(" 36 no nothing")


def test_a_process_alone_does_it_itself():
    assert processes.of_main(sorted, [2, 1]) == [1, 2]
    with pytest.raises(ValueError, match="invalid literal"):
        processes.of_main(int, "x")
