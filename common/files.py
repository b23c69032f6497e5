"""Image files: found, decoded without guessing, refused where that is not possible.

    find_images(root) -> decode(path) -> uint8 (C, h, w);  Folder: a data set of them;  check(root): what is wrong there
"""

import collections
import contextlib
import os
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from common.options import say

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".npy")
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")  # whatever a name says; EPS runs programs
PIL_MODE = {1: "L", 3: "RGB", 4: "RGBA"}


class Broken(ValueError):
    """A file that cannot be used as an image; the message names it and says why."""


@contextlib.contextmanager
def opened(path):
    """The file as a lazy PIL image. Above Pillow's limit of 89 Mpx, where it would only warn, this is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path, formats=FORMATS) as image:
            yield image


def to_bytes(array):
    """uint8 as it is, uint16 (or wider integers that hold 16 bits) / 257, floats from [0, 1] * 255, as uint8."""
    top = 1 if array.dtype.kind == "f" else 65535
    if array.dtype == np.uint8:
        return array
    if not (array.min() >= 0 and array.max() <= top):  # so written, NaN is refused, too
        raise ValueError(f"{array.dtype} values outside [0, {top}]")
    return np.floor(array * (255 / top) + 0.5).astype(np.uint8)


def decode(path, in_chans=3, min_side=0):
    """An image file as uint8 (C, h, w), upright by its EXIF tag; Broken if that cannot be done exactly. in_chans=None
    takes .npy files with any number of channels.

    16 bits are scaled, not cut off as PIL's convert does. Transparency is composited on white (ours): dropping it would
    show whatever colour lies hidden there. .npy holds (H, W, C) or (H, W) of uint8, uint16, or floats in [0, 1].
    # DIFF: a huge JPEG is decoded at 1/2, 1/4 or 1/8 where no crop could have used more pixels (`min_side`).
    """
    try:
        if path.lower().endswith(".npy"):  # mapped, because a header may promise more than the file holds
            array = np.load(path, mmap_mode="r", allow_pickle=False)
            if array.ndim not in (2, 3) or not 0 < array.shape[0] * array.shape[1] <= Image.MAX_IMAGE_PIXELS:
                raise ValueError(f"an array of shape {array.shape}, not (H, W, C)")
            array = to_bytes(np.array(array).reshape(*array.shape[:2], -1))  # (h, w, C)
        elif in_chans not in (None, *PIL_MODE):
            raise ValueError(f"image files have 1, 3 or 4 channels, --in_chans is {in_chans}: that needs a .npy file")
        else:
            with opened(path) as image:
                if min_side:
                    image.draft(None, (min_side, min_side))  # does nothing but to JPEG
                image = ImageOps.exif_transpose(image)
                if image.mode.startswith("I") or image.mode == "F":
                    image = Image.fromarray(to_bytes(np.asarray(image)))
                if in_chans != 4 and image.has_transparency_data:
                    image = image.convert("RGBA")
                    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
                array = np.array(image.convert(PIL_MODE[in_chans or 3]))
        image = torch.from_numpy(array.reshape(*array.shape[:2], -1)).permute(2, 0, 1)  # (C, h, w)
        if in_chans and len(image) != in_chans:
            raise ValueError(f"{len(image)} channels, --in_chans is {in_chans}")
        return image
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, zlib.error, EOFError, ...
        raise Broken(f"{path}: {type(error).__name__}: {error}") from error


def find_images(root):
    """Sorted paths of the images below `root`, relative to it; none that are hidden; links followed, folders once."""
    def refuse(error):
        raise error

    found, visited = [], set()
    for folder, below, files in os.walk(root, followlinks=True, onerror=refuse):
        visited.add(os.path.realpath(folder))
        below[:] = [b for b in sorted(below)
                    if b[0] != "." and os.path.realpath(os.path.join(folder, b)) not in visited]
        found += [os.path.relpath(os.path.join(folder, f), root) for f in files
                  if f[0] != "." and f.lower().endswith(EXTENSIONS)]
    return sorted(found)


class Folder:
    """Image files: root/train/CLASS/**, root/val/CLASS/** (and root/test) if `labelled`; else whatever lies below
    root/train, or below root if it has no train/. ValueError or OSError, one line, if that is not what is there."""

    def __init__(self, root, split, in_chans=3, labelled=False, min_side=0):
        root = Path(root)
        if not root.is_dir():
            raise FileNotFoundError(f"--data {root}: no such folder (nor is it one of shapes, cifar10, cifar100)")
        if split == "test" and not (root / "test").is_dir():
            say(f"{root} has no test/: its val/ is taken")
            split = "val"
        if labelled and not ((root / "train").is_dir() and (root / split).is_dir()):
            there = ", ".join(sorted(p.name for p in root.iterdir())[:5]) or "nothing"
            raise ValueError(f"--data {root}: labels need {root}/train/CLASS/ and {root}/{split}/CLASS/; found {there}")
        self.root = root / split if labelled or (root / split).is_dir() else root
        self.in_chans, self.min_side = in_chans, min_side
        self.classes = class_folders(root, split) if labelled else None
        paths = find_images(self.root)
        number = {c: i for i, c in enumerate(self.classes or ())}
        paths = [p for p in paths if not labelled or p.split(os.sep)[0] in number]
        if not paths:
            raise ValueError(f"--data {root}: no images below {self.root}; they end in {' '.join(EXTENSIONS)}")
        self.labels = np.array([number.get(p.split(os.sep)[0], -1) for p in paths])
        for label, n in enumerate(np.bincount(self.labels, minlength=len(number)) if labelled else ()):
            if n == 0:
                raise ValueError(f"--data {root}: class {self.classes[label]} has no images in {self.root}")
        if in_chans not in PIL_MODE and any(not p.lower().endswith(".npy") for p in paths):
            raise ValueError(f"--in_chans {in_chans}: image files have 1, 3 or 4; other numbers need .npy files")
        self.paths = np.array([os.fsencode(p) for p in paths])  # one block: a list of 1.3 M strings would be copied
        # into every worker, page by page, as reference counts change

    def __len__(self):
        return len(self.paths)

    def load(self, i):
        return decode(str(self.root / os.fsdecode(self.paths[i])), self.in_chans, self.min_side), int(self.labels[i])

    def keep(self, indices):
        self.paths, self.labels = self.paths[indices], self.labels[indices]


def check(root):
    """Decode every image below `root` and print what is broken, odd-sized (under 32 px or over 4:1) or unlabelled (not
    in train/CLASS/, val/CLASS/, test/CLASS/), and the counts per class, mode and size. Returns how many are broken."""
    if not Path(root).is_dir():
        raise FileNotFoundError(f"--check {root}: no such folder")
    listed = {"broken": [], "odd-sized": [], "unlabelled": []}
    counts = {"class": collections.Counter(), "mode": collections.Counter(), "size": collections.Counter()}
    for path in tqdm(find_images(root), disable=None, unit="image"):
        parts, full = path.split(os.sep), os.path.join(root, path)
        labelled = len(parts) > 2 and parts[0] in ("train", "val", "test")
        counts["class"]["/".join(parts[:2]) if labelled else "none"] += 1
        if not labelled:
            listed["unlabelled"].append(path)
        try:
            image = decode(full, in_chans=None)
        except Broken as error:
            listed["broken"].append(" ".join(str(error).split()))
            continue
        if path.lower().endswith(".npy"):
            counts["mode"][f"npy with {len(image)} channels"] += 1
        else:
            with opened(full) as file:
                counts["mode"][file.mode] += 1
        h, w = image.shape[1:]
        counts["size"][f"{h}x{w}"] += 1
        if min(h, w) < 32 or max(h, w) > 4 * min(h, w):
            listed["odd-sized"].append(f"{path}: {h}x{w}")
    for what, counter in counts.items():
        print(f"{what:>10}: " + (", ".join(f"{key} {n}" for key, n in counter.most_common(20)) or "none"))
    for what, paths in listed.items():
        print(f"{what:>10}: {len(paths)}", *(paths if what == "broken" else paths[:20]), sep="\n            ")
    return len(listed["broken"])


def class_folders(root, split):
    """Sorted names of the class folders of root/train; ValueError if root/split has others, or if fewer than 2."""
    train, other = ({p.name for p in (root / s).iterdir() if p.is_dir() and p.name[0] != "."} for s in ("train", split))
    if len(train) < 2:
        raise ValueError(f"--data {root}: {root}/train holds {len(train)} class folder(s); labels need at least 2")
    if train != other:
        name = min(train ^ other)
        here, missing = ("train", split) if name in train else (split, "train")
        raise ValueError(f"--data {root}: class {name} is in {here}/ but not in {missing}/")
    return sorted(train)
