"""Every table of numbers: measured, or printed from a file under results/.

    python -m tools.tables sweep                             learning rates, by validation images
    python -m tools.tables learns --seeds "0 1 2"            does every method beat random weights, on every backbone?
    python -m tools.tables ablations --seeds "0 1 2"         what each paper varies
    python -m tools.tables cifar10 --data DIR                every method on photographs
    python -m tools.tables protocols --cifar10_mini DIR      every method in every protocol of fine-tuning
    python -m tools.tables dense_sweep                       learning rates of the next one, by validation images
    python -m tools.tables dense --seeds "0 1 2"             pixels and keypoints: MAE, supervised, random weights
    python -m tools.tables print results/learns_vit.json     the tables of a file

Numbers go to a file in --out, or to --json. A measurement that was stopped goes on when its command is given again. All
images have 64 px; scores are of 2,000 test images of `shapes`, unless a table says something else.
"""

import argparse
import functools
from pathlib import Path

from common import figures
from common.config import user_errors
from tools import bench, gpu_table, learning, runner
from tools.demo import BUDGET, FINETUNE, add_options, bars, slug, tuning

# Measurements that share runs, and so a folder of them
FOLDERS = {**dict.fromkeys(["sweep", "learns", "ablations", "protocols"], "learning"), "dense_sweep": "dense"}

METHODS = ["MAE", "SimMIM", "UM-MAE", "FastMIM", "LUT", "random weights"]
LINEAR = "--mode linear --head_start random --shift 0 --epochs 100 --warmup_epochs 10"
PROTOCOLS = {  # name: options of its fine-tuning, in the order of the table
    "k-NN": "--mode knn",
    # The better of two learning rates for each optimizer, on validation images of `shapes`.
    "linear, LARS": LINEAR + " --base_lr 16",
    "linear, SGD": LINEAR + " --optimizer sgd --base_lr 1",
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
              "--head_start random --epochs 4 --warmup_epochs 0.32 --save_epochs 1 --log_every 100")
MODES = {  # what trains: options, and the learning rates that the sweep tries, a factor of four apart
    "frozen": ("--freeze", (1e-3, 4e-3, 1.6e-2, 6.4e-2)),
    "fine-tuned": ("--layer_decay 1", (2.5e-4, 1e-3, 4e-3, 1.6e-2)),
    "fine-tuned, layer decay 0.5": ("--layer_decay 0.5", (1e-3, 4e-3, 1.6e-2, 6.4e-2))}
FROZEN, GENTLY = ("frozen", 4e-3), ("fine-tuned, layer decay 0.5", 4e-3)
CHOSEN = {  # task: {encoder: mode and rate of the columns "frozen" and "fine-tuned"}, of results/dense_sweep.json
    "segment": dict.fromkeys(["MAE", "supervised", "random"], (FROZEN, GENTLY)),
    "depth": {"MAE": (("frozen", 1.6e-2), GENTLY), "supervised": (FROZEN, ("fine-tuned", 4e-3)),
              "random": (FROZEN, GENTLY)},
    "keypoints": {"MAE": (FROZEN, GENTLY), "supervised": (FROZEN, GENTLY), "random": (FROZEN, ("fine-tuned", 1e-3))}}
SUPERVISED_TITLE = "top-1, per cent of validation images"
SCORES = {"segment": ("miou", "segmentation: mIoU, per cent (more is better)"),  # task: score, title
          "depth": ("rmse", "depth: RMSE, metres (less is better)"),
          "keypoints": ("pck", "keypoints: PCK, per cent (more is better)")}


# ---------------------------------------- What is measured: lists of cells

def edited(encoder, options, out, seed):
    """The job that writes an edited copy of another job's encoder.pt."""
    words = ["-m", "tools.convert", *options.split(), "--seed", seed, encoder.out / "encoder.pt", out / "encoder.pt"]
    return runner.Job(tuple(map(str, words)), out, (encoder,))


def protocols(args):
    """The small ViT of every method, pre-trained as in `learns`, in every protocol: with 500 labels of `shapes`, and of
    DIR, which none has seen (4,000 and 1,000 images of CIFAR-10 in DIR/train/CLASS/ and DIR/val/CLASS/). But for the
    linear ones, all protocols have the learning rate at which `learns` trains the whole encoder."""
    sets = {"shapes": "shapes", "cifar10_mini": args.cifar10_mini}
    other = {"shapes": "cifar10_mini", "cifar10_mini": "shapes"}
    cells, jobs = [], {}
    for seed in args.seeds:
        for method in METHODS:
            name, is_random = f"{method} ViT", method == "random weights"
            folder = args.out / "protocols" / slug(method) / f"seed{seed}"
            rate = learning.OF_VIT["scratch"] if is_random else learning.TUNED[name]["pre-trained"]
            for protocol in OF_RANDOM if is_random else PROTOCOLS:
                for on, data in sets.items():
                    encoder = None
                    if protocol == "all, after the other data":
                        encoder = jobs[seed, method, "all", other[on]]
                    elif not is_random:
                        encoder = learning.best_pretraining(args.out, name, seed)
                    if protocol in EDITS:
                        encoder = edited(encoder, EDITS[protocol], folder / slug(f"{protocol} encoder"), seed)
                    words = ["--data", data, "--labels", 500, "--epochs", BUDGET[500], "--base_lr", rate]
                    out = folder / slug(f"{on} {protocol}")
                    job = tuning(FINETUNE, encoder, *words, *PROTOCOLS[protocol].split(), out=out, seed=seed)
                    jobs[seed, method, protocol, on] = job
                    cells.append(runner.Cell(on, protocol, method, seed, job))
    return cells


