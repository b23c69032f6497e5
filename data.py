"""Images in, uint8 batches out: data sets and the order of a run. No masking here.

    source (see sources.py) -> Images (decode, augment) -> GlobalBatches (which, when) -> loader -> normalize

What an image looks like in epoch e is a function of (seed, e, its index); when it comes is a function of (seed, e). So
1, 2 or 8 processes, any micro_batch and any number of workers see the same crops, and no step needs the one before it.

    python data.py --check DIR    # decode every image below DIR, list what is broken; exit code 1 if anything is
"""

import functools
import itertools
import signal
import sys

import torch
from torchvision.transforms import v2
from tqdm import tqdm

from common.engine import fail, seed_of, user_errors
from common.files import Broken, check
from common.sources import SPLITS, Folder, Memory, Shapes, balanced, open_source, shapes_batch  # noqa: F401
from common.transforms import CentreCrop, augmentation, denormalize, normalize, three_augment, with_defaults  # noqa: F401

# ---------------------------------------------------------------------------------------------------------------------
# Data sets: a source and a transform, such that every image's randomness is its own


class TooManyBroken(ValueError):
    """More than --max_bad of a data set's files are broken; one line that names the first ones."""


class Images(torch.utils.data.Dataset):
    """[(epoch, index, position)] -> (uint8 (C, H, W), label, position). A broken file is replaced by the first whole
    one of so many `substitutes`; with 0, for an evaluation, it is left out. See `count`."""

    def __init__(self, source, transform, seed, max_bad=0.01, substitutes=20):
        self.source, self.transform, self.seed = source, transform, seed
        self.max_bad, self.substitutes = max_bad, substitutes
        self.broken = {}  # index -> why

    def __len__(self):
        return len(self.source)

    def __getitem__(self, where):
        imgs, labels, positions, broken = self.__getitems__([where])
        self.count(broken, imgs)
        return imgs[0], labels[0].item(), positions[0].item()

    def __getitems__(self, batch):
        """What a worker sends for [(epoch, index, position), ...]: imgs (b, C, H, W), labels (b,), positions (b,), and
        {index: why} of what it found broken, because only the main process sees all workers. imgs is None if the tries
        for a substitute ran out, or if nothing is left."""
        imgs, labels, positions, broken = [], [], [], {}
        for epoch, index, position in batch:
            for i in self.candidates(index):
                try:
                    image, label = self.source.load(i)
                    break
                except Broken as error:
                    broken[i] = str(error)
            else:
                if self.substitutes:
                    return None, None, None, broken
                continue
            imgs.append(self.augment(image, epoch, index))
            labels.append(label)
            positions.append(position)
        if not imgs:
            return None, None, None, broken
        imgs = torch.utils.data.default_collate(imgs)  # stacks; of tuples, as dense_data.py has them, a list of stacks
        return imgs, torch.tensor(labels), torch.tensor(positions), broken

    def candidates(self, index):
        """An index and its substitutes. Its neighbour, as usual elsewhere, would be seen twice in every epoch of every
        run; a hash spreads that out."""
        yield index
        for attempt in range(self.substitutes):
            yield seed_of(self.seed, "substitute", index, attempt) % len(self)

    def augment(self, image, epoch, index):
        """Transforms draw from torch's global generator: seed it for this image, and leave it as it was.
        (torch.random.fork_rng does the same in 160 us instead of 4.)"""
        state = torch.get_rng_state()
        torch.default_generator.manual_seed(seed_of(self.seed, "augment", epoch, index))
        try:
            return self.transform(image)
        finally:
            torch.set_rng_state(state)

    def count(self, broken, imgs):
        """Name each broken file once. TooManyBroken if more than `max_bad` of all files of the data set are known to be
        broken by now (one is forgiven, unless max_bad is 0), or all of them, or if `imgs` is None where a substitute
        was looked for: 21 candidates in a row were."""
        new = {i: why for i, why in broken.items() if i not in self.broken}
        self.broken |= new
        for why in new.values():
            done = "replaced" if self.substitutes else "left out"
            tqdm.write(f"{done} a broken image: {' '.join(why.split())}", file=sys.stderr)
        limit = min(self.max_bad and max(1, self.max_bad * len(self)), len(self) - 1)
        if (imgs is None and self.substitutes) or len(self.broken) > limit:
            first = "; ".join(list(self.broken.values())[:3])
            raise TooManyBroken(" ".join(f"{len(self.broken)} of {len(self)} images are broken so far, --max_bad is "
                                         f"{self.max_bad}: {first}; python data.py --check lists them all".split()))


def pretrain_set(cfg):
    """The training images of --data, labels ignored, as `cfg` says."""
    o = with_defaults(cfg)
    # the smallest crop has crop_scale[0] of the area, at the longest ratio: its short side must not be enlarged
    least = 1.0 if o["crop"] == "simple" else o["crop_scale"][0] * min(o["crop_ratio"])
    min_side = int(max(cfg.img_size) / least**0.5) + 1
    source = open_source(cfg.data, "train", cfg.in_chans, False, cfg.data_dir, cfg.download, min_side)
    return Images(source, augmentation(o), cfg.seed, cfg.max_bad)


def labelled_set(cfg, split, augment=None):
    """A labelled split of --data, the train split cut to --labels images; augmented as `cfg` says if it is train. One
    that is not augmented is evaluated, and has no substitutes for broken images."""
    o = with_defaults(cfg)
    pick = functools.partial(balanced, n=o["labels"], seed=cfg.seed) if o["labels"] and split == "train" else None
    source = open_source(cfg.data, split, cfg.in_chans, True, cfg.data_dir, cfg.download, pick=pick)
    if split == "train" if augment is None else augment:
        return Images(source, augmentation(o), cfg.seed, cfg.max_bad)
    plain = CentreCrop(cfg.img_size, v2.InterpolationMode(o["interpolation"]))
    return Images(source, plain, cfg.seed, cfg.max_bad, substitutes=0)


