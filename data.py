"""Images in, uint8 batches out: sources, data sets, and the order of a run. No masking here.

    source --Images (decode, augment)--> data set --GlobalBatches (which, when)--> loader

What an image looks like in an epoch is a function of (seed, epoch, its index); when it comes, of
(seed, epoch). So any number of processes, any micro_batch and any number of workers see the same
crops, and no step needs the one before it.
"""

import collections
import functools
import itertools
import math
import os
import re
import sys
import types

import numpy as np
import torch
import torchvision
from torchvision.transforms import v2
from tqdm import tqdm

from common import engine, processes, published, transforms
from common.config import fail
from common.images import Broken, Folder
from common.randomness import noise, seed_of
from common.shapes import SHAPES, shapes_batch

# ---------------------------------------- Sources: images as they are
# A source has len(), .classes (or None), .labels, and .load(i) -> (uint8 (C, h, w), label or -1).


class Memory:
    """Images in memory, uint8 (n, 3, h, w): in grey for in_chans 1, else with repeated channels."""
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
            image = image[[channel % 3 for channel in range(self.in_chans)]]  # (C, h, w)
        return image, int(self.labels[i])


# The embedded data: number of the first image, how many
SPLITS = {"train": (0, 20_000), "val": (1_000_000, 2_000), "test": (2_000_000, 2_000)}


def shapes_numbers(split, pick=None):
    """The numbers (n,) of the scenes of a split; `pick` as in open_source."""
    first, n = SPLITS[split]
    numbers = np.arange(first, first + n)
    return numbers[pick(numbers % len(SHAPES))] if pick else numbers


class Shapes(Memory):
    """The embedded data, see `shapes_batch`. Only the scenes that are picked are made."""
    def __init__(self, split, seed=0, in_chans=3, pick=None):
        made = shapes_batch(seed, shapes_numbers(split, pick), dense=False)
        images = made["image"].transpose(0, 3, 1, 2)  # (n, 3, 64, 64)
        super().__init__(images, made["label"], list(SHAPES), in_chans)


def cifar(name, split, in_chans, data_dir, download, pick=None):
    """CIFAR by torchvision, which checks every MD5; val and test are both its test set."""
    dataset = getattr(torchvision.datasets, name.upper())
    alone = int(os.environ.get("WORLD_SIZE", 1)) == 1  # several would write the same file
    try:
        published = dataset(data_dir, train=split == "train", download=download and alone)
    except RuntimeError:
        raise FileNotFoundError(f"--data {name}: not (whole) in {data_dir}; a run of one process "
                                "with --download fetches it, 170 MB") from None
    labels = np.array(published.targets)
    kept = pick(labels) if pick else slice(None)
    images = published.data[kept].transpose(0, 3, 1, 2).copy()  # (n, 3, 32, 32)
    return Memory(images, labels[kept], published.classes, in_chans)


def open_source(name, split, in_chans=3, labelled=False, data_dir="data", download=False,
                min_side=0, pick=None, value_range=(), alone=False):
    """shapes, cifar10, cifar100, torchvision:NAME or a folder; split is train, val or test. `pick`
    turns all labels into the indices that are wanted. `value_range`: --value_range. `alone`: the
    classes of a folder are those of this split. ValueError or OSError, in one line, on what does
    not fit."""
    if in_chans < 1:
        raise ValueError(f"--in_chans must be at least 1, not {in_chans}")
    if name == "shapes":
        return Shapes(split, in_chans=in_chans, pick=pick)
    if name in ("cifar10", "cifar100"):
        return cifar(name, split, in_chans, data_dir, download, pick)
    if name.startswith(published.PREFIX):
        return published.Published(name, split, in_chans, labelled, data_dir, download, pick)
    return Folder(name, split, in_chans, labelled, min_side, pick, value_range, alone)


def balanced(labels, n, seed):
    """n indices, sorted: equally many of every class, or all it has. A larger n holds them, too."""
    num_classes = len(np.unique(labels))
    if not num_classes <= n <= len(labels):
        raise ValueError(f"--labels {n}: there are {len(labels)} images of {num_classes} classes; "
                         "--labels 0 takes all")

    # In a random order: the first image of every class, then the second of every class, ...
    generator = torch.Generator().manual_seed(seed_of(seed, "labels"))
    order = torch.randperm(len(labels), generator=generator).numpy()
    counters = collections.defaultdict(itertools.count)  # 0, 1, 2, ... for each class
    turns = [next(counters[label]) for label in labels[order]]
    return np.sort(order[np.argsort(turns, kind="stable")[:n]])


