"""Decode every image below a folder and list what is wrong: before a run of days, not during it.

    python -m tools.check_images DIR                          # exit code 1 if anything is broken
    python -m tools.check_images DIR --value_range 0,10000    # of images of more than 8 bits

Listed are files that cannot be decoded, odd sizes (under 32 px or over 4:1), and what has no label because it lies in
none of train/CLASS/, val/CLASS/, test/CLASS/; counted are images per class, mode and size, and files that are passed
over, by suffix. The numbers in the files are summed up for each channel, and so are mean and std as --mean and --std
take them.
"""

import argparse
import collections
import functools
import os
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common import images
from common.config import fail, join_values, parse_value, printable, user_errors
from common.images import Broken, decode, opened


class Channels:
    """Minimum, mean, maximum and standard deviation of each channel of arrays (h, w, C), as they come in."""

    def __init__(self, C):
        self.count, self.sum, self.squares = 0, np.zeros(C), np.zeros(C)
        self.low, self.high = np.full(C, np.inf), np.full(C, -np.inf)

    def add(self, array):
        pixels = array.reshape(-1, len(self.sum)).astype(np.float64)  # (h*w, C)
        self.count += len(pixels)
        self.sum += pixels.sum(axis=0)
        self.squares += np.square(pixels).sum(axis=0)
        self.low, self.high = np.minimum(self.low, pixels.min(axis=0)), np.maximum(self.high, pixels.max(axis=0))

    def mean_std(self):
        mean = self.sum / self.count
        return mean, np.sqrt(np.maximum(self.squares / self.count - mean**2, 0))


def numbers_in(path):
    """(mode, numbers (h, w, C)) of an image file, as they are in it."""
    if path.lower().endswith(".npy"):
        array = images.read_array(path)
        mode = f"npy of {array.dtype}"
    else:
        array = images.wide_numbers(path)
        with opened(path) as image:
            mode = image.mode
            if array is None:
                array = np.array(image.convert("RGB") if mode in ("P", "PA") else image)
    return mode, array.reshape(*array.shape[:2], -1)


def check(root, value_range=()):
    """Print what is wrong with the images below `root`, and what is in them. Returns how many are broken."""
    if not Path(root).is_dir():
        raise FileNotFoundError(f"{root}: no such folder")
    lists = {"broken": [], "odd-sized": [], "unlabelled": []}
    counts = {"class": collections.Counter(), "mode": collections.Counter(), "size": collections.Counter()}
    raw, decoded = {}, {}  # {mode and number of channels: Channels}, {number of channels: Channels}
    found = list(images.files_below(root))
    paths = sorted(filter(images.is_image, found))
    if not value_range:
        value_range = images.first_range(Path(root) / "train" if (Path(root) / "train").is_dir() else Path(root))
    for path in tqdm(paths, disable=None, unit="image"):
        folders = path.split(os.sep)[:-1]
        has_label = len(folders) >= 2 and folders[0] in ("train", "val", "test")
        counts["class"]["/".join(folders[:2]) if has_label else "none"] += 1
        if not has_label:
            lists["unlabelled"].append(path)

        whole = os.path.join(root, path)
        try:
            image = decode(whole, None, value_range=value_range)
            with images.reading(whole):
                mode, array = numbers_in(whole)
        except Broken as error:
            lists["broken"].append(" ".join(str(error).split()))
            continue
        C, h, w = image.shape
        counts["mode"][f"npy with {C} channels" if mode.startswith("npy") else mode] += 1
        counts["size"][f"{h}x{w}"] += 1
        raw.setdefault((mode, array.shape[2]), Channels(array.shape[2])).add(array)
        decoded.setdefault(C, Channels(C)).add(image.permute(1, 2, 0).numpy() / 255)
        if min(h, w) < 32 or max(h, w) > 4 * min(h, w):
            lists["odd-sized"].append(f"{path}: {h}x{w}")

    passed_over = images.count_suffixes(set(found) - set(paths))
    used = images.count_suffixes(paths)
    print(f"{'files':>10}: {len(paths)} images, {used or 'none'}; passed over: {passed_over or 'none'}")
    for name, counter in counts.items():
        most_common = ", ".join(f"{printable(key)} {n}" for key, n in counter.most_common(20))
        print(f"{name:>10}: {most_common or 'none'}")
    for (mode, C), channels in raw.items():
        mean, _ = channels.mean_std()
        print(f"{'values':>10}: {mode}, {C} channel(s): minimum {listed(channels.low)}, mean {listed(mean)}, "
              f"maximum {listed(channels.high)}")
    for C, channels in decoded.items():
        mean, std = channels.mean_std()
        print(f"{'statistics':>10}: of {C} channels, white being 1: --mean {listed(mean)} --std {listed(std)}")
    for name, lines in lists.items():
        shown = lines if name == "broken" else lines[:20]
        print(f"{name:>10}: {len(lines)}", *map(printable, shown), sep="\n            ")
    return len(lists["broken"])


def listed(numbers):
    return ",".join(f"{number:.4g}" for number in numbers)


def main(argv=None):
    parser = argparse.ArgumentParser(usage="python -m tools.check_images DIR [--value_range A,B]", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", help="one folder")
    kind = functools.partial(parse_value, "value_range", tuple[float, float])
    parser.add_argument("--value_range", type=kind, default=(), help="black,white; as in the first images if not given")
    args = parser.parse_args(join_values(sys.argv[1:] if argv is None else argv))
    if len(args.folders) != 1:
        fail(f"usage: {parser.usage}")
    with user_errors():
        num_broken = check(args.folders[0], args.value_range)
    raise SystemExit(1 if num_broken else 0)


if __name__ == "__main__":
    main()
