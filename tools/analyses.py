"""Analyses that watch networks look at images. Each adds up what it needs, so that memory does not grow with images.

    gather(networks, batches, [PerHead(...), Cka(...)])    then each analysis has its `record(networks)`

A record has "results", {title: {network: {layer: a value for each seed}}}, and beside it what else its figure draws.
"""

import collections
import functools

import torch

from common.transforms import normalize
from tools import measures
from tools.attention_maps import Watch

DIGITS = 5  # of numbers in a file


def rounded(values):
    """Tensors or nested lists of numbers with few digits; NaN as None."""
    if isinstance(values, torch.Tensor):
        values = values.tolist()
    if isinstance(values, list):
        return [rounded(value) for value in values]
    return float(f"{values:.{DIGITS}g}") if values == values else None


def of_seeds(networks, values):
    """{index of a network: value} -> {name: [value of each seed]}, in the order of the networks."""
    found = {}
    for index, network in enumerate(networks):
        if index in values:
            found.setdefault(network.name, []).append(values[index])
    return found


def by_layer(networks, values):
    """{(index of a network, layer): numbers} -> {name: {"1": [numbers of each seed], ...}}, without what is NaN."""
    rows = {}
    for index, layer in sorted(values):
        numbers = torch.as_tensor(values[index, layer])
        if not numbers.isnan().all():  # as of a single head, which has no others
            cells = rows.setdefault(networks[index].name, {})
            cells.setdefault(str(layer + 1), []).append(rounded(numbers))
    return rows


# ---------------------------------------- Of attention maps

class PerHead:
    """A number of each head of each layer, mean over queries and images. `value(maps, layout)` gives it for queries:
    maps (B, W, heads, n, m) -> (B, W, heads, n)."""

    fewest_images, of_maps = 1, True

    def __init__(self, title, value):
        self.title, self.value = title, value
        self.sums, self.counts = collections.defaultdict(float), collections.Counter()

    def add(self, place, maps, layout):
        total, count = measures.sum_over_queries(self.value(maps, layout), layout)
        self.sums[place] = self.sums[place] + total.double().cpu()  # (heads,)
        self.counts[place] += count

    def end_batch(self):
        pass

    def record(self, networks):
        heads = {place: total / self.counts[place] for place, total in self.sums.items()}
        means = {place: values.mean().item() for place, values in heads.items()}
        spreads = {place: values.std(correction=0).item() if len(values) > 1 else torch.nan
                   for place, values in heads.items()}
        results = {f"{self.title}: mean of heads, by layer": by_layer(networks, means),
                   f"{self.title}: standard deviation of heads, by layer": by_layer(networks, spreads)}
        return {"results": results, "title": self.title, "heads": by_layer(networks, heads)}


def distances(maps, layout):
    return measures.distance(maps, layout.queries.to(maps.device), layout.keys.to(maps.device))


def entropies(maps, layout):
    return measures.entropy(maps)


def divergences(maps, layout):
    return measures.divergence(maps, dim=2)


# ---------------------------------------- Of features

class Cka:
    """Similarity of all layers of all networks, of features that are means over tokens."""

    fewest_images, of_maps = 4, False

    def __init__(self):
        self.batch, self.hsics, self.count = {}, 0.0, 0

    def add(self, place, maps):
        self.batch[place] = maps.mean(dim=(2, 3)).cpu()  # (B, D)

    def end_batch(self):
        n = len(next(iter(self.batch.values())))
        if n >= self.fewest_images:  # the last batch may be smaller
            self.hsics = self.hsics + n * measures.hsic(list(self.batch.values()))
            self.count += n
        self.places = list(self.batch)
        self.batch = {}

    def record(self, networks):
        if self.count == 0:
            raise ValueError(f"CKA compares images with each other, and no batch has {self.fewest_images} whole ones")
        similarity = measures.cka(self.hsics / self.count)
        rows = {index: [i for i, place in enumerate(self.places) if place[0] == index]
                for index in range(len(networks))}
        within, lowest = {}, {}
        for index, own in rows.items():
            matrix = similarity[own][:, own]
            pairs = matrix[torch.ones_like(matrix).triu(1) > 0]  # none of a network of one layer
            within[index] = rounded(pairs.mean()) if len(pairs) else None
            lowest[index] = rounded(pairs.min()) if len(pairs) else None

        # Between networks: the first seed of each name.
        first = {}
        for index, network in enumerate(networks):
            first.setdefault(network.name, index)
        matrices = {name: {other: rounded(similarity[rows[i]][:, rows[j]]) for other, j in first.items()}
                    for name, i in first.items()}
        table = {name: {"mean of all pairs": means, "lowest": lows} for (name, means), lows in
                 zip(of_seeds(networks, within).items(), of_seeds(networks, lowest).values(), strict=True)}
        return {"results": {"CKA between the layers of a network": table}, "matrices": matrices, "images": self.count}


