"""Data sets of torchvision by name, as torchvision:Food101: their pictures, and their labels where these are plain."""

import difflib
import inspect
import os

import numpy as np
import torch
import torchvision
from PIL import Image

from common.config import print_once
from common.images import PIL_MODE, reading

PREFIX = "torchvision:"
# What torchvision's classes call the splits, the most fitting first. STL10 has images without labels.
UNLABELLED = {"train": ("train+unlabeled",)}
SPLITS = {"train": ("train", "trainval", "train-standard"), "val": ("val", "valid", "test"),
          "test": ("test", "val", "valid")}
LABELS = ("targets", "labels", "_labels", "y")  # where they keep labels
PAIRS = ("samples", "_samples")  # or pairs of a file and its label


def class_of(name):
    """The class of torchvision:NAME. ValueError if there is none."""
    datasets, short = torchvision.datasets, name.removeprefix(PREFIX)
    known = [other for other in datasets.__all__ if takes_root(getattr(datasets, other))]
    if short not in known:
        same = [other for other in known if other.lower() == short.lower()]
        close = same or difflib.get_close_matches(short, known, n=1)
        hint = f"did you mean {PREFIX}{close[0]}?" if close else f"it has {', '.join(known)}"
        raise ValueError(f"--data {name}: torchvision has no such data set; {hint}")
    return getattr(datasets, short)


def takes_root(found):
    """Is this a data set that lies in a folder, and no base class?"""
    is_base = found in (torchvision.datasets.VisionDataset, torchvision.datasets.ImageFolder,
                        torchvision.datasets.DatasetFolder)
    return not is_base and "root" in inspect.signature(found).parameters


def accepted(dataset, argument, candidates, options):
    """(data set, name of its split), of the first that the class knows. ValueError if it knows none."""
    for candidate in candidates:
        try:
            return dataset(**options, **{argument: candidate}), candidate
        except ValueError as error:
            if "Unknown value" not in str(error):  # how torchvision refuses a split
                raise
            refusal = error
    raise refusal


def opened(name, split, labelled, data_dir, download):
    """A data set of torchvision for a split of ours. ValueError, in one line, if there is none in `data_dir`."""
    dataset = class_of(name)
    arguments = inspect.signature(dataset).parameters
    options = {"root": data_dir}
    if "download" in arguments:
        options["download"] = download and int(os.environ.get("WORLD_SIZE", 1)) == 1  # several would write one file
    try:
        if "train" in arguments:
            return dataset(**options, train=split == "train")
        for argument in ("split", "image_set"):
            if argument in arguments:
                candidates = (() if labelled else UNLABELLED.get(split, ())) + SPLITS[split]
                found, taken = accepted(dataset, argument, candidates, options)
                if taken != split:
                    print_once(f"{name}: its {taken} is taken for {split}")
                return found
        if labelled:
            raise ValueError("it has no splits, and so nothing to be tested on; it serves pre-training")
        return dataset(**options)
    except Exception as error:  # RuntimeError if files are missing or changed, ImportError of scipy, TypeError, ...
        how = "; a run of one process with --download fetches it" if "download" in options and not download else ""
        raise ValueError(f"--data {name} in {data_dir}: {error}{how}") from error


def labels_of(dataset):
    """Class labels (n,) of a data set of torchvision, or None if it has others or hides them: they are compared with
    that of its first image."""
    found = next((getattr(dataset, name) for name in LABELS if hasattr(dataset, name)), None)
    if found is None:
        pairs = next((getattr(dataset, name) for name in PAIRS if hasattr(dataset, name)), ())
        found = [pair[1] for pair in pairs]
    try:
        labels = np.asarray(found)
        first = dataset[0][1]
    except Exception:  # labels of unequal length; a first image that is broken, which is named when it is loaded
        return None
    if labels.shape != (len(dataset),) or labels.dtype.kind not in "iu" or labels.min() < 0:
        return None
    return labels.astype(np.int64) if np.ndim(first) == 0 and first == labels[0] else None


class Published:
    """A source (see data.py) of torchvision:NAME, in the folder that torchvision's class makes below `data_dir`. If not
    `labelled`, labels are -1. `pick`, ValueError: see open_source."""

    def __init__(self, name, split, in_chans=3, labelled=False, data_dir="data", download=False, pick=None):
        if in_chans not in PIL_MODE:
            raise ValueError(f"--in_chans {in_chans}: {name} has pictures, and they have 1, 3 or 4")
        self.name, self.in_chans = name, in_chans
        self.dataset = opened(name, split, labelled, data_dir, download)
        if len(self.dataset) == 0:
            raise ValueError(f"--data {name} in {data_dir}: it has no images")
        self.labels, self.classes = np.full(len(self.dataset), -1), None
        if labelled:
            labels = labels_of(self.dataset)
            if labels is None:
                raise ValueError(f"--data {name}: its targets are no class labels, one number for each image; without "
                                 "labels, it serves pre-training")
            number = labels.max() + 1
            names = list(getattr(self.dataset, "classes", ()))
            self.labels = labels
            self.classes = list(map(str, names if len(names) >= number else range(number)))
        self.indices = np.arange(len(self.labels))
        if pick:
            self.indices = self.indices[pick(self.labels)]
            self.labels = self.labels[self.indices]
        self.require_pictures()

    def __len__(self):
        return len(self.labels)

    def require_pictures(self):
        """ValueError if the first item is no picture: a video, or a pair of pictures."""
        try:
            first = self.dataset[int(self.indices[0])]
        except Exception:  # broken: it is named when it is loaded
            return
        if not isinstance(first, tuple) or not isinstance(first[0], Image.Image):
            raise ValueError(f"--data {self.name}: its items are no pictures with a target")

    def load(self, i):
        """As torchvision opens it: most of its classes make RGB of whatever there is."""
        index = int(self.indices[i])
        with reading(f"{self.name}, image {index}"):
            image = self.dataset[index][0].convert(PIL_MODE[self.in_chans])
            array = np.array(image)
        array = array.reshape(*array.shape[:2], -1)  # (h, w, C)
        return torch.from_numpy(array).permute(2, 0, 1), int(self.labels[i])
