"""Images with a label for every pixel: `shapes`, or a folder. An image and its label are cropped and flipped as one.

    DATA/classes.txt              --task segment: one name a line; the first line is class 0
    DATA/train/images/NAME.jpg    any image that pre-training takes, too; DATA/val and DATA/test look the same
    DATA/train/labels/NAME.png    --task segment: class numbers, grey or palette; 255 is unknown (--unknown), and others
                                  may have other numbers there (--class_map 128:1)
                                  --task depth: 16 bits, distance in steps of 1 / --depth_scale metres; 0 is unknown
    DATA/train/labels/NAME.npy    instead of it: class numbers, or distances in metres if the numbers are floats
"""

import contextlib
import functools
import os
from pathlib import Path

import numpy as np
import torch
from PIL import ImageOps
from torchvision import tv_tensors
from torchvision.transforms import v2

import data
from common import images
from common.config import print_once, printable
from common.folder import require_regular
from common.shapes import SHAPES, shapes_batch
from common.transforms import augmentation, with_defaults
from tools.dense_tasks import UNKNOWN, heat_maps


class DenseShapes(data.Memory):
    """The embedded data. Segment: 0 for ground and bars, 1 to 10 for the visible part of a shape, by its class. Depth:
    metres. Keypoints: heat maps (2, 64, 64) of a shape's centre and tip. `pick` as in data.open_source."""

    def __init__(self, split, task, in_chans=3, pick=None):
        made = shapes_batch(0, data.shapes_numbers(split, pick))
        super().__init__(made["image"].transpose(0, 3, 1, 2), made["label"], ["ground", *SHAPES], in_chans)
        shape = made["mask"] * (1 + made["label"]).astype(np.uint8)[:, None, None]  # (n, 64, 64)
        self.task, found = task, {"segment": shape, "depth": made["depth"], "keypoints": made["keypoints"]}
        self.truth = torch.from_numpy(found[task])  # (n, 64, 64), or (n, 2, 2)

    def load(self, i):
        image, label = super().load(i)
        truth = heat_maps(self.truth[i], image.shape[1:]) if self.task == "keypoints" else self.truth[i]
        return (tv_tensors.Image(image), tv_tensors.Mask(truth)), label


def class_map(text):
    """{number in a label file: class} of --class_map, as 255:1,7:2. ValueError if it is something else."""
    pairs = [pair.split(":") for pair in text.split(",") if text]
    try:
        return {int(number): int(label) for number, label in pairs}
    except ValueError:
        raise ValueError(f"--class_map takes pairs such as 255:1,7:2, not {text!r}") from None


