"""Tests that tell right code from wrong code: yours."""

import torch

import mae


def build(**options):
    """A small model; `options` as of mae.Config."""
    torch.manual_seed(0)
    sizes = {"model": "vit_tiny", "img_size": (32, 32), "patch_size": 8, "decoder_depth": 1, "decoder_width": 32,
             "decoder_heads": 2}
    return mae.MAE(mae.Config(**{**sizes, **options}))


def test_a_quarter_of_the_patches_stays():
    model = build(mask_ratio=0.75)
    ids_keep, _, mask = model.mask(torch.rand(3, 16))
    assert ids_keep.shape == (3, 4)
    assert mask.sum(dim=1).tolist() == [12, 12, 12]