class Spectrum:
    """Singular values of the covariance of features that are means over tokens, and their effective rank."""

    fewest_images, of_maps = 2, False

    def __init__(self):
        self.covariances = collections.defaultdict(measures.Covariance)

    def add(self, place, maps):
        self.covariances[place].add(maps.mean(dim=(2, 3)).cpu())  # (B, D)

    def end_batch(self):
        pass

    def record(self, networks):
        spectra = {place: covariance.spectrum() for place, covariance in self.covariances.items()}
        ranks = {place: measures.effective_rank(spectrum) for place, spectrum in spectra.items()}
        title = "effective rank of features, by layer"
        return {"results": {title: by_layer(networks, ranks)}, "spectra": by_layer(networks, spectra)}


class Frequency:
    """Fourier amplitude of features by depth."""

    fewest_images, of_maps = 1, False

    def __init__(self):
        self.sums, self.counts = collections.defaultdict(float), collections.Counter()

    def add(self, place, maps):
        self.sums[place] = self.sums[place] + len(maps) * measures.log_amplitudes(maps).cpu()
        self.counts[place] += len(maps)

    def end_batch(self):
        pass

    def record(self, networks):
        curves = {place: total / self.counts[place] for place, total in self.sums.items()}
        relative = {place: curve - curve[0] for place, curve in curves.items()}
        highest = {place: curve[-1].item() if len(curve) > 1 else torch.nan for place, curve in relative.items()}
        if all(len(curve) == 1 for curve in relative.values()):
            raise ValueError("a map of one place has no frequency but 0: a larger --img_size or smaller patches have")
        title = "ln amplitude of the highest frequency, relative to frequency 0, by layer"
        return {"results": {title: by_layer(networks, highest)}, "curves": by_layer(networks, relative)}


# ---------------------------------------- All of them in one pass

STREAMED = {  # name: what makes an analysis
    "distance": functools.partial(PerHead, "attention distance, pixels", distances),
    "entropy": functools.partial(PerHead, "attention entropy, nats", entropies),
    "kl": functools.partial(PerHead, "KL divergence from other heads, nats", divergences),
    "cka": Cka, "spectrum": Spectrum, "frequency": Frequency}


def gather(networks, batches, analyses):
    """Show all batches, uint8, to all networks; `analyses` add up what they see. One without attention adds no maps.
    Returns how many images there were."""
    of_maps = [analysis for analysis in analyses if analysis.of_maps]
    of_features = [analysis for analysis in analyses if not analysis.of_maps]
    num_images = 0
    for imgs in batches:
        num_images += len(imgs)
        for index, network in enumerate(networks):
            def take_maps(layer, maps, layout, index=index):
                maps = measures.tokens_alone(maps, layout)
                for analysis in of_maps:
                    analysis.add((index, layer), maps, layout)

            def take_features(layer, features, index=index):
                for analysis in of_features:
                    analysis.add((index, layer), features.float())

            watch = Watch(network.encoder, take_maps if of_maps else None, take_features if of_features else None)
            with torch.no_grad(), watch:
                network.encoder(normalize(imgs, network))
        for analysis in analyses:
            analysis.end_batch()
    return num_images
