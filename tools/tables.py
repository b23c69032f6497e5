"""Every table of numbers: measured, or printed from a file under results/.

    python -m tools.tables learns --seeds "0 1 2"            does every method beat random weights, on every backbone?
    python -m tools.tables protocols --cifar10_mini DIR      every method in every protocol of fine-tuning
    python -m tools.tables dense --seeds "0 1 2"             segmentation and depth: MAE, supervised, random weights
    python -m tools.tables print results/learns.json         the tables of a file

Numbers go to a file in --out, or to --json. A measurement that was stopped goes on when its command is given again. All
images have 64 px; scores are of 2,000 test images of `shapes`, unless a table says something else.
"""

import argparse
import json
from pathlib import Path

from common import figures
from common.config import user_errors
from tools import bench, runner
from tools.demo import BUDGET, FINETUNE, TITLE, add_options, bars, log_of, slug, tuning

LEARNS = {  # name: command of its pre-training
    "MAE ViT": "mae.py --config configs/tiny.yaml",
    "SimMIM ViT": "simmim.py --config configs/simmim_tiny.yaml --model vit_tiny --patch_size 8",
    "SimMIM Swin": "simmim.py --config configs/simmim_tiny.yaml",
    "UM-MAE ViT": "um_mae.py --config configs/um_mae_tiny.yaml --model vit_tiny --patch_size 8 --base_lr 0.016",
    "UM-MAE Swin": "um_mae.py --config configs/um_mae_tiny.yaml",
    "UM-MAE PVT": "um_mae.py --config configs/um_mae_tiny.yaml --model pvt_tiny --base_lr 0.016",
    "FastMIM ViT": "fastmim.py --config configs/fastmim_tiny.yaml",
    "FastMIM Swin":
        "fastmim.py --config configs/fastmim_tiny.yaml --model swin_tiny --patch_size 0 --mask_unit 8 --base_lr 0.008",
    "FastMIM PVTv2": "fastmim.py --config configs/fastmim_tiny.yaml --model pvtv2_tiny --patch_size 0 --mask_unit 8",
    "FastMIM ResNet-18":
        "fastmim.py --config configs/fastmim_tiny.yaml --model torchvision:resnet18 --patch_size 0 --mask_unit 8",
    "LUT ViT": "lut.py --config configs/lut_tiny.yaml",
    "LUT ViT without context": "lut.py --config configs/lut_tiny.yaml --context_weight 0 --one_directional true"}
TESTS = {  # name: options of its fine-tuning
    "200 labels": ["--labels", 200, "--epochs", BUDGET[200]],
    "500 labels": ["--labels", 500, "--epochs", BUDGET[500]],
    # The head starts as the logistic regression on frozen features, and the only step has a learning rate of 0.
    "linear, 500 labels": ["--labels", 500, "--epochs", BUDGET[500], "--mode", "linear", "--max_steps", 1]}
# Random weights: those that pre-training started from. The first step has a learning rate of 0.
STARTS = {"pre-trained": [], "scratch": ["--max_steps", 1]}  # arm: further options of its pre-training

METHODS = ["MAE", "SimMIM", "UM-MAE", "FastMIM", "LUT", "random weights"]
LINEAR = "--mode linear --head_start random --shift 0 --epochs 100 --warmup_epochs 10"
PROTOCOLS = {  # name: options of its fine-tuning, in the order of the table
    "k-NN": "--mode knn",
    # The better of two learning rates for each optimizer, on validation images of `shapes`.
    "linear, LARS": LINEAR + " --base_lr 128",
    "linear, SGD": LINEAR + " --optimizer sgd --base_lr 8",
    "half a block": "--train_blocks 0.5",
    "one block of four": "--train_blocks 1",
    "two blocks": "--train_blocks 2",
    "all": "",
    "all, after the other data": "",
    "all, averaged": "--ema 0.95",
    "all, one block dropped": "",
    "all, two blocks dropped": "",
    "all, two dropped and two shuffled": ""}
EDITS = {  # protocol: options of tools.convert, which edits the encoder before it is fine-tuned
    "all, one block dropped": "--drop_layers 1",
    "all, two blocks dropped": "--drop_layers 2",
    "all, two dropped and two shuffled": "--drop_layers 2 --shuffle_layers"}