# ---------------------------------------- Data sets: a source and a transform

class Images(torch.utils.data.Dataset):
    """[(epoch, index, position)] -> (uint8 (C, H, W), label, position). A broken file is replaced
    by the first whole one of so many `substitutes`; with 0, for an evaluation, it is left out.
    `broken`, {index: why}, holds what is known to be broken; data sets of a source may share it."""

    def __init__(self, source, transform, seed, max_bad=0.01, substitutes=20, broken=None):
        self.source, self.transform, self.seed = source, transform, seed
        self.max_bad, self.substitutes = max_bad, substitutes
        self.broken = {} if broken is None else broken

    def __len__(self):
        return len(self.source)

    def __getitem__(self, triple):
        imgs, labels, positions, broken = self.__getitems__([triple])
        self.count(broken, imgs)
        return imgs[0], labels[0].item(), positions[0].item()

    def __getitems__(self, triples):
        """What a worker makes of triples: imgs (b, C, H, W), labels (b,), positions (b,), or three
        Nones if there was no substitute or nothing is left; and {index: why} of what is broken,
        because only the main process sees all workers."""
        items, broken = [], {}
        for epoch, index, position in triples:
            image, label = self.load(index, broken)
            if image is not None:
                items.append((self.augment(image, epoch, index), label, position))
            elif self.substitutes:
                return None, None, None, broken
        batch = torch.utils.data.default_collate(items) if items else (None, None, None)
        return *batch, broken

    def load(self, index, broken):
        """(image, label) at an index, or of its first whole substitute, or (None, None). What is
        found to be broken is put into `broken`."""
        i = index
        for attempt in range(1 + self.substitutes):
            try:
                return self.source.load(i)
            except Broken as error:
                broken[i] = str(error)
            # At random: a neighbour would be seen twice in every epoch.
            i = seed_of(self.seed, "substitute", index, attempt) % len(self)
        return None, None

    def augment(self, image, epoch, index):
        """Transforms draw from torch's global generator: seed it for this image, and leave it as it
        was. (torch.random.fork_rng does the same in 160 us instead of 4.)"""
        state = torch.get_rng_state()
        torch.default_generator.manual_seed(seed_of(self.seed, "augment", epoch, index))
        try:
            return self.transform(image)
        finally:
            torch.set_rng_state(state)

    def count(self, broken, imgs):
        """Name each broken file once. ValueError if `require_few` raises one, or if there was no
        substitute: imgs is None."""
        verb = "replaced" if self.substitutes else "left out"
        for index, why in broken.items():
            if index not in self.broken:
                tqdm.write(f"{verb} a broken image: {' '.join(why.split())}", file=sys.stderr)
        self.broken |= broken
        self.require_few(self.broken, has_substitutes=imgs is not None or not self.substitutes)

    def require_few(self, broken, has_substitutes=True):
        """ValueError if {index: why} holds more than `max_bad` of all images (one is forgiven,
        unless max_bad is 0), or all, or if there are no substitutes."""
        n = len(self)
        allowed = max(1, self.max_bad * n) if self.max_bad else 0
        if len(broken) > min(allowed, n - 1) or not has_substitutes:
            first = "; ".join(list(broken.values())[:3])
            raise ValueError(f"{len(broken)} of {n} images are broken so far, --max_bad is "
                             f"{self.max_bad}: {first}; tools.check_images lists them all")


def pretrain_set(cfg):
    """The training images of --data, labels ignored. A Config may have a method `views`, which
    makes several views of an image out of its augmentation."""
    source = open_source(cfg.data, "train", cfg.in_chans, labelled=False, data_dir=cfg.data_dir,
                         download=cfg.download, min_side=transforms.jpeg_side(cfg),
                         value_range=transforms.with_defaults(cfg).value_range)
    transform = transforms.augmentation(cfg)
    if hasattr(cfg, "views"):
        transform = cfg.views(transform)
    return Images(source, transform, cfg.seed, cfg.max_bad)


