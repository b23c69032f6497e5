"""Loggers beside log.jsonl. What each needs is imported where a run asks for it: training needs none of it."""

import csv
import importlib.util
import json
import numbers
import secrets

from common import folder

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb"}  # logger: what it needs


def require(kind):
    """ValueError if the logger `kind` (none, tensorboard, wandb, csv) needs a package that is not installed."""
    package = PACKAGES.get(kind)
    if package and not importlib.util.find_spec(package):
        raise ValueError(f"--logger {kind} needs a package: pip install {package}")


def open_logger(kind, out, step, options):
    """(write, close) of the logger `kind`, for a run in the folder `out` that goes on from `step`, in the same log, or
    begins at 0. `write` takes a line of log.jsonl, {"step": n, name: value}, and keeps its numbers. `options`: all of
    the run."""
    if kind == "tensorboard":
        return open_tensorboard(out, step)
    if kind == "wandb":
        return open_wandb(out, step, options)
    if kind == "csv":
        return open_csv(out)
    return (lambda line: None), (lambda: None)


def values(line):
    """{name: number} of a line, without its step."""
    return {name: value for name, value in line.items() if name != "step" and isinstance(value, numbers.Real)}


def open_tensorboard(out, step):
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)  # hides what a killed run wrote beyond

    def write(line):
        for name, value in values(line).items():
            writer.add_scalar(name, value, line["step"])
        writer.flush()

    return write, writer.close


def open_wandb(out, step, options):
    """WANDB_PROJECT, WANDB_MODE and others of its environment variables hold. A step that is written twice, because a
    run was killed after its checkpoint, stays as it was written first."""
    import wandb

    path = out / "wandb_id.txt"
    if not (step and path.exists()):
        folder.write_text(path, secrets.token_hex(4))
    run = wandb.init(id=path.read_text(), resume="allow", dir=str(out), name=str(out), config=options)
    return (lambda line: run.log(values(line), step=line["step"])), run.finish


def open_csv(out):
    """log.csv, a row for each number: step, name, value. Lines of log.jsonl have different names, so a column for each
    would have holes. It begins with what log.jsonl holds: nothing beyond the checkpoint of a resumed run."""
    path, lines = out / "log.csv", out / "log.jsonl"
    before = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    folder.write_text(path, "step,name,value\n")

    def write(line):
        with open(path, "a", newline="", opener=folder.no_links) as file:
            csv.writer(file, lineterminator="\n").writerows(
                (line["step"], name, value) for name, value in values(line).items())

    for line in before:
        write(line)
    return write, (lambda: None)
