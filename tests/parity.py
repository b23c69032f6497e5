"""Published numbers: cases in tests/golden, and the names that published weights have there, in ours."""

import os
from pathlib import Path

import numpy as np
import torch

from common import layouts, transforms

GOLDEN = Path(os.environ.get("GOLDEN", Path(__file__).parent / "golden"))  # another directory of cases, same names


def case(name):
    """(arrays, normalised images (B, 3, H, W), published state dict in fp32) of a golden file."""
    arrays = dict(np.load(GOLDEN / f"{name}.npz"))
    imgs = transforms.normalize(torch.from_numpy(arrays["images"]).permute(0, 3, 1, 2))
    weights = {k[3:]: torch.from_numpy(v).float() for k, v in arrays.items() if k.startswith("sd/")}
    return arrays, imgs, weights


def um_mae_names(name, depths):
    """An encoder's name in UM-MAE's code -> ours."""
    first = [sum(depths[:stage]) for stage in range(1, 4)]  # blocks that begin a stage, and own the merging before it
    names = [f"blocks.{i}.{part}" for i in range(sum(depths)) for part in ["norm1.", *["downsample."] * (i in first)]]
    return layouts.rename(name, layouts.flat_blocks(names))


def encoder_tensors(weights):
    """The encoder's part of published weights, under our names."""
    tensors, _, _ = layouts.translate(weights)
    return tensors


def decoder_name(name):
    """A decoder's name in MAE's code and in what follows it -> ours, or None for a name of something else."""
    return name.removeprefix("decoder_") if name.startswith("decoder_") else None


def decoder_tensors(weights):
    return {decoder_name(name): tensor for name, tensor in weights.items() if decoder_name(name)}


def simmim_tensors(weights):
    """The encoder's part of SimMIM's weights, and its mask token, under our names."""
    return {**encoder_tensors(weights), "mask_token": weights["encoder.mask_token"]}