class DenseFolder(images.Folder):
    """Images below root/SPLIT/images, labels of the same names below root/SPLIT/labels. OSError if one is missing.
    `unknown`, `renamed`: --unknown, and what class_map makes of --class_map; `value_range` as in data.open_source."""

    def __init__(self, root, split, task, in_chans=3, depth_scale=1000.0, pick=None, unknown=UNKNOWN, renamed=None,
                 value_range=()):
        for name in ("images", "labels"):
            if not (Path(root) / split / name).is_dir():
                raise FileNotFoundError(f"--data {root}: no folder {split}/{name}; dense_data.py shows what goes where")
        train = Path(root) / "train" / "images"
        if not value_range and split != "train" and train.is_dir():
            value_range = images.first_range(train)
        # No split: whatever lies below images/ is an image, in a folder or not.
        super().__init__(Path(root) / split / "images", "", in_chans, value_range=value_range)
        self.task, self.depth_scale, self.unknown, self.renamed = task, depth_scale, unknown, renamed or {}
        self.classes = read_classes(Path(root) / "classes.txt") if task == "segment" else None
        if missing := [path for path in map(self.label_path, range(len(self))) if not path.exists()]:
            raise FileNotFoundError(f"--data {root}: {len(missing)} of {len(self)} images have no label: {missing[0]} "
                                    "(nor .npy) does not exist")
        if pick:
            kept = pick(self.labels)
            self.paths, self.labels = self.paths[kept], self.labels[kept]

    def label_path(self, i):
        path = self.root.parent / "labels" / os.fsdecode(self.paths[i])
        array = path.with_suffix(".npy")
        return array if array.exists() else path.with_suffix(".png")

    def load(self, i):
        """((image uint8 (C, h, w), label (h, w)), 0); the label int64 classes or float32 metres. Broken if one of
        them cannot be read, if EXIF turns one alone, if their sizes differ, or if a class has no name."""
        image, path = super().load(i)[0], self.label_path(i)
        with images.reading(str(path)):
            turned = [images.orientation(str(file)) for file in (self.root / os.fsdecode(self.paths[i]), path)]
            if turned[0] != turned[1]:
                raise ValueError(f"the image has the EXIF orientation {turned[0]}, and this label {turned[1]}: turn "
                                 "the pixels of both, and remove the tags")
            label = self.read(path)
            if label.shape != image.shape[1:]:
                h, w = image.shape[1:]
                raise ValueError(f"a label of {label.shape[0]}x{label.shape[1]} pixels for an image of {h}x{w}")
        return (tv_tensors.Image(image), tv_tensors.Mask(label)), 0

    def read(self, path):
        require_regular(path)
        if path.suffix == ".npy":
            array = np.load(path, allow_pickle=False)
        else:
            with images.opened(path) as image:
                array = np.array(ImageOps.exif_transpose(image))  # of a palette image, the numbers of its colours
        if array.ndim != 2 or array.dtype.kind not in ("iub" if self.task == "segment" else "iuf"):
            raise ValueError(f"{array.dtype} of shape {array.shape} where one number a pixel is expected")
        if self.task == "depth":
            if array.dtype == np.uint8:
                raise ValueError("8 bits do not hold a distance; 16-bit PNG or .npy do")
            metres = array.astype(np.float32) / (1 if array.dtype.kind == "f" else self.depth_scale)
            return torch.from_numpy(np.where(np.isfinite(metres), metres, np.float32(0)))
        return torch.from_numpy(self.classes_of(array.astype(np.int64)))

    def classes_of(self, numbers):
        """Numbers of a label file (h, w) -> classes, UNKNOWN where nobody labelled. ValueError for one without name."""
        label, K = numbers.copy(), len(self.classes)
        for number, renamed in self.renamed.items():
            label[numbers == number] = renamed
        is_known = (numbers != self.unknown) | np.isin(numbers, list(self.renamed))  # (h, w)
        known = label[is_known]
        if known.size and not 0 <= known.min() <= known.max() < K:
            raise ValueError(f"classes {known.min()} to {known.max()}, but classes.txt names 0 to {K - 1}, and "
                             f"{self.unknown} is unknown; --class_map {known.max()}:1 would make it class 1")
        label[~is_known] = UNKNOWN
        return label

    def require_classes(self, n=100):
        """Look at n labels, or all, evenly spaced. Print which classes none of them has; ValueError if there is one
        class at most beside what is unknown, as in a mask of 0 and 255: any prediction would be right."""
        found = set()
        looked_at = sorted({i * len(self) // n for i in range(n)})
        for i in looked_at:
            with contextlib.suppress(images.Broken), images.reading(str(self.label_path(i))):  # named when it is loaded
                found |= set(self.read(self.label_path(i)).unique().tolist())
        if not found:
            return
        missing = [number for number in range(len(self.classes)) if number not in found]
        names = ", ".join(f"{number} ({printable(self.classes[number])})" for number in missing[:10])
        where = f"{printable(self.root.parent / 'labels')}: of {len(looked_at)} labels that were looked at, none has"
        if UNKNOWN in found and len(found) <= 2:
            way_out = f"--unknown -1 --class_map {self.unknown}:{missing[0]}"
            raise ValueError(f"{where} class {names}, and {self.unknown} means unknown, which leaves one class at "
                             f"most; if {self.unknown} is a class: {way_out}")
        if missing:
            print_once(f"{where} class {names}")


def read_classes(path):
    """The lines of a text file. FileNotFoundError without it, ValueError unless they are 2 to 255 different names."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; --task segment reads the names of its classes there")
    try:
        classes = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}") from error
    if not 2 <= len(set(classes)) == len(classes) <= UNKNOWN:
        raise ValueError(f"{path} should hold 2 to {UNKNOWN} different names, one a line, not {len(classes)}")
    return classes


def dense_set(cfg, split):
    """A split of --data whose batches are [imgs uint8 (B, C, H, W), labels (B, H, W) or heat maps (B, K, H, W)]; train
    is cut to --labels images and augmented, others are resized to --img_size. ValueError or OSError on what does not
    fit."""
    train = split == "train"
    pick = functools.partial(data.balanced, n=cfg.labels, seed=cfg.seed) if cfg.labels and train else None
    if cfg.data == "shapes":
        source = DenseShapes(split, cfg.task, cfg.in_chans, pick)
    elif cfg.task == "keypoints":
        raise ValueError(f"--data {cfg.data}: --task keypoints is for shapes, which knows where they are")
    else:
        source = DenseFolder(cfg.data, split, cfg.task, cfg.in_chans, cfg.depth_scale, pick, cfg.unknown,
                             class_map(cfg.class_map), cfg.value_range)
        if cfg.task == "segment":
            source.require_classes()
    # DIFF: a validation image is resized to --img_size with its label, and counted there; UM-MAE slides a window.
    plain = v2.Resize(cfg.img_size, v2.InterpolationMode(with_defaults(cfg).interpolation))
    steps = [augmentation(cfg, v2.Resize) if train else plain, v2.ToPureTensor()]
    return data.Images(source, v2.Compose(steps), cfg.seed, cfg.max_bad, substitutes=20 if train else 0)
