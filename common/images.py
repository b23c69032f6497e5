"""Image files: found, decoded without guessing to uint8 (C, h, w), refused where that is not possible."""

import contextlib
import os
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from common.config import print_once
from common.folder import require_regular

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".npy")
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")  # whatever a name says; EPS runs programs
PIL_MODE = {1: "L", 3: "RGB", 4: "RGBA"}


class Broken(ValueError):
    """A file that cannot be used as an image; the message names it and says why."""


@contextlib.contextmanager
def opened(path):
    """The file as a lazy PIL image. Above 89 Mpx, where Pillow would only warn, this is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path, formats=FORMATS) as image:
            yield image


def to_bytes(array):
    """uint8 as it is, uint16 (or wider integers that hold 16 bits) / 257, floats from [0, 1] * 255, as uint8."""
    if array.dtype == np.uint8:
        return array
    top = 1 if array.dtype.kind == "f" else 65535
    if not (array.min() >= 0 and array.max() <= top):  # so written, NaN is refused, too
        raise ValueError(f"{array.dtype} values outside [0, {top}]")
    return np.floor(array * (255 / top) + 0.5).astype(np.uint8)


def decode(path, in_chans=3, min_side=0):
    """An image file as uint8 (C, h, w), upright by its EXIF tag; Broken if that cannot be done exactly. in_chans=None
    takes .npy files with any number of channels."""
    try:
        require_regular(path)
        is_npy = path.lower().endswith(".npy")
        array = read_array(path) if is_npy else read_picture(path, in_chans, min_side)
        array = array.reshape(*array.shape[:2], -1)  # (h, w, C)
        if in_chans and array.shape[2] != in_chans:
            raise ValueError(f"{array.shape[2]} channels, --in_chans is {in_chans}")
        return torch.from_numpy(array).permute(2, 0, 1)  # (C, h, w)
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, zlib.error, EOFError, ...
        raise Broken(f"{path}: {type(error).__name__}: {error}") from error


def read_array(path):
    """A .npy file, (h, w, C) or (h, w), of uint8, uint16, or floats in [0, 1], as uint8."""
    array = np.load(path, mmap_mode="r", allow_pickle=False)  # mapped: a header may promise more than the file holds
    if array.ndim not in (2, 3) or not 0 < array.shape[0] * array.shape[1] <= Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"an array of shape {array.shape}, not (H, W, C)")
    return to_bytes(np.array(array))


def read_picture(path, in_chans, min_side):
    """A picture file as uint8 (h, w, C), or (h, w) of grey. 16 bits are scaled, not cut off as PIL's convert does.
    Transparency is composited on white (ours): dropping it would show whatever colour lies hidden there."""
    if in_chans not in (None, *PIL_MODE):
        raise ValueError(f"image files have 1, 3 or 4 channels, --in_chans is {in_chans}: that needs a .npy file")
    with opened(path) as image:
        # DIFF: a huge JPEG is decoded at 1/2, 1/4 or 1/8 where no crop could have used more pixels (`min_side`).
        if min_side:
            image.draft(None, (min_side, min_side))  # does nothing to other formats
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I") or image.mode == "F":
            image = Image.fromarray(to_bytes(np.asarray(image)))
        if in_chans != 4 and image.has_transparency_data:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        return np.array(image.convert(PIL_MODE[in_chans or 3]))


def find_images(root):
    """Sorted paths of the images below `root`, relative to it; none that are hidden; links followed, folders once."""
    def refuse(error):
        raise error

    found, visited = [], set()
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=refuse):
        visited.add(os.path.realpath(folder))
        # os.walk goes on with what is left in this list.
        subfolders[:] = [name for name in sorted(subfolders)
                         if name[0] != "." and os.path.realpath(os.path.join(folder, name)) not in visited]
        for name in names:
            if name[0] != "." and name.lower().endswith(EXTENSIONS):
                found.append(os.path.relpath(os.path.join(folder, name), root))
    return sorted(found)


def class_folders(root, split):
    """Sorted names of the class folders of root/train; ValueError if root/split has others, or if fewer than 2."""
    def names(folder):
        return {path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != "."}

    train, other = names(root / "train"), names(root / split)
    if len(train) < 2:
        raise ValueError(f"--data {root}: {root}/train holds {len(train)} class folder(s); labels need at least 2")
    if train != other:
        name = min(train ^ other)
        here, missing = ("train", split) if name in train else (split, "train")
        raise ValueError(f"--data {root}: class {name} is in {here}/ but not in {missing}/")
    return sorted(train)


class Folder:
    """A source (see data.py) of image files: root/train/CLASS/**, root/val/CLASS/** (and root/test) if `labelled`; else
    whatever lies below root/train, or below root if it has no train/. `pick`, ValueError, OSError: see open_source."""

    def __init__(self, root, split, in_chans=3, labelled=False, min_side=0, pick=None):
        root = Path(root)
        if not root.is_dir():
            raise FileNotFoundError(f"--data {root}: no such folder (nor is it one of shapes, cifar10, cifar100)")
        if split == "test" and not (root / "test").is_dir():
            print_once(f"{root} has no test/: its val/ is taken")
            split = "val"
        if labelled and not ((root / "train").is_dir() and (root / split).is_dir()):
            found = ", ".join(sorted(path.name for path in root.iterdir())[:5]) or "nothing"
            raise ValueError(f"--data {root}: labels need {root}/train/CLASS/ and {root}/{split}/CLASS/; found {found}")

        self.root = root / split if labelled or (root / split).is_dir() else root
        self.in_chans, self.min_side = in_chans, min_side
        self.classes = class_folders(root, split) if labelled else None

        number = {name: label for label, name in enumerate(self.classes or [])}
        paths = find_images(self.root)
        if labelled:  # what lies in no class folder has no label
            paths = [path for path in paths if path.split(os.sep)[0] in number]
        labels = np.array([number.get(path.split(os.sep)[0], -1) for path in paths])
        if not paths:
            raise ValueError(f"--data {root}: no images below {self.root}; they end in {' '.join(EXTENSIONS)}")
        if empty := set(number.values()) - set(labels.tolist()):
            raise ValueError(f"--data {root}: class {self.classes[min(empty)]} has no images in {self.root}")
        if in_chans not in PIL_MODE and any(not path.lower().endswith(".npy") for path in paths):
            raise ValueError(f"--in_chans {in_chans}: image files have 1, 3 or 4; other numbers need .npy files")

        # One block of bytes: a list of 1.3 M strings would be copied into every worker, as reference counts change.
        kept = pick(labels) if pick else slice(None)
        self.paths, self.labels = np.array([os.fsencode(path) for path in paths])[kept], labels[kept]

    def __len__(self):
        return len(self.paths)

    def load(self, i):
        path = self.root / os.fsdecode(self.paths[i])
        return decode(str(path), self.in_chans, self.min_side), int(self.labels[i])