def sample(dataset, n):
    """uint8 (n, C, H, W), or (n, 2, C, H, W) of two views: up to n images, evenly spaced over the data set and so over
    its classes."""
    n = min(n, len(dataset))
    return torch.stack([dataset[0, i * len(dataset) // n, i][0] for i in range(n)])


# ---------------------------------------------------------------------------------------------------------------------
# Order: which images, when, on which process


class GlobalBatches(torch.utils.data.Sampler):
    """Micro-batches of this process for the steps [start, stop): lists of (epoch, index, position in the global batch).

    A step is one global batch of `batch_size` images, the same for any number of processes; of every block of it, which
    they hold at once, each has a slice. Neighbours 2i and 2i + 1 are never parted if `unit` is 2.
    `start` and `stop` may be set until iteration begins; stop=None is one epoch. With drop_last=False the last batch of
    an epoch is shorter (left out if it has less than one unit for each process).
    """

    def __init__(self, n, batch_size, micro_batch, seed, rank=0, world=1, start=0, stop=None, drop_last=True, unit=1):
        self.n, self.batch_size, self.micro_batch, self.seed = n, batch_size, micro_batch, seed
        self.rank, self.world, self.unit = rank, world, unit
        self.steps_per_epoch = n // batch_size + (not drop_last and n % batch_size > unit * (world - 1))
        if min(micro_batch, batch_size // world) % unit:
            raise ValueError(f"mixup and cutmix mix pairs: with --batch_size {batch_size} and --micro_batch "
                             f"{micro_batch}, each of {world} process(es) must hold an even number of images at once")
        if not self.steps_per_epoch:
            raise ValueError(f"{n} images make no batch of {batch_size}: lower --batch_size, or bring more images")
        self.start, self.stop = start, self.steps_per_epoch if stop is None else stop

    def size(self, step):
        """Images of a global batch, over all processes."""
        return min(self.batch_size, self.n - step % self.steps_per_epoch * self.batch_size)

    def micro_batches(self, step):
        """How many micro-batches a step has: equal on all processes, also where one has an image more than another (so
        that, with micro_batch 1, one of a tail's may hold two)."""
        units = -(-self.size(step) // self.unit)
        return min(-(-units // (self.world * max(1, self.micro_batch // self.unit))), units // self.world)

    def smallest(self):
        """The fewest images that any process holds at once."""
        return min(len(range(*self.slice(step, k, rank))) for step in (0, self.steps_per_epoch - 1)
                   for k in range(self.micro_batches(step)) for rank in range(self.world))

    def slice(self, step, k, rank):
        """(first, behind the last) position of what a process holds in micro-batch k of a step: a slice of a block of
        the global batch, which is the same however many processes share it."""
        size, count = self.size(step), self.micro_batches(step)
        units = -(-size // self.unit)
        begin, end = (j * units // count for j in (k, k + 1))
        return tuple(min(size, self.unit * (begin + r * (end - begin) // self.world)) for r in (rank, rank + 1))

    def __iter__(self):
        for epoch, steps in itertools.groupby(range(self.start, self.stop), lambda step: step // self.steps_per_epoch):
            order = torch.randperm(self.n, generator=torch.Generator().manual_seed(seed_of(self.seed, "order", epoch)))
            for step in steps:
                indices = order[step % self.steps_per_epoch * self.batch_size :][: self.size(step)].tolist()
                for k in range(self.micro_batches(step)):
                    yield [(epoch, indices[i], i) for i in range(*self.slice(step, k, self.rank))]


def global_batches(n, cfg, run):
    """The GlobalBatches of n images that the options and this process ask for. Mixing needs pairs."""
    unit = 2 if getattr(cfg, "mixup", 0) or getattr(cfg, "cutmix", 0) else 1
    return GlobalBatches(n, cfg.batch_size, cfg.micro_batch, cfg.seed, run.rank, run.world, drop_last=cfg.drop_last,
                         unit=unit)


def in_order(n, micro_batch, rank=0, world=1):
    """Every image once, for evaluation, as lists of (epoch 0, index, index): every world-th of the batches that one
    process would make. A batch holds the same images on any number of processes, some of which may hold one more."""
    batches = [[(0, i, i) for i in range(k, min(k + micro_batch, n))] for k in range(0, n, micro_batch)]
    return batches[rank::world]


def ignore_signals(worker):
    """Ctrl-C and SIGTERM reach a whole process group; the main process decides what becomes of its workers."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def as_it_is(batch):
    return batch


def loader(dataset, sampler, workers=0, pin=False):
    """Iterate over (imgs uint8 (b, C, H, W), labels (b,), position in the global batch (b,)) of the sampler's lists.
    Too many broken files end the process with one line and exit code 2."""
    batches = torch.utils.data.DataLoader(
        dataset, batch_sampler=sampler, num_workers=workers, pin_memory=pin, collate_fn=as_it_is,
        worker_init_fn=ignore_signals, generator=torch.Generator())  # its own: the global one would lose a number
    for imgs, labels, positions, broken in batches:
        try:
            dataset.count(broken, imgs)
        except TooManyBroken as error:
            fail(error, everywhere=True)
        if imgs is not None:
            yield imgs, labels, positions


def main(argv=None):
    words = sys.argv[1:] if argv is None else argv
    if len(words) != 2 or words[0] != "--check":
        fail("usage: python data.py --check DIR")
    with user_errors():
        raise SystemExit(check(words[1]) > 0)


if __name__ == "__main__":
    main()
