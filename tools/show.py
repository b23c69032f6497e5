"""What a network makes of image files: a reconstruction, the class and how sure it is, or where it looks.

    python -m tools.show a.jpg b.png --init runs/mae/last.pt --out show.png            # masked, and reconstructed
    python -m tools.show a.jpg b.png --init runs/mae/last.pt --mask_ratio 0.5 --mask block --seed 1 --out show.png
    python -m tools.show a.jpg b.png --init runs/finetune/encoder.pt --out show.png    # class and confidence of each
    python -m tools.show a.jpg b.png --init runs/mae/encoder.pt --attention --out show.png
    python -m tools.show --confusion runs/finetune/result.json          # draws runs/finetune/pictures/confusion.png

Any size of image will do: each is resized and cropped to its centre, as in evaluation. load("runs/mae/last.pt") is the
model of any of the five methods, for notebooks.
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
from common import checkpoint, config, engine, figures, folder
from common.images import decode, shared_range
from common.transforms import CentreCrop, normalize
from tools import analysis_figures, networks, reconstructions, snapshots
from tools.analyze import pairs
from tools.attention_maps import attentions_of
from tools.reconstructions import MASKING, SCRIPTS, load

# Options of finetune.py: how its images, and published weights, are to be taken
OPTIONS = ("img_size", "init_size", "num_heads", "weights", "class_names", "mean", "std", "value_range", "pool",
           "device")
# What each kind of picture takes, beside --out
TAKES = {"a reconstruction": (*MASKING, "seed", "value_range"), "a classifier": OPTIONS,
         "--attention": ("layer", "queries", "img_size", "value_range")}
SIDE, LARGE = 2.0, 3.5  # inches of an image, and of one that is drawn in strokes


def read(paths, img_size, in_chans, value_range=()):
    """Image files as a batch uint8 (B, C, H, W), cropped as in evaluation. ValueError or OSError for what is none."""
    crop = CentreCrop(img_size, v2.InterpolationMode.BICUBIC)
    value_range = value_range or shared_range(paths, "these images")
    return torch.stack([crop(decode(path, in_chans, value_range=value_range)) for path in paths])


def names_of(paths):
    """Short names of files, as titles above their images."""
    names = [config.printable(Path(path).name) for path in paths]
    return [name if len(name) <= 24 else name[:10] + "..." + name[-11:] for name in names]


# ---------------------------------------- Three kinds of pictures

def reconstruct(paths, init, out, seed=0, value_range=(), **changes):
    """Draw what the model in a last.pt predicts of image files. ValueError or OSError, in one line."""
    model = load(init, **changes)
    cfg = model.cfg
    imgs = read(paths, cfg.img_size, cfg.in_chans, value_range or cfg.value_range)
    rows, title = reconstructions.reconstruction(model, normalize(imgs, cfg), seed)
    config.print_once(title)
    draw(out, rows, title, names_of(paths), LARGE if cfg.target == "hog" else SIDE)


@torch.no_grad()
def predict(paths, init, out=None, **options):
    """Print the class of each image file, and how sure the classifier is, which is built from `options` of finetune.py;
    draw it if there is an `out`. ValueError or OSError if there is none, if a file is no image, or if the outputs are
    not finite."""
    cfg, saved = finetune.resolve(finetune.Config(eval=True, data="none", init=init, **options))
    run = engine.Run(cfg)
    classes = saved["classifier"]["classes"]
    model = finetune.build_classifier(cfg, saved, classes).to(run.device).eval()
    imgs, titles = read(paths, cfg.img_size, cfg.in_chans, cfg.value_range), []
    for path, name, image in zip(paths, names_of(paths), imgs, strict=True):
        with run.autocast():
            logits = model(normalize(image[None].to(run.device), cfg))  # (1, K)
        share, best = logits[0].float().softmax(dim=0).max(dim=0)
        if not share.isfinite():
            raise ValueError(f"{path}: the classifier's outputs are not finite")
        answer = f"{config.printable(classes[best])} {100 * share:.1f} %"
        config.print_once(f"{config.printable(path)}: {answer}")
        titles.append(f"{name}\n{answer}")
    if out:
        draw(out, {"": imgs / 255}, "", titles)


def attend(paths, init, out, layer=0, queries=(), img_size=(0, 0), value_range=()):
    """Draw where chosen patches of image files look, in the encoder of any checkpoint. ValueError or OSError, in one
    line, also if it has no attention."""
    if checkpoint.is_run(reconstructions.content_of(init)):
        model = load(init)
        if any(img_size) and tuple(img_size) != model.cfg.img_size:
            h, w = model.cfg.img_size
            raise ValueError(f"--img_size: {init} is for images of {h}x{w}; the encoder.pt beside it takes others")
        cfg = model.cfg
        network = networks.Network(networks.named(init)[0], init, model.encoder, cfg.mean, cfg.std, cfg.value_range)
    else:
        [network] = networks.open_networks([init], img_size, seed=0)
    if not attentions_of(network.encoder):
        raise ValueError(f"{init}: no attention whose maps could be shown")
    arch = network.encoder.arch
    imgs = read(paths, arch["img_size"], arch["in_chans"], value_range or network.value_range)
    record = snapshots.attention([network], imgs, list(queries), layer)
    if figures.can_draw():
        analysis_figures.attention(out, record, network.name, imgs / 255)
        config.print_once(f"drawn: {out}")


def draw(out, rows, title, columns, side=SIDE):
    figures.grid(out, rows, title, columns, side)
    if figures.can_draw():
        config.print_once(f"drawn: {out}")


# ---------------------------------------- What a classifier confuses

def read_confusion(path):
    """(counts[true][predicted], classes) of a result.json. ValueError or OSError if it holds none."""
    try:
        result = json.loads(folder.read_text(path))
        counts, classes = result["confusion"], list(result["per_class"])
        whole = len(counts) == len(classes) > 0 and all(len(row) == len(classes) for row in counts)
        whole = whole and all(type(n) is int and 0 <= n < 2**63 for row in counts for n in row)
    except (ValueError, KeyError, TypeError, RecursionError):
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


# ---------------------------------------- Command line

def parse(words):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="image files")
    parser.add_argument("--init", help="last.pt of a method, encoder.pt of finetune.py, or published weights")
    parser.add_argument("--out", type=Path, help="the picture; runs/show.png, but that a class alone is printed")
    parser.add_argument("--attention", action="store_true", help="draw where patches look, in any encoder")
    later = {"default": argparse.SUPPRESS}
    parser.add_argument("--seed", type=int, help="of the mask", **later)
    parser.add_argument("--layer", type=int, help="attention layer, from 1 on; 0 for the last", **later)
    parser.add_argument("--queries", type=pairs, metavar="ROW,COLUMN", help='patches, in pixels, as "20,20 44,32"',
                        **later)
    options = {name: script.Config for script in reversed(SCRIPTS.values()) for name in MASKING
               if hasattr(script.Config, name)}
    options |= dict.fromkeys(OPTIONS, finetune.Config)
    for name, config_class in options.items():
        kind = functools.partial(config.parse_value, name, typing.get_type_hints(config_class)[name])
        script = Path(sys.modules[config_class.__module__].__file__).name
        parser.add_argument(f"--{name}", type=kind, help=f"as in {script}", **later)
    parser.add_argument("--confusion", metavar="RESULT", help="result.json of finetune.py")
    return parser.parse_args(config.join_values(words))


def show(args):
    """Draw, or print, what the words ask for. ValueError or OSError, in one line."""
    kind, act, out = "a classifier", predict, args.out
    saved = None if args.attention else reconstructions.content_of(args.init)
    if args.attention:
        kind, act = "--attention", attend
    elif checkpoint.is_run(saved):
        kind, act = "a reconstruction", reconstruct
    elif checkpoint.has_encoder(saved) and "method" in saved and "classifier" not in saved:  # one of ours
        raise ValueError(f"{args.init} holds an encoder and no classifier: the last.pt beside it reconstructs, "
                         "finetune.py makes a classifier, and --attention takes any encoder")
    if kind != "a classifier":
        out = out or Path("runs/show.png")
    fixed = ("images", "init", "out", "attention", "confusion")
    options = {name: value for name, value in vars(args).items() if name not in fixed}
    if wrong := options.keys() - set(TAKES[kind]):
        raise ValueError(f"--{min(wrong)} is nothing that {kind} ({args.init}) takes")
    act(args.images, init=args.init, out=out, **options)


def main(argv=None):
    args = parse(sys.argv[1:] if argv is None else argv)
    if bool(args.images) != bool(args.init) or bool(args.images) == bool(args.confusion):
        config.fail("give image files and --init, or --confusion and a result.json; --help shows how")
    with config.user_errors():
        if args.images:
            return show(args)
        confusion = read_confusion(args.confusion)
        if figures.can_draw():
            path = args.out or Path(args.confusion).parent / "pictures" / "confusion.png"
            draw_confusion(path, *confusion)
            config.print_once(f"drawn: {path}")


if __name__ == "__main__":
    main()
