"""What networks attend to and what their features are like: the analyses of "Revealing the Dark Secrets of Masked Image
Modeling" (Xie et al., arXiv 2205.13543), of LUT and of UM-MAE, on any checkpoint.

    python -m tools.analyze all --checkpoints runs/mae/encoder.pt random --data shapes --out runs/analysis
    python -m tools.analyze distance --checkpoints runs/mae/encoder.pt torchvision:vit_b_16 random --out runs/analysis
    python -m tools.analyze attention --checkpoints runs/mae/encoder.pt --queries "20,20 44,32" --out runs/analysis
    python -m tools.analyze avgdist --mask_size 256 --unit 16 --out runs/analysis
    python -m tools.analyze hog --data shapes --size 64 --images 64 --out runs/analysis
    python -m tools.analyze drop --checkpoints runs/mae/encoder.pt random --seeds "0 1 2" --out runs/analysis
    python -m tools.analyze curves --runs runs/mae runs/finetune --out runs/analysis

Each writes OUT/NAME.json and OUT/NAME.png, and OUT/index.html, which gathers all that lie in OUT. A checkpoint is an
encoder.pt or published weights, torchvision:NAME, or random (the first network with random weights). NAME=PATH names
it; checkpoints of one name are seeds of one row. `all` is everything but drop, which trains. Every definition is in
docs/analysis.md.
"""

import argparse
import contextlib
import shlex
import sys
from pathlib import Path

import torch

import data
from common import checkpoint, config, figures
from tools import analyses, analysis_figures, analysis_page, hog_stability, networks, run_analyses, runner, snapshots
from tools.attention_maps import attentions_of
from tools.demo import seed_list
from tools.tables import as_markdown

OF_MAPS = ["distance", "entropy", "kl", "attention"]  # these need a network with attention


def save(args, name, record, seeds=None, **about):
    """OUT/NAME.json. A record that tells its own commands, as of the queue, keeps them."""
    header = runner.new_record(name, [args.command], seeds or [args.seed], torch.get_num_threads(), about=about)
    runner.write(args.out / f"{name}.json", {**header, **record})


def save_and_draw(args, name, record, draw, **about):
    """The same, and OUT/NAME.png by `draw(path, record)`."""
    save(args, name, {**record, "figures": [f"{name}.png"] * figures.can_draw()}, **about)
    if figures.can_draw():
        draw(args.out / f"{name}.png", record)


# ---------------------------------------- What looks at images

def look(args, names):
    """The analyses `names` of the networks in --checkpoints. Returns lines on what was left out. ValueError if they
    cannot be made; of `all`, if none of the networks has what one of them needs, it is left out."""
    found = networks.open_networks(args.checkpoints, args.img_size, args.seed, args.device)
    notes, with_maps = [], [network for network in found if attentions_of(network.encoder)]
    blind = [network.source for network in found if network not in with_maps]
    if blind and set(names) & set(OF_MAPS):
        notes.append(f"{', '.join(blind)}: no attention whose maps could be shown")
        if len(names) == 1:
            raise ValueError(f"{args.name}: {notes[0]}")
    if not with_maps:
        names = [name for name in names if name not in OF_MAPS]
    H, W = found[0].encoder.arch["img_size"]
    described = ", ".join(f"{network.name} ({network.source})" if network.name != network.source else network.name
                          for network in found)
    about = {"data": Path(args.data).name, "split": args.split, "image size": f"{H}x{W}",
             "networks": described}
    if "attention" in names:
        look_at_queries(args, with_maps, about)

    streamed = {name: analyses.STREAMED[name]() for name in names if name in analyses.STREAMED}
    if streamed:
        count, batches = networks.image_batches(args, found)
        fewest = max(analysis.fewest_images for analysis in streamed.values())
        if min(count, args.batch_size) < fewest:
            raise ValueError(f"{args.name} compares images with each other and needs {fewest} in a batch: there are "
                             f"{count} images, and --batch_size is {args.batch_size}")
        num_images = analyses.gather(found, batches, list(streamed.values()))
        for name, analysis in streamed.items():
            with noted(notes, name, args):
                record = analysis.record(found)
                seen = record.get("images", num_images)  # a small last batch counts for nothing in CKA
                save_and_draw(args, name, record, analysis_figures.DRAW[name], **about, images=seen)

    if "kernels" in names:
        if len(names) == 1 or any(snapshots.large_kernels(network.encoder) for network in found):
            save_and_draw(args, "kernels", snapshots.kernels(found), analysis_figures.kernels, networks=described)
        else:
            notes.append("kernels: no network has convolutions above 3x3 that overlap")
    return notes


@contextlib.contextmanager
def noted(notes, name, args):
    """What keeps one analysis of `all` from being made is a line in `notes`."""
    try:
        yield
    except ValueError as error:
        if args.name != "all":
            raise
        notes.append(f"{name}: {error}")


