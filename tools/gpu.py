"""The hour in which there is a GPU: all that a CPU cannot tell, in eight minutes.

    python -m tools.gpu --minutes 8
    python -m tools.gpu --minutes 8 --only cifar --cifar cifar10.zip     what is missing, into the same file
    python -m tools.gpu --dry                                            the same plan on a CPU, in tiny sizes

It needs no network. Every step runs in a process of its own with a time limit of its own, so that one that crashes or
hangs loses nothing but itself. Numbers are in results/gpu_NAME.json as soon as they are known. --only takes groups and
steps, comma-separated; --cifar a zip of images in train/CLASS/ and val/CLASS/.
"""

import argparse
import contextlib
import dataclasses
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
import types
from collections.abc import Callable
from multiprocessing import connection
from pathlib import Path

import torch

from common import config
from tools import gpu_checks, gpu_speed, gpu_table, runner

SPEED = [  # what is measured eager and compiled: the yardsticks first, what takes long to compile last
    "vit_b_16 224", "timm:vit_base_patch16_224 224", "MAE ViT-B", "fine-tuning ViT-B", "UM-MAE Swin-T",
    "SimMIM Swin-T as in UM-MAE", "UM-MAE PVT-S", "SimMIM PVT-S as in UM-MAE", "FastMIM ViT-B", "SimMIM ViT-B",
    "FastMIM Swin-B", "SimMIM Swin-B", "LUT ViT-B", "MAE ViT-L", "MAE ViT-L, mask tokens in encoder",
    "fine-tuning ViT-L", "MAE ViT-H"]
AT_ONCE = {"machine": 1, "smoke": 7, "faults": 4, "memory": 4, "speed": 3, "cifar": 1}  # processes on one GPU
SPARE = 3  # seconds that are kept for the end


@dataclasses.dataclass(frozen=True)
class Step:
    """A generator function of gpu_checks.py or gpu_speed.py with its arguments, and how many seconds it may take."""
    group: str
    name: str
    work: Callable
    seconds: int
    inputs: tuple = ()


def plan_of(args):
    """All steps, in order. The last one takes what is left of the time."""
    steps = [Step("machine", "machine", gpu_speed.machine, 30)]
    steps += [Step("smoke", name, gpu_checks.smoke, 90, (name,)) for name in gpu_checks.SCRIPTS]
    faults = [gpu_checks.torchrun, gpu_checks.sigterm, gpu_checks.nan, gpu_checks.out_of_memory]
    steps += [Step("faults", work.__name__, work, 60) for work in faults]
    parts = AT_ONCE["memory"]
    steps += [Step("memory", f"recipes {i + 1} of {parts}", gpu_speed.memory, 90, (i, parts)) for i in range(parts)]
    steps += [Step("speed", name, gpu_speed.speed, 120, (name,)) for name in SPEED]
    if args.cifar:
        steps.append(Step("cifar", "cifar", gpu_speed.cifar, round(60 * args.minutes)))
    wanted = [word.strip() for word in args.only.split(",")]
    return [step for step in steps if args.only == "" or step.group in wanted or step.name in wanted]


# ---------------------------------------- A step, in its own process

def run_step(step, args):
    """In a process of its own, and of its own group: what the step yields goes to OUT/found.json."""
    os.setsid()
    os.chdir(config.ROOT)
    output = open(args.out / "output.txt", "w", buffering=1)
    os.dup2(output.fileno(), 1)  # for what is not written through sys.stdout
    os.dup2(output.fileno(), 2)
    sys.stdout = sys.stderr = output
    torch.set_num_threads(1 if args.dry else 4)
    found = {}
    try:
        for part, row in step.work(args, *step.inputs):
            found[part] = row
            (args.out / "found.json").write_text(json.dumps(found))
    except Exception:
        traceback.print_exc()
        raise


def start(step, args, left):
    """The running process of a step, and when it must have ended."""
    out = args.out / re.sub(r"\W+", "_", f"{step.group} {step.name}")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    seconds = min(step.seconds, left)
    given = types.SimpleNamespace(device="cpu" if args.dry else "cuda", dry=args.dry, cifar=args.cifar, out=out,
                                  seconds=seconds)
    # A fork of a process that has touched CUDA cannot use it: on a GPU every step is a new Python.
    processes = multiprocessing.get_context("fork" if args.dry else "spawn")
    process = processes.Process(target=run_step, args=(step, given))
    process.start()
    return types.SimpleNamespace(process=process, out=out, begin=time.monotonic(), seconds=seconds)


