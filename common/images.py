"""Image files: found, decoded without guessing to uint8 (C, h, w), refused where that is not possible."""

import collections
import contextlib
import itertools
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from common import files, jpeg, processes
from common.config import print_once, printable
from common.files import EXTENSIONS, opened
from common.folder import require_regular

PIL_MODE = {1: "L", 3: "RGB", 4: "RGBA"}
EIGHT_BITS = (".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".gif", ".webp", ".avif")  # hold no more, whatever is in them
SUFFIXES = frozenset(EXTENSIONS)
FIRST = 32  # images of which the range is taken
LOOKED_AT = 10_000  # files, at most, among which these are: a second or so


class Broken(ValueError):
    """A file that cannot be used as an image; the message names it and says why."""


def to_bytes(array, value_range=None):
    """Numbers as uint8, of which `value_range` (low, high) are 0 and 255; what lies beyond is cut off. Bytes stay.
    Without a range, integers in 0..255 are what they say, and floats in 0..1 are shares of white. Others have their own
    range if it is None, and raise ValueError if it is empty."""
    if array.dtype == np.uint8:
        return array
    if array.dtype == bool:
        return array * np.uint8(255)
    if array.dtype.kind not in "iuf":
        raise ValueError(f"{array.dtype} is no kind of number that a pixel has")

    is_float, lowest, highest = array.dtype.kind == "f", array.min(), array.max()
    top = 1 if is_float else 255
    if not value_range:
        fits = 0 <= lowest and highest <= top  # so written, NaN does not
        if not fits and (is_float or value_range is not None):
            raise ValueError(f"{array.dtype} values {lowest:g} to {highest:g}, outside [0, {top}]: --value_range says "
                             "which are black and white")
        value_range = (0, top) if fits else (lowest, highest)
    if not np.isfinite([lowest, highest]).all():
        raise ValueError(f"{array.dtype} values that are not finite")
    low, high = map(float, value_range)
    share = (array.astype(np.float64).clip(low, high) - low) * 255 / (high - low or 1)
    return np.floor(share + 0.5).astype(np.uint8)


def decode(path, in_chans=3, min_side=0, value_range=None):
    """An image file as uint8 (C, h, w), upright by its EXIF tag; Broken if that cannot be done exactly. in_chans=None
    takes .npy files with any number of channels. `value_range`: see to_bytes."""
    with reading(path):
        if path.lower().endswith(".npy"):
            array = to_bytes(read_array(path), value_range)
        else:
            array = read_picture(path, in_chans, min_side, value_range)
        array = array.reshape(*array.shape[:2], -1)  # (h, w, C)
        if in_chans and array.shape[2] != in_chans:
            raise ValueError(f"{array.shape[2]} channels, --in_chans is {in_chans}")
        return torch.from_numpy(array).permute(2, 0, 1)  # (C, h, w)


@contextlib.contextmanager
def reading(path):
    """Turn whatever goes wrong into Broken."""
    try:
        yield
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, zlib.error, EOFError, ...
        raise Broken(f"{printable(path)}: {type(error).__name__}: {error}") from error


def read_array(path):
    """A .npy file, (h, w, C) or (h, w), of numbers."""
    require_regular(path)
    array = np.load(path, mmap_mode="r", allow_pickle=False)  # mapped: a header may promise more than the file holds
    if array.ndim not in (2, 3) or not array.size or array.shape[0] * array.shape[1] > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"an array of shape {array.shape}, not (H, W, C)")
    return np.array(array)


def read_picture(path, in_chans, min_side, value_range):
    """A picture file as uint8 (h, w, C), or (h, w) of grey. Its numbers are scaled, not cut off as PIL's convert does.
    Transparency is composited on white (ours): dropping it would show whatever colour lies hidden there."""
    if in_chans not in (None, *PIL_MODE):
        raise ValueError(f"image files have 1, 3 or 4 channels, --in_chans is {in_chans}: that needs a .npy file")
    with opened(path) as image:
        bands = files.unknown_bands(image)
        if bands and not bands == (in_chans or bands) == 4:
            raise ValueError(f"{bands} channels, not all of them colours, --in_chans is {in_chans}: .npy holds any")
        wide = files.numbers(image, path)
        if wide is not None:
            turn = files.orientation(image)  # after loading, which turns a TIFF
            image = from_numbers(wide, value_range, bands, files.is_negative(image))
            image.getexif()[files.ORIENTATION] = turn
        else:
            size = image.size
            if min_side:
                # DIFF: a huge JPEG is decoded at 1/2, 1/4 or 1/8 where no crop could have used more pixels
                # (`min_side`).
                image.draft(None, (min_side, min_side))  # does nothing to other formats
            if image.size == size and image.mode == PIL_MODE[in_chans or 3]:
                array = jpeg.decode(image)
                if array is not None:
                    return jpeg.upright(array, files.orientation(image))
        ImageOps.exif_transpose(image, in_place=True)  # no copy of those that are upright

        if bands:  # as they are; of RGB, Pillow keeps the fourth as padding
            (w, h), mode = image.size, "RGBX" if image.mode == "RGB" else "RGBA"
            return np.frombuffer(bytearray(image.tobytes("raw", mode)), np.uint8).reshape(h, w, 4)
        if in_chans != 4 and image.has_transparency_data:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        mode = PIL_MODE[in_chans or 3]
        return np.array(image if image.mode == mode else image.convert(mode))


