"""Small encoders and classifiers as files hold them, for the tests of weights that travel."""

import torch

import finetune
import models
from common import weights

VIT = ("vit_tiny", (32, 32), 8)


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