def result_of(run, late):
    """What a step has found until it ended."""
    found = json.loads(text_of(run.out / "found.json") or "{}")
    ended = "ended"
    if late:
        ended = f"stopped after {run.seconds:.0f} s"
    elif run.process.exitcode:
        lines = text_of(run.out / "output.txt").splitlines() or ["no output"]
        ended = f"failed: {lines[-1][:300]}"
    return {"ended": ended, "seconds": round(time.monotonic() - run.begin, 1), "found": found}


def text_of(path):
    """A file without the place of the project on this machine, "" if there is none."""
    text = path.read_text() if path.exists() else ""
    return text.replace(f"{config.ROOT}{os.sep}", "")


def end(process):
    """End a process and all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


def run_all(steps, args):
    """Run steps, group after group, some of a group at once. Yields (step, its result) as soon as it has ended; a step
    for which there is no time is not run."""
    last = time.monotonic() + 60 * args.minutes - SPARE
    waiting, running = list(steps), {}
    try:
        while waiting or running:
            left = last - time.monotonic()
            while waiting and may_start(waiting[0], running, left):
                step = waiting.pop(0)
                running[step] = start(step, args, left)
            if left <= 0 and not running:
                yield from [(step, {"ended": "not run: no time", "seconds": 0, "found": {}}) for step in waiting]
                return
            connection.wait([run.process.sentinel for run in running.values()], timeout=0.5)
            for step, run in list(running.items()):
                late = time.monotonic() > run.begin + run.seconds
                if late or run.process.exitcode is not None:
                    end(run.process)
                    yield step, result_of(running.pop(step), late)
    finally:
        for run in running.values():
            end(run.process)


def may_start(step, running, left):
    """Is there time, and a place beside the steps of the same group?"""
    workers = max(1, min(AT_ONCE[step.group], runner.CORES // 2))
    return left > 0 and len(running) < workers and all(other.group == step.group for other in running)


# ---------------------------------------- Command line

def gpu_name():
    """The GPU's name by nvidia-smi, as nvidia_h200. (torch would touch CUDA.)"""
    if not shutil.which("nvidia-smi"):
        return "unknown"
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    names = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    return re.sub(r"\W+", "_", names[0].lower()) if names else "unknown"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything")
    parser.add_argument("--only", default="", help="groups and steps, comma-separated")
    parser.add_argument("--cifar", type=Path, help="zip of CIFAR-10's images; its step is left out without")
    parser.add_argument("--name", help="of the file, results/gpu_NAME.json; the GPU's")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of what steps write")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on a CPU; the file is OUT/dry.json")
    args = parser.parse_args(argv)
    args.out = args.out.resolve()
    args.cifar = args.cifar and args.cifar.resolve()
    steps = plan_of(args)
    if not steps:
        config.fail(f"--only {args.only}: no group and no step is called so; there are {', '.join(AT_ONCE)}")
    if args.cifar and not args.cifar.exists():
        config.fail(f"--cifar {args.cifar}: no such file")
    path = args.out / "dry.json" if args.dry else config.ROOT / "results" / f"gpu_{args.name or gpu_name()}.json"

    command = " ".join(["python -m tools.gpu", *(sys.argv[1:] if argv is None else argv)])
    record = json.loads(path.read_text()) if path.exists() and args.only else {"commands": [], "results": {}}
    record = runner.new_record("gpu", [*record["commands"], command], [0], results=record["results"])
    if args.dry:
        os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "4")  # some steps compile at the same time
    for step, result in run_all(steps, args):
        record["results"].setdefault(step.group, {})[step.name] = result
        runner.write(path, record)
        wrong = [part for part, row in result["found"].items() if not row["ok"]]
        notes = f"; not as it should be: {', '.join(wrong)}" if wrong else ""
        print(f"{result['seconds']:6.1f} s  {step.group}: {step.name}: {result['ended']}{notes}", flush=True)
    if not args.cifar:
        print("          cifar: left out, it needs --cifar FILE.zip")
    config.print_once(f"\n{gpu_table.table(record)}\n\nnumbers  {path}")


if __name__ == "__main__":
    main()
