"""What pre-training buys at every pixel, measured: `python -m tools.compare_dense` makes the numbers in the README.

Three encoders of one architecture: MAE's, after 8 epochs of `shapes` without labels; one that was trained to tell the
ten classes apart, from all 20,000 labels, in as many passes; and one with random weights. From each, dense.py segments
and measures depth with a few labelled images, the encoder frozen and fine-tuned. A seed decides which images these are,
the start of the head and the order; encoders are trained once. For fine-tuning, each arm has the better of two settings
on validation images, at either task; all else is equal. Scores are of 2,000 test images.

A run that --out holds already is taken as it is, so that the command can be stopped and given again.
"""

import argparse
import contextlib
import json
import statistics
from pathlib import Path

import finetune
import mae
from common import figures
from tools import dense

ARMS = {"MAE": "mae", "supervised": "supervised", "random": None}  # arm: folder of the encoder
EVENLY, GENTLY = ("--base_lr", 0.004, "--layer_decay", 1), ("--base_lr", 0.016, "--layer_decay", 0.5)
FROZEN = dict.fromkeys(ARMS, ("--freeze", "--base_lr", 0.016))
MODES = {  # tried: results/dense_tuning.json
    "segment": {"frozen": FROZEN, "fine-tuned": {"MAE": EVENLY, "supervised": GENTLY, "random": EVENLY}},
    "depth": {"frozen": FROZEN, "fine-tuned": {"MAE": GENTLY, "supervised": EVENLY, "random": GENTLY}}}
TASKS = {"segment": ("miou", "mIoU, per cent (more is better)"),  # task: score, its name
         "depth": ("rmse", "RMSE, metres (less is better)")}
SUPERVISED = ("--config configs/finetune_tiny.yaml --model vit_tiny --patch_size 8 --labels 0 --head_start random "
              "--epochs 8 --warmup_epochs 0.64 --save_epochs 1 --log_every 100")


def run(script, out, *words):
    """Run one command in this process unless it was run to its end before; what it prints goes to OUT/output.txt."""
    words = [*map(str, words), "--out", str(out), "--resume"]
    if not (out / "done").exists():
        print(f"  python {script.__name__}.py {' '.join(words)}", flush=True)
        out.mkdir(parents=True, exist_ok=True)
        with open(out / "output.txt", "w") as file, contextlib.redirect_stdout(file):
            script.main(words)
        (out / "done").touch()
    return out


def score(folder, task, mode, arm, seed):
    """One number of the table."""
    start = ["--init", folder / ARMS[arm] / "encoder.pt"] if ARMS[arm] else ["--model", "vit_tiny", "--patch_size", 8]
    out = run(dense, folder / f"{task}_{mode}_{arm}_{seed}", "--config", "configs/dense_tiny.yaml", "--task", task,
              *start, *MODES[task][mode][arm], "--seed", seed, "--split", "test")
    return json.loads((out / "result.json").read_text())[TASKS[task][0]]


def table(results):
    """A markdown table of {task: {mode: {arm: [a score for each seed]}}}: the mean, and the smallest and largest."""
    lines = ["| | | " + " | ".join(ARMS) + " |", "|---|---|" + "---|" * len(ARMS)]
    for task, modes in results.items():
        for mode, arms in modes.items():
            cells = [f"{statistics.mean(v):.2f}" + f" ({min(v):.2f} to {max(v):.2f})" * (len(v) > 1)
                     for v in arms.values()]
            lines.append(f"| {TASKS[task][1]} | {mode} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/dense"))
    words = parser.parse_args()
    run(mae, words.out / "mae", "--config", "configs/tiny.yaml", "--picture_epochs", 1000)
    run(finetune, words.out / "supervised", *SUPERVISED.split())
    results = {task: {mode: {arm: [score(words.out, task, mode, arm, seed) for seed in words.seeds] for arm in ARMS}
                      for mode in MODES[task]} for task in TASKS}
    print(f"\n{table(results)}\n")
    top1 = json.loads((words.out / "supervised" / "result.json").read_text())["top1"]
    record = {"scores": results, "top1_of_the_supervised_encoder": top1}
    Path("results/dense.json").write_text(json.dumps(record, indent=1) + "\n")
    figures.dense("results/dense.png", results, {task: name for task, (_, name) in TASKS.items()})


if __name__ == "__main__":
    main()