OF_RANDOM = ["k-NN", "linear, LARS", "linear, SGD", "all", "all, averaged"]  # the others change what was learned

DENSE = "-m tools.dense --config configs/dense_tiny.yaml"
DENSE_PRETRAIN = "mae.py --config configs/tiny.yaml --picture_epochs 1000"
SUPERVISED = ("finetune.py --config configs/finetune_tiny.yaml --model vit_tiny --patch_size 8 --labels 0 "
              "--head_start random --epochs 8 --warmup_epochs 0.64 --save_epochs 1 --log_every 100")
FROZEN = "--freeze --base_lr 0.016"
EVENLY = "--base_lr 0.004 --layer_decay 1"
GENTLY = "--base_lr 0.016 --layer_decay 0.5"
FINE_TUNED = {  # task: {encoder: the better of EVENLY and GENTLY on validation images, results/dense_tuning.json}
    "segment": {"MAE": EVENLY, "supervised": GENTLY, "random": EVENLY},
    "depth": {"MAE": GENTLY, "supervised": EVENLY, "random": GENTLY}}
SUPERVISED_TITLE = "top-1, per cent of validation images"
SCORES = {"segment": ("miou", "segmentation: mIoU, per cent (more is better)"),  # task: score, title
          "depth": ("rmse", "depth: RMSE, metres (less is better)")}


# ---------------------------------------- What is measured: lists of cells

def pretraining(folder, name, epochs, seed, *more):
    """The job of a method of LEARNS: 625 steps of 32 images an epoch, where the recipes have 4 or 8 epochs."""
    length = ["--epochs", epochs, "--warmup_epochs", round(0.08 * epochs, 2), "--picture_epochs", 2]
    return runner.training(LEARNS[name], *length, "--seed", seed, *more, out=folder)


def edited(encoder, options, out, seed):
    """The job that writes an edited copy of another job's encoder.pt."""
    words = ["-m", "tools.convert", *options.split(), "--seed", seed, encoder.out / "encoder.pt", out / "encoder.pt"]
    return runner.Job(tuple(map(str, words)), out, (encoder,))


def learns_folder(args, name, seed):
    return args.out / slug(name) / f"{args.epochs}_epochs" / f"seed{seed}"


def learns(args):
    """Every method and backbone against the same network from random weights: the same labels, the same budget."""
    cells = []
    for seed in args.seeds:
        for name in args.methods:
            folder = learns_folder(args, name, seed)
            for test, words in TESTS.items():
                for arm, more in STARTS.items():
                    encoder = pretraining(folder / arm, name, args.epochs, seed, *more)
                    job = tuning(FINETUNE, encoder, *words, out=folder / slug(f"{arm} {test}"), seed=seed)
                    cells.append(runner.Cell(TITLE, name, f"{test}: {arm}", seed, job))
    return cells


def protocols(args):
    """The small ViT of every method, after two epochs of `shapes`, in every protocol: with 500 labels of `shapes`, and
    of DIR, which none has seen (4,000 and 1,000 images of CIFAR-10 in DIR/train/CLASS/ and DIR/val/CLASS/)."""
    sets = {"shapes": "shapes", "cifar10_mini": args.cifar10_mini}
    other = {"shapes": "cifar10_mini", "cifar10_mini": "shapes"}
    cells, jobs = [], {}
    for seed in args.seeds:
        for method in METHODS:
            folder, is_random = args.out / slug(method) / f"seed{seed}", method == "random weights"
            for protocol in OF_RANDOM if is_random else PROTOCOLS:
                for name, data in sets.items():
                    encoder = None
                    if protocol == "all, after the other data":
                        encoder = jobs[seed, method, "all", other[name]]
                    elif not is_random:
                        encoder = pretraining(folder / "pre-trained", f"{method} ViT", 2, seed)
                    if protocol in EDITS:
                        encoder = edited(encoder, EDITS[protocol], folder / slug(f"{protocol} encoder"), seed)
                    words = ["--data", data, "--labels", 500, "--epochs", BUDGET[500], *PROTOCOLS[protocol].split()]
                    job = tuning(FINETUNE, encoder, *words, out=folder / slug(f"{name} {protocol}"), seed=seed)
                    jobs[seed, method, protocol, name] = job
                    cells.append(runner.Cell(name, protocol, method, seed, job))
    return cells


