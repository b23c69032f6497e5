"""Published numbers: cases in tests/golden, and the names that published weights have there, in ours."""

import os
import re
from pathlib import Path

import numpy as np
import torch

import data

GOLDEN = Path(os.environ.get("GOLDEN", Path(__file__).parent / "golden"))  # another directory of cases, same names


def case(name):
    """(arrays, normalised images (B, 3, H, W), published state dict in fp32) of a golden file."""
    arrays = dict(np.load(GOLDEN / f"{name}.npz"))
    imgs = data.normalize(torch.from_numpy(arrays["images"]).permute(0, 3, 1, 2))
    weights = {k[3:]: torch.from_numpy(v).float() for k, v in arrays.items() if k.startswith("sd/")}
    return arrays, imgs, weights


def um_mae_names(name, depths):
    """An encoder's name in UM-MAE's code, where blocks are one flat list and a stage's first one owns the merging."""
    if match := re.match(r"blocks\.(\d+)\.(.*)", name):
        block, rest, stage = int(match[1]), match[2], 0
        while block >= depths[stage]:
            block, stage = block - depths[stage], stage + 1
        ahead = rest.startswith("downsample")
        return f"layers.{stage - 1}.{rest}" if ahead else f"layers.{stage}.blocks.{block}.{rest}"
    return name


def encoder_tensors(weights, depths):
    """The encoder's part of UM-MAE's weights under our names; its 1x1 convolutions are linear layers here."""
    ours = {}
    for name, tensor in weights.items():
        if name.startswith(("patch_embed", "pos_embed", "blocks", "norm")):
            flat = ".posmlp." in name or ".sr." in name
            ours[um_mae_names(name, depths)] = tensor.flatten(1) if flat and tensor.dim() == 4 else tensor
    return ours


def decoder_name(name):
    """A decoder's name in MAE's code and in what follows it -> ours, or None for a name of something else."""
    return name.removeprefix("decoder_") if name.startswith("decoder_") else None


def decoder_tensors(weights):
    return {decoder_name(name): tensor for name, tensor in weights.items() if decoder_name(name)}


def simmim_tensors(weights):
    """The encoder's part of SimMIM's weights, and its mask token, under our names: without what we compute from sizes,
    and with the biases of q and v joined by one of zeros for k, which no output depends on."""
    ours = {k.removeprefix("encoder."): v for k, v in weights.items() if k.startswith("encoder.")}
    ours = {k: v for k, v in ours.items() if not k.endswith(("relative_position_index", "attn_mask"))}
    for name in [name for name in ours if name.endswith("q_bias")]:
        q, v = ours.pop(name), ours.pop(name.replace("q_bias", "v_bias"))
        ours[name.replace("q_bias", "qkv.bias")] = torch.cat([q, torch.zeros_like(q), v])
    return ours
