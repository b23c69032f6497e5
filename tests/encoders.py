"""Small encoders and classifiers as files hold them, for the tests of weights that travel."""

from functools import partial

import torch
import torchvision
from torchvision.models import ConvNeXt, MaxVit, SwinTransformer, VisionTransformer, swin_transformer
from torchvision.models.convnext import CNBlockConfig

import finetune
import models
from common import weights

VIT = ("vit_tiny", (32, 32), 8)

SWIN = {"patch_size": [4, 4], "embed_dim": 16, "depths": [1, 2, 1, 1], "num_heads": [1, 2, 4, 4]}
SMALL = {  # torchvision's classes in small: its published sizes take a second or more to make
    "swin_t": partial(SwinTransformer, **SWIN, window_size=[7, 7]),
    "swin_v2_t": partial(SwinTransformer, **SWIN, window_size=[8, 8], block=swin_transformer.SwinTransformerBlockV2,
                         downsample_layer=swin_transformer.PatchMergingV2),
    "convnext_tiny": lambda: ConvNeXt([CNBlockConfig(16, 32, 2), CNBlockConfig(32, 64, 1), CNBlockConfig(64, 96, 1),
                                       CNBlockConfig(96, None, 1)], stochastic_depth_prob=0.1, layer_scale=1.0),
    "maxvit_t": lambda input_size: MaxVit(input_size, stem_channels=8, partition_size=7, block_channels=[8, 16],
                                          block_layers=[1, 1], head_dim=8, stochastic_depth_prob=0.1),
    "vit_b_32": lambda image_size=224: VisionTransformer(image_size, 32, 2, 2, 48, 96)}


def make_small(monkeypatch):
    """torchvision makes small networks under the names in SMALL."""
    publish = torchvision.models.get_model

    def get_model(name, weights, **options):
        return SMALL[name](**options) if name in SMALL else publish(name, weights=weights, **options)

    monkeypatch.setattr(torchvision.models, "get_model", get_model)


def read_encoder(path, img_size=(0, 0)):
    return weights.read_encoder(path, models.from_arch, models.SIZES, img_size)


def stirred(module, seed=0):
    """Random biases, tokens and norms, too: zeros and ones would hide a swapped name."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))
    return module.eval()


def classifier(encoder, pool="mean", head_norm="layer", K=7):
    if head_norm == "layer":  # it stands in the place of the encoder's last one
        encoder.norm = torch.nn.Identity()
    model = finetune.Classifier(encoder, K, pool, head_norm)
    if head_norm == "batch":
        model.fc_norm.running_mean.normal_()
        model.fc_norm.running_var.uniform_(0.5, 2)
    return stirred(model)


def saved_of(model):
    """encoder.pt of a classifier."""
    return {"arch": model.encoder.arch, "model": model.encoder.state_dict(), "method": "Classifier", "step": 5,
            "classifier": model.export([f"class {i}" for i in range(len(model.head.weight))])}
