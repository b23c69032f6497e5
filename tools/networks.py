"""The networks that analyze.py compares, and the images that all of them see."""

import dataclasses
import types
from pathlib import Path

import torch
from torchvision.transforms import v2
from tqdm import tqdm

import data
import models
from common import config, transforms, weights
from common.randomness import seed_of


@dataclasses.dataclass
class Network:
    """An encoder in eval mode. Networks of one name are the seeds of one row. `mean`, `std` and `value_range` are those
    of the images that it was made for; empty for the usual ones."""
    name: str
    source: str  # a file, torchvision:NAME or random
    encoder: torch.nn.Module
    mean: list = ()
    std: list = ()
    value_range: list = ()


def split_name(word):
    """(name, path) of NAME=PATH, or ("", path): a path that is there may hold = itself, as sweep/lr=1/encoder.pt."""
    name, equals, path = word.partition("=")
    return (name, path) if equals and not Path(word).exists() else ("", word)


def named(word):
    """(name, source, was the name given?) of NAME=SOURCE, or of a source alone: runs/mae/encoder.pt is called mae."""
    name, source = split_name(word)
    if name:
        return name, source, True
    is_file = word != "random" and not word.startswith("torchvision:")
    return (Path(word).absolute().parent.name if is_file else word), word, False


def open_networks(words, img_size, seed, device="cpu"):
    """The networks that the words of --checkpoints describe, for images of one size: `img_size`, or with (0, 0) that of
    the files. ValueError or OSError, in one line, if they do not fit together."""
    entries = [named(word) for word in words]
    free = [name for name, source, was_given in entries if not was_given and source != "random"]
    if twice := {name for name in free if free.count(name) > 1}:
        raise ValueError(f"two checkpoints are called {min(twice)}: name them, as in A=PATH B=PATH (given names may be "
                         "equal: these are the seeds of one row)")
    saved = {source: weights.read_encoder(source, models.from_arch, models.SIZES) for _, source, _ in entries
             if source != "random" and not source.startswith("torchvision:")}
    size, in_chans = common_size(saved, img_size)

    networks = []
    for name, source, _ in entries:
        if source == "random":
            if not networks:
                raise ValueError("random is the first checkpoint's network with random weights: name another one first")
            nth = sum(network.source == "random" for network in networks)
            encoder = with_seed(networks[0].encoder.arch, seed_of(seed, "random", nth))
            images = networks[0].mean, networks[0].std, networks[0].value_range
        elif source.startswith("torchvision:"):
            encoder, name, images = torchvision_encoder(source, size, in_chans, seed, name)
        else:
            encoder = models.from_arch(saved[source]["arch"], img_size=size,
                                       final_norm=not weights.lost_its_norm(saved[source]))
            mean, std = weights.statistics_of(saved[source])
            # Images come normalised by the file's own mean and std: its patch embedding stays as it is.
            weights.load_encoder(encoder, saved[source], source, cfg=types.SimpleNamespace(mean=mean, std=std))
            images = mean, std, saved[source].get("value_range", ())
        networks.append(Network(name, source, encoder.eval().requires_grad_(False).to(device), *images))
    return networks


def common_size(saved, img_size):
    """(image size, channels) of all files {path: content}. ValueError if they differ and `img_size` does not say."""
    found = {path: (tuple(content["arch"]["img_size"]), content["arch"]["in_chans"]) for path, content in saved.items()}
    sizes, channels = {size for size, _ in found.values()}, {in_chans for _, in_chans in found.values()}
    if len(channels) > 1 or (len(sizes) > 1 and not any(img_size)):
        listed = ", ".join(f"{path}: {h}x{w}, {chans} channels" for path, ((h, w), chans) in found.items())
        way_out = "" if len(channels) > 1 else "; --img_size makes them fit one size"
        raise ValueError(f"the checkpoints are for images of several kinds ({listed}){way_out}")
    size = tuple(img_size) if any(img_size) else min(sizes, default=(224, 224))
    return size, min(channels, default=3)


def with_seed(arch, seed):
    """The encoder of an arch with random weights that depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return models.from_arch(arch)


def torchvision_encoder(source, size, in_chans, seed, name):
    """(torchvision's network, its name, (mean, std) of its images) with torchvision's weights if they are on this
    machine. If not, weights are random, and the name says so: nothing is downloaded."""
    arch = {"model": source, "img_size": size, "patch_size": 0, "in_chans": in_chans, "options": {}}
    encoder = with_seed(arch, seed_of(seed, source))
    model = source.removeprefix("torchvision:")
    path = weights.published_file(model)
    if path.exists():
        weights.load_published(encoder, model)
        return encoder, name, weights.published_statistics(model)
    config.print_once(f"{source} has random weights here: torchvision's are not at {path}, and nothing is downloaded")
    return encoder, f"{name} (random weights)", ((), ())


def range_of(found):
    """The value_range of the images that all networks see, () if no file says any. ValueError if two files differ."""
    ranges = {tuple(network.value_range): network.source for network in found if network.value_range}
    if len(ranges) > 1:
        listed = ", ".join(f"{source}: {low:g} to {high:g}" for (low, high), source in ranges.items())
        raise ValueError(f"the checkpoints are for images of several value ranges ({listed}): look at them one by one")
    return next(iter(ranges), ())


def image_batches(args, found):
    """(how many, batches uint8 (B, C, H, W)) of --images images of --data in random order, with a progress bar, for
    networks of one size. ValueError or OSError if there are none."""
    arch = found[0].encoder.arch
    H, W = arch["img_size"]
    source = data.open_source(args.data, args.split, arch["in_chans"], value_range=range_of(found))
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(args.seed))
    indices = order[: args.images].tolist()
    crop = transforms.CentreCrop((H, W), v2.InterpolationMode.BICUBIC)
    dataset = data.Images(source, crop, args.seed, substitutes=0)
    triples = [(0, i, i) for i in indices]
    lists = [triples[first : first + args.batch_size] for first in range(0, len(triples), args.batch_size)]

    def batches():
        bar = tqdm(data.loader(dataset, lists), total=len(lists), unit="batch", disable=None)
        for imgs, _, _ in bar:
            yield imgs.to(args.device)

    return len(indices), batches()