def look_at_queries(args, found, about):
    """A figure for each network, of the first --pictures images."""
    few = argparse.Namespace(**{**vars(args), "images": args.pictures, "batch_size": args.pictures})
    count, batches = networks.image_batches(few, found)
    imgs = next(batches, None)
    batches.close()
    if imgs is None:
        raise ValueError(f"--data {args.data}: none of {count} images can be read")
    record = snapshots.attention(found, imgs, args.queries, args.layer)
    paths = {name: f"attention_{i + 1}.png" for i, name in enumerate(record["maps"])}
    save(args, "attention", {**record, "figures": list(paths.values()) * figures.can_draw()}, **about, images=len(imgs))
    if figures.can_draw():
        for name, path in paths.items():
            analysis_figures.attention(args.out / path, record, name, imgs.cpu() / 255)


# ---------------------------------------- What does not

def avgdist(args):
    record = snapshots.avgdist(args.mask_size, args.unit, args.masks, args.seed)
    save_and_draw(args, "avgdist", record, analysis_figures.avgdist)


def hog(args, size):
    source = data.open_source(args.data, "train", 3)
    record = hog_stability.stability(source, size, args.images, args.seed)
    about = {"data": Path(args.data).name, "images": record["images"], "image size": f"{size}x{size}"}
    save_and_draw(args, "hog", record, hog_stability.draw, **about)


def runs_with_logs(words):
    """([NAME=]FOLDER, ...) -> {name: folder} of those that hold a log, and lines on the others. ValueError if none
    does."""
    pairs = [networks.split_name(word) for word in words]
    runs = run_analyses.numbered((name or Path(path).absolute().name, Path(path)) for name, path in pairs)
    logged = {name: folder for name, folder in runs.items() if (folder / "log.jsonl").exists()}
    notes = [f"{runs[name]}, which holds no log.jsonl" for name in runs if name not in logged]
    if not logged:
        raise ValueError(f"--runs: {'; '.join(notes)}")
    return logged, notes


def curves(args, runs):
    save_and_draw(args, "curves", run_analyses.curves(runs), analysis_figures.curves)
    table = as_markdown(args.out / "curves.json")
    (args.out / "curves.md").write_text(table + "\n", encoding="utf-8")
    config.print_once(table)


def drop(args):
    """Train through the queue of runner.py, and write each number as soon as it is known."""
    for name in ("seeds", "drops", "tasks"):
        if not getattr(args, name):
            raise ValueError(f"--{name} is empty: nothing would be trained")
    if unknown := set(args.tasks) - run_analyses.TASKS.keys():
        raise ValueError(f"--tasks are of {', '.join(run_analyses.TASKS)}, not {min(unknown)}")
    encoders = {}
    for network in networks.open_networks(args.checkpoints, (0, 0), args.seed):
        if network.source.startswith("torchvision:"):
            raise ValueError(f"drop knows ViT, Swin and PVT, not {network.source}")
        path = Path(network.source)
        if network.source == "random":
            nth = len(encoders.get(network.name, []))
            path = args.out / "runs" / f"random_{nth}.pt"
            path.parent.mkdir(parents=True, exist_ok=True)
            arch = config.to_plain(network.encoder.arch)
            images = {key: list(getattr(network, key)) for key in ("mean", "std", "value_range")}
            known = {key: numbers for key, numbers in images.items() if numbers}
            checkpoint.write(path, {"arch": arch, "model": network.encoder.state_dict(), "method": "random weights",
                                    "step": 0, **known})
        encoders.setdefault(network.name, []).append(path)
    cells = run_analyses.drop_cells(encoders, args.drops, args.shuffled, args.tasks, args.seeds, args.data, args.out)
    record = runner.measure("drop", cells, args.out / "drop.json", args.jobs)
    save_and_draw(args, "drop", record, analysis_figures.drop)
    config.print_once(as_markdown(args.out / "drop.json"))


# ---------------------------------------- Command line

def everything(args):
    """All that only looks. Returns lines on what was left out."""
    avgdist(args)  # ahead of what takes long: its options may not fit
    notes = look(args, [*analyses.STREAMED, "kernels", "attention"])
    args.images = min(args.images, 64)
    with noted(notes, "hog", args):  # images of another kind
        hog(args, args.size or 224)
    found = [(name, Path(source)) for name, source, _ in map(networks.named, args.checkpoints)]
    runs = [(name, path.parent) for name, path in found if path.is_file() and (path.parent / "log.jsonl").exists()]
    if runs:
        with noted(notes, "curves", args):
            curves(args, run_analyses.numbered(runs))
    return notes


