"""Analyses of runs: their curves, and what is left of an encoder's worth without its last layers."""

import json
from pathlib import Path

from common.folder import read_text
from tools import runner
from tools.demo import BUDGET, FINETUNE

# ---------------------------------------- Curves of runs

CURVES = {"loss": "loss", "k-NN top-1, per cent": "knn_top1", "top-1, per cent": "top1", "mIoU, per cent": "miou",
          "depth error, metres": "rmse"}


def read_log(folder):
    """The lines of a run's log.jsonl. ValueError or OSError if it is none."""
    try:
        lines = [json.loads(line) for line in read_text(folder / "log.jsonl").splitlines()]
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{folder / 'log.jsonl'} is no log of a run: {error}") from error
    if not all(isinstance(line, dict) and "step" in line for line in lines):
        raise ValueError(f"{folder / 'log.jsonl'} is no log of a run: a line without a step")
    return lines


def numbered(runs):
    """[(name, folder)] -> {name: folder}: of one name, the second is called `name (2)`."""
    found = {}
    for name, folder in runs:
        nth, own = 1, name
        while own in found:
            nth += 1
            own = f"{name} ({nth})"
        found[own] = folder
    return found


def curves(runs):
    """What the logs of runs {name: folder} hold: {title: {run: [[step, value], ...]}}, and a table of last
    values, those of result.json where there is one. ValueError if there is nothing to draw."""
    found, table = {title: {} for title in CURVES}, {}
    for name, folder in runs.items():
        lines, result = read_log(folder), {}
        if (folder / "result.json").exists():
            result = runner.read_json(folder / "result.json")
        row = table.setdefault(name, {})
        for title, key in {**CURVES, "images per second": "images_per_s"}.items():
            points = [[line["step"], line[key]] for line in lines if key in line]
            if title in found and points:
                found[title][name] = points
            if points or key in result:
                row[title] = [result[key] if key in result else points[-1][1]]
    if not any(found.values()):
        raise ValueError(f"nothing to draw: no loss and no accuracy in {', '.join(map(str, runs.values()))}")
    return {"results": {"last value of each run": table}, "curves": found}


# ---------------------------------------- Fewer layers

DENSE = "-m tools.dense --config configs/dense_tiny.yaml"
TASKS = {  # name: (title, command, options, key in result.json)
    "classify": ("classification: top-1, per cent", FINETUNE, ["--labels", 500, "--epochs", BUDGET[500]], "top1"),
    "segment": ("segmentation: mIoU, per cent", DENSE, ["--task", "segment"], "miou"),
    "depth": ("depth: RMSE, metres (less is better)", DENSE, ["--task", "depth"], "rmse"),
    "keypoints": ("keypoints: PCK, per cent", DENSE, ["--task", "keypoints"], "pck")}


def edited(path, out, seed, drop, shuffle):
    """The job that writes OUT/encoder.pt, an encoder without its last layers, or those that are left shuffled, too."""
    words = ["-m", "tools.convert", "--seed", seed]
    words += ["--drop_layers", drop] if drop else []
    words += ["--shuffle_layers"] if shuffle else []
    return runner.Job(tuple(map(str, [*words, path, out / "encoder.pt"])), out)


def drop_cells(encoders, drops, shuffled, tasks, seeds, data, out):
    """What SECRETS does with pose and depth: fine-tune encoders {name: [path for each seed, or one for all]} without
    their last layers, and once without `shuffled` layers and with the rest drawn at random from all (0: not)."""
    cells = []
    for nth, seed in enumerate(seeds):
        for name, paths in encoders.items():
            path = paths[nth % len(paths)]
            edits = {f"{count} dropped": (count, False) for count in drops}
            if shuffled:
                edits[f"{shuffled} dropped, rest shuffled"] = (shuffled, True)
            for edit, (count, shuffle) in edits.items():
                folder = out / "runs" / f"{name}_{count}{'_shuffled' * shuffle}_seed{seed}".replace(" ", "_")
                needs, init = [], Path(path)
                if count or shuffle:
                    job = edited(path, folder, seed, count, shuffle)
                    needs, init = [job], folder / "encoder.pt"
                for task in tasks:
                    title, command, options, key = TASKS[task]
                    words = ["--init", init, *options, "--data", data, "--split", "test", "--seed", seed]
                    tuning = runner.training(command, *words, out=folder / task, needs=needs)
                    cells.append(runner.Cell(title, name, edit, seed, tuning, key))
    return cells