def labelled_set(cfg, split, augment=True):
    """A labelled split of --data; train is cut to --labels images and, unless `augment` is False,
    augmented. A set that is not is evaluated, and has no substitutes for broken images. With --eval
    it may have other classes than train/."""
    train, pick = split == "train", None
    if train and cfg.labels:
        pick = functools.partial(balanced, n=cfg.labels, seed=cfg.seed)
    source = open_source(cfg.data, split, cfg.in_chans, labelled=True, data_dir=cfg.data_dir,
                         download=cfg.download, pick=pick, alone=getattr(cfg, "eval", False),
                         value_range=transforms.with_defaults(cfg).value_range)
    if train and augment:
        return Images(source, transforms.augmentation(cfg), cfg.seed, cfg.max_bad)
    crop = transforms.CentreCrop(cfg.img_size, transforms.with_defaults(cfg).interpolation)
    return Images(source, crop, cfg.seed, cfg.max_bad, substitutes=0)


# ---------------------------------------- Order: which images, when, on which process

class GlobalBatches:
    """Which of n images make a step, and which process holds which of them.

    A step is one global batch of `batch_size` images, the same for any number of processes. It is
    cut into blocks, which all processes hold at once, a slice each. If `unit` is 2, 2i and 2i + 1
    stay together. With drop_last=False the last batch of an epoch is shorter (none if it has less
    than one unit for each process)."""
    def __init__(self, n, batch_size, micro_batch, seed, rank=0, world_size=1, drop_last=True,
                 unit=1):
        self.n, self.batch_size, self.micro_batch, self.seed = n, batch_size, micro_batch, seed
        self.rank, self.world_size, self.unit = rank, world_size, unit
        if min(micro_batch, batch_size // world_size) % unit:
            raise ValueError(f"mixup and cutmix mix pairs: with --batch_size {batch_size} and "
                             f"--micro_batch {micro_batch}, each of {world_size} process(es) must "
                             "hold an even number of images at once")
        has_tail = not drop_last and n % batch_size > unit * (world_size - 1)
        self.steps_per_epoch = n // batch_size + has_tail
        if not self.steps_per_epoch:
            raise ValueError(f"{n} images make no batch of {batch_size}: lower --batch_size, or "
                             "bring more images")

    def size(self, step):
        """Images of a global batch, over all processes."""
        before = step % self.steps_per_epoch * self.batch_size  # images of this epoch
        return min(self.batch_size, self.n - before)

    def num_micro_batches(self, step):
        """Equal on all processes; so with micro_batch 1, one of a tail's may hold two images."""
        units = math.ceil(self.size(step) / self.unit)
        units_at_once = self.world_size * max(1, self.micro_batch // self.unit)
        return min(math.ceil(units / units_at_once), units // self.world_size)

    def slice(self, step, micro_step, rank):
        """(first, behind the last) position in the global batch of what a process holds at once."""
        size, count = self.size(step), self.num_micro_batches(step)
        units = math.ceil(size / self.unit)
        # The block that all processes hold at once is the same however many they are.
        begin = micro_step * units // count
        end = (micro_step + 1) * units // count
        first = begin + rank * (end - begin) // self.world_size
        last = begin + (rank + 1) * (end - begin) // self.world_size
        return min(size, self.unit * first), min(size, self.unit * last)

    def smallest(self):
        """The fewest images that any process holds at once."""
        slices = [self.slice(step, micro_step, rank) for step in (0, self.steps_per_epoch - 1)
                  for micro_step in range(self.num_micro_batches(step))
                  for rank in range(self.world_size)]
        return min(last - first for first, last in slices)

    def batches(self, first_step, last_step):
        """This process's micro-batches of the steps [first_step, last_step), one after the other:
        lists of (epoch, index, position in the global batch)."""
        for step in range(first_step, last_step):
            epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
            if step == first_step or step_of_epoch == 0:
                generator = torch.Generator().manual_seed(seed_of(self.seed, "order", epoch))
                order = torch.randperm(self.n, generator=generator)

            begin = step_of_epoch * self.batch_size
            indices = order[begin : begin + self.size(step)].tolist()  # of the global batch
            for micro_step in range(self.num_micro_batches(step)):
                first, last = self.slice(step, micro_step, self.rank)
                yield [(epoch, indices[position], position) for position in range(first, last)]


def global_batches(n, cfg, run):
    """The GlobalBatches of n images for this process. Mixing needs pairs."""
    mixes = getattr(cfg, "mixup", 0) or getattr(cfg, "cutmix", 0)
    return GlobalBatches(n, cfg.batch_size, cfg.micro_batch, cfg.seed, run.rank, run.world_size,
                         cfg.drop_last, unit=2 if mixes else 1)


def in_order(n, micro_batch, rank=0, world_size=1):
    """Every image once, for evaluation, as lists of (epoch 0, index, index): every world_size-th of
    the batches that one process would make, so that a batch holds the same images on any number."""
    firsts = range(0, n, micro_batch)[rank::world_size]
    return [[(0, i, i) for i in range(n)[first : first + micro_batch]] for first in firsts]


# ---------------------------------------- Loading

def loader(dataset, index_lists, workers=0):
    """Iterate over (imgs uint8 (b, C, H, W), labels (b,), positions (b,)) of an Images data set,
    for lists of (epoch, index, position). Exits with code 2 if too many files are broken, or if one
    of the workers was killed."""
    batches = torch.utils.data.DataLoader(
        dataset, batch_sampler=index_lists, num_workers=workers,
        worker_init_fn=processes.ignore_signals,
        collate_fn=tuple,  # __getitems__ has made a batch already
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator())  # its own: the global one would lose a number
    for imgs, labels, positions, broken in processes.iterate(batches):
        try:
            dataset.count(broken, imgs)
        except ValueError as error:
            fail(error, everywhere=True)
        if imgs is not None:
            yield imgs, labels, positions


def preview(dataset, cfg, model, device, n=64):
    """Up to n images, evenly spaced over the data set and so over its classes, and noise to mask
    them: (imgs (n, C, H, W) normalised, noise (n, num_noise)) on the device."""
    n = min(n, len(dataset))
    imgs = torch.stack([dataset[0, i * len(dataset) // n, i][0] for i in range(n)])  # (n, C, H, W)
    mask_noise = noise(cfg.seed, 0, n, model.num_noise, use="sample")  # (n, num_noise)
    return transforms.normalize(imgs.to(device), cfg), mask_noise.to(device)


class Evaluation:
    """This process's part of a data set, which can be iterated over again and again: imgs uint8
    (B, C, H, W), labels (B,), indices (B,)."""
    def __init__(self, dataset, index_lists, workers):
        self.dataset, self.index_lists, self.workers = dataset, index_lists, workers
        self.num_images, self.classes = len(dataset), dataset.source.classes

    def __iter__(self):
        yield from loader(self.dataset, self.index_lists, self.workers)
        try:
            self.dataset.require_few(processes.united(self.dataset.broken))
        except ValueError as error:
            engine.leave_processes()
            fail(error)


def evaluation(dataset, cfg, run):
    index_lists = in_order(len(dataset), cfg.micro_batch, run.rank, run.world_size)
    return Evaluation(dataset, index_lists, cfg.workers)


def probe_sets(cfg, run):
    """Evaluations of the labelled training and validation images, which neighbours.probe compares;
    None without --probe_epochs. ValueError or OSError, in one line, if there are no labels."""
    if not cfg.probe_epochs:
        return None
    changes = {"data": cfg.probe_data or cfg.data, "labels": cfg.probe_labels}
    cfg = types.SimpleNamespace(**vars(cfg) | changes)
    try:
        sets = labelled_set(cfg, "train", augment=False), labelled_set(cfg, "val")
    except (ValueError, OSError) as error:
        text = re.sub(r"--(data|labels)\b", r"--probe_\1", str(error))
        raise ValueError("--probe_epochs compares images with labels; by default those of "
                         f"--data: {text}") from error
    return [evaluation(dataset, cfg, run) for dataset in sets]


if __name__ == "__main__":
    raise SystemExit("data.py is a part of the scripts; they start as python mae.py --help")