def from_numbers(array, value_range, bands, is_negative):
    """A PIL image of the numbers (h, w[, C]) of a picture. Its transparency is a share of 16 bits, not of a range."""
    colours = array
    if array.ndim == 3 and not bands:
        colours = array[..., :3]
    pixels = to_bytes(colours, value_range)
    if colours.shape != array.shape:
        pixels = np.concatenate([pixels, to_bytes(array[..., 3:], (0, 65535))], axis=2)  # (h, w, 4)
    return Image.fromarray(255 - pixels if is_negative else pixels)


def files_below(root):
    """Paths of all files below `root`, relative to it; none that are hidden; links followed, folders once. In order of
    folders, and of names in each."""
    def refuse(error):
        raise error

    visited = set()
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=refuse):
        # os.walk goes on with what is left in this list. A folder and a link to it may wait in it beside each other.
        real = os.path.realpath(folder)
        subfolders[:] = sorted(name for name in subfolders if name[0] != "." and real not in visited)
        if real in visited:
            continue
        visited.add(real)
        # Once a folder: for each of a million files, relpath would take most of the time.
        here = os.path.relpath(folder, root)
        prefix = "" if here == os.curdir else here + os.sep
        yield from [prefix + name for name in sorted(names) if name[0] != "."]


def list_files(root):
    return list(files_below(root))


def suffix_of(path):
    """As .jpg, in lower case; something that is no suffix if there is none."""
    return path[path.rfind("."):].lower()


def is_image(path):
    return suffix_of(path) in SUFFIXES


def find_images(root):
    """Sorted paths of the images below `root`, relative to it; see `files_below`."""
    return sorted(filter(is_image, files_below(root)))


def count_suffixes(paths):
    """How many files end in what, in one line: 3 .heic, 1 .txt."""
    counter = collections.Counter(Path(path).suffix.lower() or "without suffix" for path in paths)
    by_number = sorted(counter.items(), key=lambda pair: (-pair[1], pair[0]))
    return ", ".join(f"{n} {printable(suffix)}" for suffix, n in by_number)


def first_range(root):
    """`shared_range` of the FIRST images below `root` that have more than 8 bits."""
    candidates = (os.path.join(root, path) for path in files_below(root) if may_be_wide(path))
    return shared_range(itertools.islice(candidates, LOOKED_AT), root, FIRST)


def shared_range(paths, name, most=None):
    """(lowest, highest) number in image files of more than 8 bits, of the first `most`, with a line that says so; () if
    there are none, or if no range is needed (see to_bytes). ValueError if integers and floats would share one. `name`:
    of all of them."""
    lows, highs, kinds, is_needed = [], [], set(), False
    for path in paths:
        with contextlib.suppress(Broken):  # it is named when it is loaded
            array = wide_numbers(path, has_alpha=False)
            if array is None or not np.isfinite([array.min(), array.max()]).all():
                continue
            lows.append(float(array.min()))
            highs.append(float(array.max()))
            kinds.add(array.dtype.kind == "f")
            is_needed = is_needed or lows[-1] < 0 or highs[-1] > (1 if array.dtype.kind == "f" else 255)
        if len(lows) == most:
            break
    if not is_needed:
        return ()
    low, high = min(lows), max(highs)
    high += low == high  # black is not white
    if len(kinds) > 1:
        raise ValueError(f"{name} holds integers and floats: --value_range has to say what is black and white in both")
    print_once(f"{printable(name)}: numbers of more than 8 bits; black is {low:g} and white {high:g}, as in the first "
               f"{len(lows)} images that have them (--value_range {low:g},{high:g} would say so)")
    return low, high


def orientation(path):
    """How the picture in an image file is turned when it is decoded, by its EXIF tag; 1 if not at all."""
    if path.lower().endswith(".npy"):
        return 1
    with opened(path) as image:
        return files.orientation(image)


def may_be_wide(path):
    return is_image(path) and suffix_of(path) not in EIGHT_BITS


def wide_numbers(path, has_alpha=True):
    """The numbers of an image file if they have more than 8 bits, or else None; Broken if it cannot be read. Without
    its transparency if not `has_alpha`."""
    with reading(path):
        if path.lower().endswith(".npy"):
            array = read_array(path)
            return array if array.dtype.kind in "iuf" and array.dtype != np.uint8 else None
        with opened(path) as image:
            array = files.numbers(image, path)
            is_rgba = array is not None and array.ndim == 3 and array.shape[2] == 4
            return array[..., :3] if is_rgba and not has_alpha else array