def dense_encoders(args):
    """{row: job of what dense prediction starts from}: MAE without labels, the same ViT trained on all 20,000 class
    labels in as many passes, and None for random weights."""
    return {"MAE": runner.training(DENSE_PRETRAIN, out=args.out / "mae"),
            "supervised": runner.training(SUPERVISED, out=args.out / "supervised"), "random": None}


def dense_job(args, task, name, encoder, mode, rate, seed, split):
    words = ["--task", task, *MODES[mode][0].split(), "--base_lr", rate]
    out = args.out / slug(f"{split} {task} {mode} {rate:g} {name} {seed}")
    return tuning(DENSE, encoder, *words, out=out, seed=seed, split=split)


def dense_sweep(args):
    """The learning rates of dense prediction, frozen and fine-tuned, by validation images, with 200 labelled images."""
    cells = []
    for seed in args.seeds:
        for task, (score, title) in SCORES.items():
            for name, encoder in dense_encoders(args).items():
                for mode, (_, rates) in MODES.items():
                    for rate in rates:
                        job = dense_job(args, task, name, encoder, mode, rate, seed, "val")
                        row = f"{name}, {mode}"
                        cells.append(runner.Cell(f"{title}, validation", row, f"{rate:g}", seed, job, score))
    return cells


def dense(args):
    """What is known about every pixel, with 200 labelled images, on test images. Encoders are trained once; a seed
    decides which images have labels, the start of the head and the order."""
    encoders = dense_encoders(args)
    cells = [runner.Cell(SUPERVISED_TITLE, "supervised", "20,000 labels", args.seeds[0], encoders["supervised"])]
    for seed in args.seeds:
        for task, (score, title) in SCORES.items():
            for name, encoder in encoders.items():
                for column, (mode, rate) in zip(["frozen", "fine-tuned"], CHOSEN[task][name], strict=True):
                    job = dense_job(args, task, name, encoder, mode, rate, seed, "test")
                    cells.append(runner.Cell(title, name, column, seed, job, score))
    return cells


def draw_dense(path, results):
    """A panel for each task."""
    figure, save = figures.new_figure(4.8 * len(SCORES), 3.4)
    for axis, (_, title) in zip(figure.subplots(1, len(SCORES)), SCORES.values(), strict=True):
        bars(axis, results[title])
        task, _, score = title.partition(": ")
        axis.set(title=task, ylabel=score)
        axis.margins(y=0.3)
    save(path)


# ---------------------------------------- Command line

def as_markdown(path):
    """The tables of a file that a measurement wrote."""
    record = runner.read_json(path)
    if record["what"] == "gpu":
        return gpu_table.table(record)
    if isinstance(record["results"], list):  # of pairs
        return bench.table(record)
    return "\n\n".join(runner.markdown(title, rows) for title, rows in record["results"].items())


def methods(text, known=(*learning.METHODS, *learning.TRIED)):
    names = text.split(";")
    if unknown := sorted(set(names) - set(known)):
        raise argparse.ArgumentTypeError(f"{'; '.join(unknown)} is not one of {'; '.join(known)}")
    return names


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    commands = {}
    measurements = {"sweep": learning.sweep, "learns": learning.learns, "ablations": learning.ablations,
                    "cifar10": learning.cifar10, "protocols": protocols, "dense_sweep": dense_sweep, "dense": dense}
    for name, cells_of in measurements.items():
        commands[name] = names.add_parser(name, description=cells_of.__doc__)
        commands[name].set_defaults(cells_of=cells_of)
        add_options(commands[name], Path("runs", FOLDERS.get(name, name)))
    for name, rows in {"sweep": [*learning.METHODS, *learning.TRIED], "learns": list(learning.METHODS)}.items():
        commands[name].add_argument("--methods", type=methods, default=rows, help='some of them, as "MAE ViT;LUT ViT"')
    commands["cifar10"].add_argument("--methods", type=functools.partial(methods, known=learning.CIFAR10),
                                     default=list(learning.CIFAR10), help='some of them, as "MAE;LUT"')
    commands["cifar10"].add_argument("--data", type=Path, required=True, metavar="DIR", help="train/CLASS/, val/CLASS/")
    commands["protocols"].add_argument("--cifar10_mini", type=Path, required=True, metavar="DIR")
    printing = names.add_parser("print", description="The tables of files that a measurement wrote.")
    printing.add_argument("files", nargs="+", type=Path)
    args = parser.parse_args(argv)

    if args.name == "print":
        with user_errors():
            print("\n\n".join(as_markdown(path) for path in args.files))
        return
    path = args.json or args.out / f"{args.name}.json"
    folders = {getattr(args, option): "DIR" for option in ("data", "cifar10_mini") if option in args}
    record = runner.measure(args.name, args.cells_of(args), path, args.jobs, folders)
    if args.name == "learns":
        record["log"] = learning.ends_of_logs(args)
    elif args.name == "dense":
        draw_dense(path.with_suffix(".png"), record["results"])
    runner.write(path, record)
    print(f"\n{as_markdown(path)}\n\nnumbers  {path}")


if __name__ == "__main__":
    main()
