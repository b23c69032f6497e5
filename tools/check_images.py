"""Decode every image below a folder and list what is wrong: before a run of days, not during it.

    python -m tools.check_images DIR    # exit code 1 if anything is broken

Listed are files that cannot be decoded, odd sizes (under 32 px or over 4:1), and what has no label because it lies in
none of train/CLASS/, val/CLASS/, test/CLASS/; counted are images per class, mode and size.
"""

import argparse
import collections
import os
from pathlib import Path

from tqdm import tqdm

from common.config import fail, user_errors
from common.images import Broken, decode, find_images, opened


def check(root):
    """Print what is wrong with the images below `root`. Returns how many are broken."""
    if not Path(root).is_dir():
        raise FileNotFoundError(f"{root}: no such folder")
    lists = {"broken": [], "odd-sized": [], "unlabelled": []}
    counts = {"class": collections.Counter(), "mode": collections.Counter(), "size": collections.Counter()}
    for path in tqdm(find_images(root), disable=None, unit="image"):
        folders = path.split(os.sep)[:-1]
        has_label = len(folders) >= 2 and folders[0] in ("train", "val", "test")
        counts["class"]["/".join(folders[:2]) if has_label else "none"] += 1
        if not has_label:
            lists["unlabelled"].append(path)

        try:
            C, h, w = decode(os.path.join(root, path), in_chans=None).shape
        except Broken as error:
            lists["broken"].append(" ".join(str(error).split()))
            continue
        mode = f"npy with {C} channels"
        if not path.lower().endswith(".npy"):
            with opened(os.path.join(root, path)) as file:
                mode = file.mode
        counts["mode"][mode] += 1
        counts["size"][f"{h}x{w}"] += 1
        if min(h, w) < 32 or max(h, w) > 4 * min(h, w):
            lists["odd-sized"].append(f"{path}: {h}x{w}")

    for name, counter in counts.items():
        most_common = ", ".join(f"{key} {n}" for key, n in counter.most_common(20))
        print(f"{name:>10}: {most_common or 'none'}")
    for name, lines in lists.items():
        shown = lines if name == "broken" else lines[:20]
        print(f"{name:>10}: {len(lines)}", *shown, sep="\n            ")
    return len(lists["broken"])


def main(argv=None):
    parser = argparse.ArgumentParser(usage="python -m tools.check_images DIR", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", help="one folder")
    folders = parser.parse_args(argv).folders
    if len(folders) != 1:
        fail(f"usage: {parser.usage}")
    with user_errors():
        num_broken = check(folders[0])
    raise SystemExit(1 if num_broken else 0)


if __name__ == "__main__":
    main()
