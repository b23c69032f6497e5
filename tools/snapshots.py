"""Analyses that need a few images or none: large kernels, attention of chosen patches, distances in masks."""

import math

import torch
import torch.nn as nn

import um_mae
from common import transforms
from common.randomness import noise
from tools import measures
from tools.analyses import by_layer, rounded
from tools.attention_maps import Watch, attentions_of

# ---------------------------------------- Kernels


def large_kernels(encoder):
    """[(name, kernels (K, a, b))] of all convolutions with more than 3x3 places that overlap their neighbours: of a
    depth-wise one a kernel for each channel, of others one for each pair of channels. (A ViT's patches do not overlap.)
    """
    found = []
    for name, module in encoder.named_modules():
        if isinstance(module, nn.Conv2d):
            sides, strides = module.kernel_size, module.stride
            if min(sides) > 3 and all(side > stride for side, stride in zip(sides, strides, strict=True)):
                found.append((name, module.weight.detach().flatten(0, 1).cpu()))  # (K, a, b)
    return found


def profile(p, distances):
    """Mean share of a place at distances 0 to 1, 1 to 2, ... places from the centre, of kernels p (K, a*b)."""
    rings = distances.floor().long()  # (a*b,)
    return torch.stack([p[:, rings == ring].mean() for ring in range(int(rings.max()) + 1) if (rings == ring).any()])


def kernels(networks):
    """SECRETS, B: kernels as if they were attention maps, channels as if they were heads."""
    values = {"distance from the centre, places": {}, "entropy, nats": {}, "KL divergence from other kernels, nats": {}}
    profiles, layers = {}, {}
    for index, network in enumerate(networks):
        found = large_kernels(network.encoder)
        for layer, (name, weight) in enumerate(found):
            p, distances = measures.shares_of(weight), measures.from_centre(weight.shape[1:])
            place = index, layer
            values["distance from the centre, places"][place] = p @ distances.double()  # (K,)
            values["entropy, nats"][place] = measures.entropy(p)
            values["KL divergence from other kernels, nats"][place] = measures.divergence(p, dim=0)
            profiles[place] = profile(p, distances)
            layers.setdefault(network.name, {})[str(layer + 1)] = f"{name}, {weight.shape[1]}x{weight.shape[2]}"
    if not profiles:
        raise ValueError(f"kernels: none of {', '.join(network.source for network in networks)} has kernels above 3x3 "
                         "that overlap, as torchvision:convnext_tiny has")
    results = {}
    for title, found in values.items():
        means = {place: each.mean() for place, each in found.items()}
        results[f"kernels, {title}: mean, by layer"] = by_layer(networks, means)
    each = {title: by_layer(networks, found) for title, found in values.items()}
    return {"results": results, "kernels": each, "profiles": by_layer(networks, profiles), "layers": layers}


# ---------------------------------------- Attention of chosen patches


def raster_of(maps, layout, window, size):
    """Attention (heads, m) to the keys of a window -> (heads, rows, columns) over the image, NaN outside the window."""
    rows, columns = (math.ceil(side / layout.cell) for side in size)
    raster = torch.full((len(maps), rows, columns), torch.nan)
    is_key = layout.is_key[window]
    place = (layout.keys[window][is_key] / layout.cell).long()  # (m', 2)
    raster[:, place[:, 0], place[:, 1]] = maps[:, is_key].cpu()
    return raster


def attention_of(network, imgs, queries, layer):
    """({(image, query): maps (heads, rows, columns)}, side in pixels of a place in them) of an attention layer, -1 for
    the last, for imgs uint8 (B, C, H, W). queries [(row, column)] in pixels: each is the token whose centre is nearest.
    """
    size, found, cells = network.encoder.arch["img_size"], {}, []
    count = len(attentions_of(network.encoder))
    if not -1 <= layer < count:
        raise ValueError(f"--layer {layer + 1}: {network.name} has {count} attention layers, from 1 on; 0 is the last")

    def take(number, maps, layout):
        if number != layer % count:
            return
        maps = measures.tokens_alone(maps, layout)
        cells.append(layout.cell)
        for i in range(len(imgs)):
            for q, query in enumerate(queries):
                away = (layout.queries - torch.tensor(query)).norm(dim=2)  # (W, n)
                nearest = away.masked_fill(~layout.is_query, torch.inf).argmin().item()
                window, token = divmod(nearest, away.shape[1])
                found[i, q] = raster_of(maps[i, window, :, token], layout, window, size)

    with torch.no_grad(), Watch(network.encoder, on_maps=take):
        network.encoder(transforms.normalize(imgs, network))
    return found, cells[0]


def attention(networks, imgs, queries, layer):
    """LUT, Figure 1: where chosen patches look, head by head, in the first seed of every network, for imgs uint8 (B, C,
    H, W). `layer` 0 is the last. ValueError for a layer or queries that there are not."""
    size = networks[0].encoder.arch["img_size"]
    queries = queries or [(size[0] / 2, size[1] / 2), (size[0] / 8, size[1] / 8)]
    if any(not 0 <= n < side for query in queries for n, side in zip(query, size, strict=True)):
        raise ValueError(f"--queries are row,column in pixels of images of {size[0]}x{size[1]}, not {queries}")
    maps, cells = {}, {}
    for network in networks:
        if network.name not in maps:
            found, cells[network.name] = attention_of(network, imgs, queries, layer - 1)
            maps[network.name] = [[rounded(found[i, q]) for q in range(len(queries))] for i in range(len(imgs))]
    return {"results": {}, "queries": queries, "layer": layer or "last", "cells": cells, "maps": maps}


# ---------------------------------------- Masks


def avgdist(size, unit, count, seed):
    """AvgDist of the four strategies of UM-MAE (3.2), which all keep a quarter of the units: `count` masks each."""
    if count < 1 or min(size) < 2 * unit or any(side % (2 * unit) for side in size):
        raise ValueError(f"--mask_size {size[0]}x{size[1]} must be divisible by 2 x --unit, not by {unit} alone, and "
                         f"--masks be 1 or more, not {count}")
    grid = (size[0] // unit, size[1] // unit)
    num_units = grid[0] * grid[1]
    draws = noise(seed, 0, count, 2 * num_units)
    first, second = draws.chunk(2, dim=1)  # each (masks, U)
    ids_keep = {name: um_mae.SAMPLING[name](first, grid) for name in ("random", "grid", "uniform")}  # each (masks, U/4)
    hidden = um_mae.secondary_mask(second, ids_keep["uniform"], 0.25)  # (masks, U/4)
    visible = ids_keep["uniform"][~hidden].view(count, -1)  # (masks, 3 * U/16)
    ids_keep["uniform, then a quarter hidden"] = visible

    title = f"AvgDist, pixels, of {size[0]}x{size[1]} px in units of {unit} px"
    rows = {}
    for name, ids in ids_keep.items():
        masks = torch.ones(count, num_units, dtype=torch.bool).scatter_(1, ids, False)
        distances = [measures.masked_distance(mask, unit) for mask in masks.view(count, *grid)]
        rows[name] = {"mean, and lowest to highest mask": rounded(distances)}
    return {"results": {title: rows}}