def class_folders(root, split, alone=False):
    """Sorted names of the class folders of root/split. ValueError if those of root/train are others, unless the split
    counts `alone`, or if they are fewer than 2."""
    def names(name):
        return {path.name for path in (root / name).iterdir() if path.is_dir() and path.name[0] != "."}

    here = names(split)
    train = here if alone else names("train")
    if not here and any(is_image(path.name) for path in (root / split).iterdir()):
        raise ValueError(f"--data {root}: {root}/{split} holds images and no class folders, as ImageNet's {split} does "
                         f"when it is unpacked: sort them into {root}/{split}/CLASS/")
    if len(train) < 2:
        raise ValueError(f"--data {root}: {root}/{split if alone else 'train'} holds {len(train)} class folder(s); "
                         "labels need at least 2")
    if train != here:
        name = min(train ^ here)
        has, lacks = ("train", split) if name in train else (split, "train")
        raise ValueError(f"--data {root}: class {name} is in {has}/ but not in {lacks}/")
    return sorted(train)


class Folder:
    """A source (see data.py) of image files: root/train/CLASS/**, root/val/CLASS/** (and root/test) if `labelled`; else
    whatever lies below root/train, or below root if it has no train/. Prints how many there are, and what is passed
    over. `pick`, `alone`, `value_range`, ValueError, OSError: see open_source."""

    def __init__(self, root, split, in_chans=3, labelled=False, min_side=0, pick=None, value_range=(), alone=False):
        root = Path(root)
        if not root.is_dir():
            raise FileNotFoundError(f"--data {root}: no such folder (nor is it one of shapes, cifar10, cifar100, or "
                                    "torchvision:NAME, as torchvision:STL10)")
        if split == "test" and not (root / "test").is_dir():
            print_once(f"{root} has no test/: its val/ is taken")
            split = "val"
        if labelled and not ((alone or (root / "train").is_dir()) and (root / split).is_dir()):
            found = ", ".join(sorted(path.name for path in root.iterdir())[:5]) or "nothing"
            others = f"{root}/{'val' if split == 'train' else split}/CLASS/"
            raise ValueError(f"--data {root}: labels need {root}/train/CLASS/ and {others}; found {found}")

        self.root = root / split if labelled or (root / split).is_dir() else root
        self.in_chans, self.min_side = in_chans, min_side
        self.classes = class_folders(root, split, alone) if labelled else None

        number = {name: label for label, name in enumerate(self.classes or [])}
        found = processes.of_main(list_files, self.root)
        paths = sorted(filter(is_image, found))
        labels = np.full(len(paths), -1)
        if labelled:  # what lies in no class folder has no label
            paths = [path for path in paths if path.partition(os.sep)[0] in number]
            labels = np.array([number[path.partition(os.sep)[0]] for path in paths])
        if not paths:
            passed_over = f"; it has {count_suffixes(found)}" if found else ""
            raise ValueError(f"--data {root}: no images below {self.root}; they end in {' '.join(EXTENSIONS)}"
                             + passed_over)
        if empty := set(number.values()) - set(labels.tolist()):
            raise ValueError(f"--data {root}: class {self.classes[min(empty)]} has no images in {self.root}")
        if in_chans not in PIL_MODE and any(not path.lower().endswith(".npy") for path in paths):
            raise ValueError(f"--in_chans {in_chans}: image files have 1, 3 or 4; other numbers need .npy files")

        print_once(f"{printable(self.root)}: {len(paths)} images{passed_over_in(root, self.root, found, paths)}")
        self.value_range = value_range
        if not value_range and any(map(may_be_wide, set(map(suffix_of, paths)))):
            train = root / "train" if (root / "train").is_dir() else self.root
            self.value_range = processes.of_main(first_range, train)

        # One block of bytes: a list of 1.3 M strings would be copied into every worker, as reference counts change.
        kept = pick(labels) if pick else slice(None)
        self.paths, self.labels = np.array(os.fsencode("\0".join(paths)).split(b"\0"))[kept], labels[kept]

    def __len__(self):
        return len(self.paths)

    def load(self, i):
        path = self.root / os.fsdecode(self.paths[i])
        return decode(str(path), self.in_chans, self.min_side, self.value_range), int(self.labels[i])


def passed_over_in(root, taken, found, paths):
    """What of a data set is not taken, for the end of a line: files `found` below `taken` that are none of `paths`, and
    folders of root beside it that are no splits."""
    parts = []
    if len(found) > len(paths):
        others = set(found) - set(paths)
        parts.append(f"files passed over: {count_suffixes(others)}")
    if taken != root:
        beside = {path.name for path in root.iterdir() if path.is_dir() and path.name[0] != "."}
        if beside := sorted(beside - {"train", "val", "test"}):
            parts.append(f"folders passed over: {', '.join(map(printable, beside[:5]))}")
    return "".join(f"; {part}" for part in parts)
