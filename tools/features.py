"""Features of images, for whatever comes after: a classifier of another library, a search, a picture of clusters.

    python -m tools.features --init runs/mae/encoder.pt --data shapes --out runs/features.npz

The file holds `features` (N, D) float32, the mean of the patch tokens or, with --pool cls, the class token; `labels`
(N,), -1 where there are none; `names` (N,) of the files, below the folder of the split, or numbers of images that have
no file; and `classes`. Rows come in the order of the data set. Broken images are left out. A folder without train/ and
val/ is taken whole, without labels.
"""

import argparse
import functools
import os
import sys
import typing
from pathlib import Path

import numpy as np
import torch

import data
import finetune
import models
from common import config, engine, folder, neighbours, transforms, weights

# Of finetune.py: how its images, and published weights, are to be taken
OPTIONS = ("img_size", "init_size", "num_heads", "weights", "mean", "std", "value_range", "device", "precision",
           "workers", "micro_batch", "data_dir", "max_bad")


def open_images(cfg, split):
    """The images of a split as an evaluation takes them; with labels if the folder has train/ and val/."""
    root = Path(cfg.data)
    labelled = not root.is_dir() or ((root / "train").is_dir() and (root / "val").is_dir())
    source = data.open_source(cfg.data, split, cfg.in_chans, labelled, cfg.data_dir, value_range=cfg.value_range)
    crop = transforms.CentreCrop(cfg.img_size, transforms.with_defaults(cfg).interpolation)
    return data.Images(source, crop, cfg.seed, cfg.max_bad, substitutes=0)


@torch.no_grad()
def features_of(run, encoder, dataset, pool):
    """(features (N, D), labels (N,), indices (N,) of the images that are whole) as arrays."""
    parts = []
    for imgs, labels, indices in data.evaluation(dataset, run.cfg, run):
        with run.autocast():
            out = neighbours.pooled(encoder, transforms.normalize(imgs.to(run.device), run.cfg), pool)  # (B, D)
        parts.append((out.float().cpu(), labels, indices))
    return [torch.cat(column).numpy() for column in zip(*parts, strict=True)]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--init", required=True, help="encoder.pt of any run, or published weights")
    parser.add_argument("--data", required=True, help="shapes, cifar10, cifar100, or a folder of images")
    parser.add_argument("--split", default="val", choices=["train", "val", "test"], help="of data that has them")
    parser.add_argument("--pool", default="mean", choices=["mean", "cls"], help="of tokens")
    parser.add_argument("--out", required=True, type=Path, help="file .npz")
    kinds = typing.get_type_hints(finetune.Config)
    for name in OPTIONS:
        kind = functools.partial(config.parse_value, name, kinds[name])
        parser.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS, help="as in finetune.py")
    args = parser.parse_args(config.join_values(sys.argv[1:] if argv is None else argv))
    options = {name: value for name, value in vars(args).items() if name in OPTIONS}

    with config.user_errors():
        cfg = finetune.Config(mode="knn", init=args.init, data=args.data, **options)
        cfg.check()
        cfg, saved = weights.as_in_init(cfg, models.from_arch, models.SIZES)
        run = engine.Run(cfg)
        encoder = weights.encoder_for(cfg, saved, models.from_arch, False, not weights.lost_its_norm(saved))
        weights.load_encoder(encoder, saved, cfg.init, (), cfg)
        if args.pool == "cls" and not encoder.num_prefix:
            raise ValueError(f"--pool cls: {cfg.model} has no class token")
        dataset = open_images(cfg, args.split)
        features, labels, indices = features_of(run, encoder.to(run.device).eval(), dataset, args.pool)
        if not np.isfinite(features).all():
            raise ValueError("the encoder's features are not finite; try --precision fp32")
        paths = getattr(dataset.source, "paths", None)
        names = indices.astype(str) if paths is None else np.array([os.fsdecode(path) for path in paths[indices]])
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with folder.replacing(args.out) as part, open(part, "xb") as file:
            classes = np.array(dataset.source.classes or [], dtype=str)
            np.savez(file, features=features, labels=labels, names=names, classes=classes)
    about = "labels, names and classes" if len(classes) else "names"
    config.print_once(f"{args.out}: features {features.shape} of {args.data}, with {about}")


if __name__ == "__main__":
    main()
