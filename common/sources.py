"""Where images come from: the embedded shapes, cifar10 and cifar100 through torchvision, or a folder.

A source has len(), .classes (None if unlabelled), .labels, .load(i) -> (uint8 (C, h, w), label or -1), .keep(indices).
"""

import collections
import os

import numpy as np
import torch
import torchvision
from torchvision.transforms import v2

from common.engine import seed_of
from common.files import Folder
from common.shapes import SHAPES, shapes_batch


class Memory:
    """Images that are small enough to stay in memory: uint8 (n, 3, h, w); grey for in_chans 1, else channels repeat."""

    def __init__(self, images, labels, classes, in_chans=3):
        self.images, self.labels = torch.as_tensor(images), np.asarray(labels)
        self.classes, self.in_chans = classes, in_chans

    def __len__(self):
        return len(self.labels)

    def load(self, i):
        image = self.images[i]  # (3, h, w)
        if self.in_chans == 1:
            image = v2.functional.rgb_to_grayscale(image)  # (1, h, w)
        elif self.in_chans != 3:
            image = image[[c % 3 for c in range(self.in_chans)]]  # (C, h, w)
        return image, int(self.labels[i])

    def keep(self, indices):
        self.images, self.labels = self.images[indices], self.labels[indices]


SPLITS = {"train": (0, 20_000), "val": (1_000_000, 2_000), "test": (2_000_000, 2_000)}  # shapes: first image, how many


class Shapes(Memory):
    """The embedded data, see `shapes_batch`. `pick` turns labels into the indices wanted; only these are generated."""

    def __init__(self, split, seed=0, in_chans=3, pick=None):
        first, n = SPLITS[split]
        numbers = np.arange(first, first + n)
        numbers = numbers[pick(numbers % len(SHAPES))] if pick else numbers
        made = shapes_batch(seed, numbers, dense=False)
        super().__init__(made["image"].transpose(0, 3, 1, 2), made["label"], list(SHAPES), in_chans)


def cifar(name, split, in_chans, data_dir, download):
    """CIFAR-10 or -100 through torchvision, which checks every MD5; val and test are the published test set."""
    cls = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
    try:
        published = cls(data_dir, train=split == "train")
    except RuntimeError:
        if not download or int(os.environ.get("WORLD_SIZE", 1)) > 1:  # processes would write the same file
            raise FileNotFoundError(f"--data {name}: not (whole) in {data_dir}; a run of one process with --download "
                                    "fetches it, 170 MB") from None
        published = cls(data_dir, train=split == "train", download=True)
    return Memory(published.data.transpose(0, 3, 1, 2).copy(), published.targets, published.classes, in_chans)


def open_source(name, split, in_chans=3, labelled=False, data_dir="data", download=False, min_side=0, pick=None):
    """shapes, cifar10, cifar100 or a folder; split is train, val or test; `pick` as in Shapes. ValueError or OSError,
    in one line, on what does not fit."""
    if in_chans < 1:
        raise ValueError(f"--in_chans must be at least 1, not {in_chans}")
    if name == "shapes":
        return Shapes(split, in_chans=in_chans, pick=pick)
    if name in ("cifar10", "cifar100"):
        source = cifar(name, split, in_chans, data_dir, download)
    else:
        source = Folder(name, split, in_chans, labelled, min_side)
    if pick:
        source.keep(pick(source.labels))
    return source


def balanced(labels, n, seed):
    """n indices, sorted: class counts differ by at most 1 unless one runs out; a larger n holds every smaller one."""
    if not len(np.unique(labels)) <= n <= len(labels):
        raise ValueError(f"--labels {n}: there are {len(labels)} images of {len(np.unique(labels))} classes")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed_of(seed, "labels"))).numpy()
    turn, count = np.empty(len(labels), int), collections.Counter()
    for i in order:
        turn[i] = count[labels[i]]  # how many of its class come before it
        count[labels[i]] += 1
    return np.sort(order[np.argsort(turn[order], kind="stable")[:n]])
