"""The class that a classifier gives to image files, and a picture of the classes that it confuses.

    python -m tools.show a.png b.png --init runs/finetune/encoder.pt    # class and confidence of each file
    python -m tools.show --confusion runs/finetune/result.json          # draws runs/finetune/pictures/confusion.png
"""

import argparse
import functools
import json
import sys
import typing
from pathlib import Path

import torch
from torchvision.transforms import v2

import finetune
from common import config, engine, figures
from common.images import decode, shared_range
from common.transforms import CentreCrop, normalize

# Of finetune.py: how its images, and published weights, are to be taken
OPTIONS = ("img_size", "init_size", "num_heads", "weights", "class_names", "mean", "std", "value_range", "pool",
           "device")


@torch.no_grad()
def predict(images, **options):
    """Print the class of each image file, and how sure the classifier is, which is built from `options` of finetune.py.
    ValueError or OSError if there is none, if a file is no image, or if the outputs are not finite."""
    cfg, saved = finetune.resolve(finetune.Config(eval=True, data="none", **options))
    run = engine.Run(cfg)
    classes = saved["classifier"]["classes"]
    model = finetune.build_classifier(cfg, saved, classes).to(run.device).eval()
    crop = CentreCrop(cfg.img_size, v2.InterpolationMode.BICUBIC)
    value_range = cfg.value_range or shared_range(images, "these images")
    for path in images:
        image = crop(decode(path, cfg.in_chans, value_range=value_range))  # (C, H, W)
        with run.autocast():
            logits = model(normalize(image[None].to(run.device), cfg))  # (1, K)
        share, best = logits[0].float().softmax(dim=0).max(dim=0)
        if not share.isfinite():
            raise ValueError(f"{path}: the classifier's outputs are not finite")
        config.print_once(f"{config.printable(path)}: {config.printable(classes[best])} {100 * share:.1f} %")


def read_confusion(path):
    """(counts[true][predicted], classes) of a result.json. ValueError or OSError if it holds none."""
    try:
        result = json.loads(Path(path).read_text())
        counts, classes = result["confusion"], list(result["per_class"])
        whole = len(counts) == len(classes) > 0 and all(len(row) == len(classes) for row in counts)
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise ValueError(f"{path} holds no confusion matrix, as finetune.py writes it for up to 1000 classes")
    return counts, classes


def draw_confusion(path, counts, classes):
    """counts[true][predicted] as shares of each true class."""
    K = len(classes)
    figure, save = figures.new_figure(2 + 0.45 * K, 1.6 + 0.45 * K)
    axis = figure.subplots()
    shares = [[n / max(1, sum(row)) for n in row] for row in counts]
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    names = [config.printable(name) for name in classes]
    axis.set_xticks(range(K), names, rotation=60, ha="right", fontsize=8, parse_math=False)  # a $ is a $
    axis.set_yticks(range(K), names, fontsize=8, parse_math=False)
    axis.set(xlabel="predicted", ylabel="true", title="Confusion: per cent of each true class")
    if K <= 20:  # there is room for numbers
        for i, row in enumerate(shares):
            for j, share in enumerate(row):
                colour = "white" if share > 0.5 else "black"
                axis.text(j, i, f"{100 * share:.0f}", ha="center", va="center", fontsize=7, color=colour)
    save(path)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="image files")
    parser.add_argument("--init", help="encoder.pt of finetune.py, or published weights with a classifier")
    kinds = typing.get_type_hints(finetune.Config)
    for name in OPTIONS:
        kind = functools.partial(config.parse_value, name, kinds[name])
        parser.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS, help="as in finetune.py")
    parser.add_argument("--confusion", metavar="RESULT", help="result.json of finetune.py")
    args = parser.parse_args(config.join_values(sys.argv[1:] if argv is None else argv))
    options = {name: value for name, value in vars(args).items() if name in OPTIONS}

    if bool(args.images) != bool(args.init) or bool(args.images) == bool(args.confusion):
        config.fail("give image files and --init, or --confusion and a result.json; --help shows how")
    with config.user_errors():
        if args.images:
            return predict(args.images, init=args.init, **options)
        confusion = read_confusion(args.confusion)
        if figures.can_draw():
            path = Path(args.confusion).parent / "pictures" / "confusion.png"
            draw_confusion(path, *confusion)
            print(f"drawn: {path}")


if __name__ == "__main__":
    main()