def pairs(text):
    """"20,20 44,32" -> [(20.0, 20.0), (44.0, 32.0)]."""
    return [config.parse_tuple("queries", tuple[float, float], word) for word in text.split()]


def size(name):
    return lambda text: config.parse_value(name, config.Size, text)


OPTIONS = {  # option: arguments of argparse
    "--checkpoints": dict(nargs="+", required=True, metavar="[NAME=]PATH", help="files, torchvision:NAME, random"),
    "--data": dict(default="shapes", help="shapes, cifar10, or a folder of images"),
    "--split": dict(default="val", choices=["train", "val", "test"], help="of --data"),
    "--images": dict(type=int, default=512, help="how many of them"),
    "--batch_size": dict(type=int, default=64, help="images at once; CKA compares those of a batch"),
    "--img_size": dict(type=size("img_size"), default=(0, 0), metavar="HxW", help="pixels; 0 as in the checkpoints"),
    "--device": dict(default="auto", choices=["auto", "cpu", "cuda"]),
    "--layer": dict(type=int, default=0, help="attention layer, from 1 on; 0 for the last"),
    "--queries": dict(type=pairs, default=[], metavar="ROW,COLUMN", help="pixels; the centre, and near a corner"),
    "--pictures": dict(type=int, default=2, help="images whose attention is drawn"),
    "--mask_size": dict(type=size("mask_size"), default=(256, 256), metavar="HxW", help="pixels of a masked image"),
    "--unit": dict(type=int, default=16, help="pixels, side of what is masked"),
    "--masks": dict(type=int, default=100, help="how many of each strategy"),
    "--size": dict(type=int, default=224, help="pixels of the full images, a multiple of 16 from 48 on"),
    "--runs": dict(nargs="+", required=True, metavar="[NAME=]DIR", help="folders with a log.jsonl"),
    "--seeds": dict(type=seed_list, default=[0], help='such as "0 1 2"'),
    "--drops": dict(type=seed_list, default=[0, 1, 2], help="numbers of last layers to drop"),
    "--shuffled": dict(type=int, default=2, help="layers to drop where the rest is shuffled; 0 for none"),
    "--tasks": dict(type=str.split, default=list(run_analyses.TASKS), help=f"of {', '.join(run_analyses.TASKS)}"),
    "--jobs": dict(type=int, default=runner.CORES, help="runs at a time, one thread each"),
    "--seed": dict(type=int, default=0, help="of images, random weights and masks"),
    "--out": dict(type=Path, default=Path("runs/analysis"), help="folder of figures, numbers and page")}
LOOK = ["checkpoints", "data", "split", "images", "batch_size", "img_size", "device"]
QUERIES, MASKS = ["layer", "queries", "pictures"], ["mask_size", "unit", "masks"]
TAKES = {  # name: its options, beside seed and out
    "all": [*LOOK, *QUERIES, *MASKS, "size"],
    **dict.fromkeys(analyses.STREAMED, LOOK),
    "kernels": LOOK, "attention": [*LOOK, *QUERIES], "avgdist": MASKS, "hog": ["data", "images", "size"],
    "drop": ["checkpoints", "data", "seeds", "drops", "shuffled", "tasks", "jobs"], "curves": ["runs"]}


def parse(words):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    for name, options in TAKES.items():
        command = names.add_parser(name, help=analysis_page.TEXTS[name][0] if name != "all" else "all but drop")
        for option in [*options, "seed", "out"]:
            command.add_argument(f"--{option}", **OPTIONS[f"--{option}"])
    args = parser.parse_args(words)
    if getattr(args, "device", "") == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    # A folder of images lies elsewhere on the next machine: its name is enough.
    shown = [Path(word).name if word == getattr(args, "data", None) else word for word in words]
    args.command = f"python -m tools.analyze {shlex.join(shown)}"
    return args


def main(argv=None):
    args = parse([str(word) for word in (sys.argv[1:] if argv is None else argv)])
    with config.user_errors():
        least_one = ("images", "batch_size", "pictures", "unit", "masks")
        config.in_range(args, **{name: "[1, inf)" for name in least_one if name in args})
        if getattr(args, "device", "") == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda, but torch sees no GPU; --device cpu runs everywhere")
        args.out.mkdir(parents=True, exist_ok=True)
        notes = []
        if args.name == "all":
            notes = everything(args)
        elif args.name == "avgdist":
            avgdist(args)
        elif args.name == "hog":
            hog(args, args.size)
        elif args.name == "drop":
            drop(args)
        elif args.name == "curves":
            logged, notes = runs_with_logs(args.runs)
            curves(args, logged)
        else:
            notes = look(args, [args.name])
        page = analysis_page.write(args.out, notes)
    for note in notes:
        config.print_once(f"left out: {note}")
    config.print_once(f"page: {page}")


if __name__ == "__main__":
    main()
