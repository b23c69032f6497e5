"""Images with a label for every pixel: `shapes`, or a folder. An image and its label are cropped and flipped as one.

    DATA/classes.txt              --task segment: one name a line; the first line is class 0
    DATA/train/images/NAME.jpg    any image that pre-training takes, too; DATA/val and DATA/test look the same
    DATA/train/labels/NAME.png    --task segment: class numbers, grey or palette; 255 is unknown
                                  --task depth: 16 bits, distance in steps of 1 / --depth_scale metres; 0 is unknown
    DATA/train/labels/NAME.npy    instead of it: class numbers, or distances in metres if the numbers are floats
"""

import functools
import os
from pathlib import Path

import numpy as np
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

import data
from common import images
from common.folder import require_regular
from common.shapes import SHAPES, shapes_batch
from common.transforms import augmentation, with_defaults
from tools.dense_tasks import UNKNOWN


class DenseShapes(data.Memory):
    """The embedded data. Segment: 0 for ground and bars, 1 to 10 for the visible part of a shape, by its class. Depth:
    metres. `pick` as in data.open_source."""

    def __init__(self, split, task, in_chans=3, pick=None):
        made = shapes_batch(0, data.shapes_numbers(split, pick))
        super().__init__(made["image"].transpose(0, 3, 1, 2), made["label"], ["ground", *SHAPES], in_chans)
        shape = made["mask"] * (1 + made["label"]).astype(np.uint8)[:, None, None]  # (n, 64, 64)
        self.maps = torch.from_numpy(shape if task == "segment" else made["depth"])  # (n, 64, 64)

    def load(self, i):
        image, label = super().load(i)
        return (tv_tensors.Image(image), tv_tensors.Mask(self.maps[i])), label


class DenseFolder(images.Folder):
    """Images below root/SPLIT/images, labels of the same names below root/SPLIT/labels. OSError if one is missing."""

    def __init__(self, root, split, task, in_chans=3, depth_scale=1000.0, pick=None):
        for name in ("images", "labels"):
            if not (Path(root) / split / name).is_dir():
                raise FileNotFoundError(f"--data {root}: no folder {split}/{name}; dense_data.py shows what goes where")
        super().__init__(Path(root) / split / "images", "all", in_chans)
        self.task, self.depth_scale = task, depth_scale
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
        them cannot be read, if their sizes differ, or if a class has no name."""
        image, path = super().load(i)[0], self.label_path(i)
        try:
            label = self.read(path)
            if label.shape != image.shape[1:]:
                h, w = image.shape[1:]
                raise ValueError(f"a label of {label.shape[0]}x{label.shape[1]} pixels for an image of {h}x{w}")
        except Exception as error:  # decoders raise what they like, see images.decode
            raise images.Broken(f"{path}: {type(error).__name__}: {error}") from error
        return (tv_tensors.Image(image), tv_tensors.Mask(label)), 0

    def read(self, path):
        require_regular(path)
        if path.suffix == ".npy":
            array = np.load(path, allow_pickle=False)
        else:
            with images.opened(path) as image:
                array = np.array(image)  # a palette image as the numbers of its colours
        if array.ndim != 2 or array.dtype.kind not in ("iu" if self.task == "segment" else "iuf"):
            raise ValueError(f"{array.dtype} of shape {array.shape} where one number a pixel is expected")
        if self.task == "depth":
            if array.dtype == np.uint8:
                raise ValueError("8 bits do not hold a distance; 16-bit PNG or .npy do")
            metres = array.astype(np.float32) / (1 if array.dtype.kind == "f" else self.depth_scale)
            return torch.from_numpy(np.where(np.isfinite(metres), metres, np.float32(0)))
        known, K = array[array != UNKNOWN], len(self.classes)
        if known.size and not 0 <= known.min() <= known.max() < K:
            raise ValueError(f"classes {known.min()} to {known.max()}, but classes.txt names 0 to {K - 1}, and "
                             f"{UNKNOWN} is unknown")
        return torch.from_numpy(array.astype(np.int64))


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
    """A split of --data whose batches are [imgs uint8 (B, C, H, W), labels (B, H, W)]; train is cut to --labels images
    and augmented, others are resized to --img_size. ValueError or OSError on what does not fit."""
    train = split == "train"
    pick = functools.partial(data.balanced, n=cfg.labels, seed=cfg.seed) if cfg.labels and train else None
    if cfg.data == "shapes":
        source = DenseShapes(split, cfg.task, cfg.in_chans, pick)
    else:
        source = DenseFolder(cfg.data, split, cfg.task, cfg.in_chans, cfg.depth_scale, pick)
    # DIFF: a validation image is resized to --img_size with its label, and counted there; UM-MAE slides a window.
    plain = v2.Resize(cfg.img_size, v2.InterpolationMode(with_defaults(cfg).interpolation))
    steps = [augmentation(cfg, v2.Resize) if train else plain, v2.ToPureTensor()]
    return data.Images(source, v2.Compose(steps), cfg.seed, cfg.max_bad, substitutes=20 if train else 0)
