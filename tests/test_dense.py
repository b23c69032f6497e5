"""dense.py, dense_data.py: maps of encoders, labels that move with images, losses and scores, what is refused."""

import pytest
import torch

import models


@pytest.mark.parametrize("model,size,count", [("vit_tiny", (24, 40), 1), ("swin_tiny", (40, 72), 4),
                                              ("pvt_tiny", (40, 72), 4)])
def test_maps_are_the_latent_with_rows_and_columns(model, size, count):
    encoder = models.build(model, size, in_chans=2, patch_size=8 if model == "vit_tiny" else 0).eval()
    imgs = torch.randn(2, 2, *size)
    maps, latent = encoder.maps(imgs), encoder(imgs)[:, encoder.num_prefix :]
    assert len(maps) == count
    for stage, features in enumerate(reversed(maps)):  # from the coarsest
        stride = encoder.out_stride / 2**stage
        assert features.shape[2:] == tuple(-int(-n // stride) for n in size)
    assert torch.equal(maps[-1].flatten(2).transpose(1, 2), latent)
    assert torch.equal(maps[-1][:, :, 0, 1], latent[:, 1])
