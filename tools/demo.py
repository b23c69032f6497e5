"""What pre-training buys, measured: `make demo`, or `make demo SEEDS="0 1 2"` for more than one seed.

For every seed it runs the commands that it prints, those that you would type: mae.py on the 20,000 images of `shapes`
without their labels, then finetune.py from that encoder and from random weights, with 200 and with 500 labels. Scratch
also gets four times the budget. Architecture, labels, augmentation and optimizer are equal. Every arm has the learning
rate that is its best of four on validation images (results/sweep_vit.json). Accuracies are on 2,000 test images.
"""

import argparse
import math
import statistics
import time
from pathlib import Path

from common import config, figures
from tools import runner

# The recipe. Options behind the file change learning rate, epochs or augmentation, as in "... --base_lr 2e-3".
PRETRAIN = "mae.py --config configs/tiny.yaml"
FINETUNE = "finetune.py --config configs/finetune_tiny.yaml"
SCRATCH = "--model vit_tiny --patch_size 8"  # as in configs/tiny.yaml
BUDGET = {200: 20, 500: 8}  # labels: epochs that make 120 steps of 32 images
ARMS = {"pre-trained": (1, 2e-3), "scratch": (1, 4e-3), "scratch, 4x budget": (4, 2e-3)}  # times the budget, base_lr

TITLE = "top-1, per cent of 2,000 test images"
COLOURS = ["#d1495b", "#c9d6df", "#52687a"]


def slug(name):
    return name.replace(",", "").replace(" ", "_")


def tuning(command, encoder, *words, out, seed, split="test", again="--resume"):
    """The job that trains with labels and measures on images of `split`: from the encoder of another job, or, with
    None, from random weights."""
    start = ["--init", encoder.out / "encoder.pt"] if encoder else SCRATCH.split()
    words = [*start, *words, "--split", split, "--seed", seed]
    return runner.training(command, *words, out=out, needs=[encoder] if encoder else [], again=again)


def cells_of_seed(folder, seed):
    """Every number of one seed. The longest job, pre-training, begins first; scratch runs beside it."""
    again = "--overwrite"  # the demo measures its own time, too
    pretraining = runner.training(PRETRAIN, "--seed", seed, out=folder / "mae", again=again)
    cells = []
    for arm, (times, rate) in ARMS.items():
        encoder = pretraining if arm == "pre-trained" else None
        for labels, epochs in BUDGET.items():
            words = ["--labels", labels, "--epochs", times * epochs, "--base_lr", rate]
            job = tuning(FINETUNE, encoder, *words, out=folder / f"{slug(arm)}_{labels}", seed=seed, again=again)
            cells.append(runner.Cell(TITLE, arm, f"{labels} labels", seed, job))
    return cells


def bars(axis, rows):
    """{row: {column: values}} as a bar for every row in a group for every column: means, and a dot for each seed."""
    columns = list(next(iter(rows.values())))
    width = 0.8 / len(rows)
    highest = max(statistics.mean(values) for cells in rows.values() for values in cells.values())
    decimals = max(0, 2 - math.floor(math.log10(highest)))  # three digits of the highest, and as many of the others
    for i, (row, cells) in enumerate(rows.items()):
        for group, column in enumerate(columns):
            x, values = group + width * (i - (len(rows) - 1) / 2), cells[column]
            mean = statistics.mean(values)
            axis.bar(x, mean, 0.9 * width, color=COLOURS[i], label=row if group == 0 else None)
            axis.plot([x] * len(values), values, "k.", ms=3)
            above = {"xytext": (0, 3), "textcoords": "offset points", "ha": "center", "fontsize": 8}
            axis.annotate(f"{mean:.{decimals}f}", (x, max(values)), **above)
    axis.set_xticks(range(len(columns)), columns)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8, ncols=2, loc="upper left")


def draw(path, rows, logs):
    """Left the loss of pre-training, of {seed: lines of its log}; right the accuracy of every arm."""
    figure, save = figures.new_figure(9.6, 3.6)
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.5])
    for seed, lines in logs.items():
        left.plot([line["step"] for line in lines], [line["loss"] for line in lines], lw=1.2, label=f"seed {seed}")
    left.set(title="MAE pre-training", xlabel="step", ylabel="loss on hidden patches", ylim=(0, None))
    left.legend(frameon=False, fontsize=8)
    left.spines[["top", "right"]].set_visible(False)
    bars(right, rows)
    right.set(title="Top-1 on test images after fine-tuning", ylabel="per cent", ylim=(0, 100))
    save(path)


def seed_list(text):
    return [int(seed) for seed in text.split()]


def add_options(parser, out):
    """The options that all measurements share."""
    parser.add_argument("--seeds", default="0", type=seed_list, help='such as "0 1 2"')
    parser.add_argument("--out", default=out, type=Path, help="folder of the runs")
    parser.add_argument("--json", type=Path, help="file of the numbers; in --out if not given")
    parser.add_argument("--jobs", default=runner.CORES, type=int, help="runs at a time, one thread each")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, Path("runs/demo"))
    args = parser.parse_args(argv)
    path, picture = args.json or args.out / "demo.json", args.out / "demo.png"

    begin = time.monotonic()
    cells = [cell for seed in args.seeds for cell in cells_of_seed(args.out / f"seed{seed}", seed)]
    record = runner.measure("demo", cells, path, args.jobs)
    logs = {seed: runner.log_of(args.out / f"seed{seed}" / "mae") for seed in args.seeds}
    seconds = round(time.monotonic() - begin)
    runner.write(path, {**record, "seconds": seconds, "pretraining_log": logs})

    rows = record["results"][TITLE]
    draw(picture, rows, logs)
    reconstruction = max((args.out / f"seed{args.seeds[-1]}" / "mae" / "pictures").glob("*.png"))
    print(f"\nAfter {seconds} s:\n\n{runner.markdown(TITLE, runner.by_seed(rows, args.seeds))}\n")
    config.print_once(f"numbers          {path}\nfigure           {picture}\nreconstructions  {reconstruction}")


if __name__ == "__main__":
    main()