def dense(args):
    """What is known about every pixel: MAE without labels, an encoder that was trained on all 20,000 class labels in as
    many passes, and random weights, each frozen and fine-tuned with 200 labelled images. Encoders are trained once; a
    seed decides which images have labels, the start of the head and the order."""
    mae = runner.training(DENSE_PRETRAIN, out=args.out / "mae")
    supervised = runner.training(SUPERVISED, out=args.out / "supervised")
    cells = [runner.Cell(SUPERVISED_TITLE, "supervised", "20,000 labels", args.seeds[0], supervised)]
    for seed in args.seeds:
        for task, (score, title) in SCORES.items():
            for name, encoder in {"MAE": mae, "supervised": supervised, "random": None}.items():
                for mode, words in {"frozen": FROZEN, "fine-tuned": FINE_TUNED[task][name]}.items():
                    out = args.out / slug(f"{task} {mode} {name} {seed}")
                    job = tuning(DENSE, encoder, "--task", task, *words.split(), out=out, seed=seed)
                    cells.append(runner.Cell(title, name, mode, seed, job, key=score))
    return cells


def ends_of_log(args, name, seed):
    lines = log_of(learns_folder(args, name, seed) / "pre-trained")
    return [lines[0], lines[-1]]


def draw_dense(path, results):
    """A panel for each task."""
    figure, save = figures.new_figure(9.6, 3.4)
    for axis, (_, title) in zip(figure.subplots(1, len(SCORES)), SCORES.values(), strict=True):
        bars(axis, results[title])
        task, _, score = title.partition(": ")
        axis.set(title=task, ylabel=score)
        axis.margins(y=0.3)
    save(path)


# ---------------------------------------- Command line

def as_markdown(path):
    """The tables of a file that a measurement wrote."""
    record = json.loads(path.read_text())
    if isinstance(record["results"], list):  # of pairs
        return bench.table(record)
    return "\n\n".join(runner.markdown(title, rows) for title, rows in record["results"].items())


def methods(text):
    names = text.split(",")
    if unknown := sorted(set(names) - set(LEARNS)):
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)} is not one of {', '.join(LEARNS)}")
    return names


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    commands = {}
    for name, cells_of in {"learns": learns, "protocols": protocols, "dense": dense}.items():
        commands[name] = names.add_parser(name, description=cells_of.__doc__)
        commands[name].set_defaults(cells_of=cells_of)
        add_options(commands[name], Path("runs") / name)
    commands["learns"].add_argument("--epochs", type=int, default=2, help="passes over the images before fine-tuning")
    commands["learns"].add_argument("--methods", type=methods, default=list(LEARNS), help="some, comma-separated")
    commands["protocols"].add_argument("--cifar10_mini", type=Path, required=True, metavar="DIR")
    printing = names.add_parser("print", description="The tables of files that a measurement wrote.")
    printing.add_argument("files", nargs="+", type=Path)
    args = parser.parse_args(argv)

    if args.name == "print":
        with user_errors():
            print("\n\n".join(as_markdown(path) for path in args.files))
        return
    measured = f"learns_{args.epochs}_epochs" if args.name == "learns" and args.epochs != 2 else args.name
    path = args.json or args.out / f"{measured}.json"
    record = runner.measure(measured, args.cells_of(args), path, args.jobs)
    if args.name == "learns":
        record["log"] = {name: {seed: ends_of_log(args, name, seed) for seed in args.seeds} for name in args.methods}
    elif args.name == "protocols":
        record["commands"] = [command.replace(str(args.cifar10_mini), "DIR") for command in record["commands"]]
    else:
        draw_dense(path.with_suffix(".png"), record["results"])
    runner.write(path, record)
    print(f"\n{as_markdown(path)}\n\nnumbers  {path}")


if __name__ == "__main__":
    main()
