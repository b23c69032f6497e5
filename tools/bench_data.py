"""How fast images come: from JPEG files to batches of crops, and from folders to a list of files.

    python -m tools.bench_data DIR                     of the JPEG files below DIR, as small as ImageNet's
    python -m tools.bench_data DIR --files 1280000     also: a list of so many files, in a temporary folder

Ways take turns, so that a load on the machine falls on all. Time is processor time of one process with one thread. The
crops are those of MAE's recipe, to 224 px.
"""

import argparse
import contextlib
import itertools
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import default_collate
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset, pil_loader
from torchvision.transforms import v2

import data
import mae
from common import config, files, images, jpeg, transforms
from tools import runner

COPYING, INSTALLED = "Pillow, with its copies", "the installed decoder"
LINKS = 50_000  # names that one file may have, on common file systems
CLASSES = 1000


class Copying(images.Folder):
    """The plain way to use Pillow: an image is copied where it is turned, converted and made an array."""

    def load(self, i):
        with files.opened(self.root / os.fsdecode(self.paths[i])) as image:
            image.draft(None, (self.min_side, self.min_side))
            image = ImageOps.exif_transpose(image)
            array = np.array(image.convert("RGB"))  # (h, w, 3)
        return torch.from_numpy(array).permute(2, 0, 1), -1


def ways(root):
    """{name: a function that makes a batch of the images with these indices, in an epoch}."""
    cfg = mae.Config(data=str(root))
    ours = data.pretrain_set(cfg)
    copying = data.Images(Copying(root, "train", min_side=transforms.jpeg_side(cfg)), ours.transform, cfg.seed)
    on_pillow = v2.Compose([*ours.transform.transforms, v2.PILToTensor()])
    paths = [ours.source.root / os.fsdecode(path) for path in ours.source.paths]

    def torchvisions(epoch, indices):
        return default_collate([on_pillow(pil_loader(paths[i])) for i in indices])

    def installed(epoch, indices):
        return ours.__getitems__([(epoch, i, 0) for i in indices])

    def pillow(epoch, indices):
        with mock.patch.object(jpeg, "has_torchvision", lambda: False):
            return installed(epoch, indices)

    def with_copies(epoch, indices):
        return copying.__getitems__([(epoch, i, 0) for i in indices])

    made = {"torchvision: ImageFolder, crops by Pillow": torchvisions, COPYING: with_copies, "Pillow": pillow,
            INSTALLED: installed}
    return made, len(paths)


def seconds(function, *words):
    begin = time.process_time()
    function(*words)
    return time.process_time() - begin


def in_turn(functions, rounds, *words):
    """{name: seconds in each round}; the first round warms up. `words` come behind the number of the round."""
    times = {name: [] for name in functions}
    for i in range(rounds + 1):
        names = list(functions)
        random.Random(i).shuffle(names)
        for name in names:
            times[name].append(seconds(functions[name], i, *words))
    return {name: own[1:] for name, own in times.items()}


def loading(root, args):
    made, number = ways(root)
    indices = list(itertools.islice(itertools.cycle(range(number)), args.images))
    times = in_turn(made, args.rounds, indices)
    return {name: {"images/s": [args.images / t for t in own],
                   "times as fast as with copies": [b / t for b, t in zip(times[COPYING], own, strict=True)]}
            for name, own in times.items()}


def fill(root, number):
    """Hard links, as many in each class folder; ImageNet's names."""
    originals = []
    for first in range(0, number, LINKS):
        originals.append(root / f"original{first}")
        originals[-1].touch()
    for i in range(number):
        folder = root / "set" / "train" / f"n{i % CLASSES:08d}"
        if i < CLASSES:
            folder.mkdir(parents=True)
        os.link(originals[i // LINKS], folder / f"n{i % CLASSES:08d}_{i // CLASSES * 7919 % 100_003}.JPEG")


def listing(args):
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(sys.stderr):
        root = Path(name)
        fill(root, args.files)
        train = str(root / "set" / "train")

        def torchvisions(_):
            make_dataset(train, find_classes(train)[1], extensions=IMG_EXTENSIONS)

        times = in_turn({"torchvision: make_dataset": torchvisions,
                         "a folder for pre-training": lambda _: images.Folder(root / "set", "train"),
                         "a folder with labels": lambda _: images.Folder(root / "set", "train", labelled=True)},
                        args.list_rounds)
    yardstick = times["torchvision: make_dataset"]
    return {name: {"seconds": own, "of torchvision's": [t / y for t, y in zip(own, yardstick, strict=True)]}
            for name, own in times.items()}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="JPEG files, in colour")
    parser.add_argument("--images", type=int, default=64, help="in a batch: the files, again and again")
    parser.add_argument("--rounds", type=int, default=25, help="batches of each way")
    parser.add_argument("--files", type=int, default=0, help="of the list; 0 makes none")
    parser.add_argument("--list_rounds", type=int, default=3, help="lists of each way")
    parser.add_argument("--json", type=Path, default=Path("runs/bench_data.json"), help="file of the numbers")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)

    words = [str(word) for word in (sys.argv[1:] if argv is None else argv)]
    command = " ".join(["python -m tools.bench_data", *words]).replace(str(args.folder), "DIR")
    versions = {"jpeg": jpeg.decoder(), "pillow": Image.__version__, "numpy": np.__version__}
    record = runner.new_record("bench_data", [command], [0], versions=versions, results={})
    with config.user_errors():
        record["results"]["JPEG files to batches of 224 px"] = loading(args.folder, args)
    runner.write(args.json, record)
    if args.files:
        record["results"][f"a list of files, {args.files:,} long"] = listing(args)
        runner.write(args.json, record)
    print("\n\n".join(runner.markdown(title, rows) for title, rows in record["results"].items()))


if __name__ == "__main__":
    main()
