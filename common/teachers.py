"""Frozen encoders that a model learns from: of an earlier run, or torchvision's with its own weights."""

import math
from pathlib import Path

import torch
import torchvision

import models
from common import checkpoint, protocols, weights
from common.transforms import mean_std


class Student(torch.nn.Module):
    """A model with a `teacher`: a frozen encoder, or None."""

    def train(self, mode=True):
        """The teacher stays in eval mode: its BatchNorm goes by the averages that it came with."""
        super().train(mode)
        if self.teacher:
            self.teacher.eval()
        return self

    def state_dict(self, *args, **options):
        """Without the teacher, which stays in the file it came from."""
        return {k: v for k, v in super().state_dict(*args, **options).items() if not k.startswith("teacher.")}

    def load_state_dict(self, tensors, *args, **options):
        own = {f"teacher.{k}": v for k, v in self.teacher.state_dict().items()} if self.teacher else {}
        return super().load_state_dict({**tensors, **own}, *args, **options)


def frozen_encoder(source, cfg):
    """The encoder that `source` names, for images as `cfg` has them, in eval mode and without gradients: of an
    encoder.pt or published weights (see weights.py), or for torchvision:NAME torchvision's own. Under --plan its
    weights are random. ValueError or OSError if there is none, or if it may not be fetched."""
    if source.startswith("torchvision:"):
        encoder = models.build(source, cfg.img_size, 0, cfg.in_chans)
        if not cfg.plan:
            load_published(encoder, source.removeprefix("torchvision:"), cfg.download)
    else:
        saved = weights.read_encoder(source)
        encoder = protocols.rebuild(saved["arch"], img_size=cfg.img_size, in_chans=cfg.in_chans)
        if not cfg.plan:
            if hasattr(encoder, "norm") and "norm.weight" not in saved["model"]:  # fine-tuned: its head has the norm
                encoder.norm = torch.nn.Identity()
            weights.load_encoder(encoder, saved, source)
    return encoder.eval().requires_grad_(False)


def load_published(encoder, name, download):
    """Copy torchvision's best weights of its model `name` into an encoder of backbones.py. They lie where torchvision
    keeps what it has fetched; ValueError if they do not and `download` is not set, if what lies there is damaged or
    hostile, or if they were trained on images that were normalised in another way than ours."""
    best = torchvision.models.get_model_weights(name).DEFAULT
    as_ours = torch.allclose(torch.tensor(best.transforms().mean), mean_std(3)[0].view(3))
    if name in ("googlenet", "inception_v3") or not as_ours:
        raise ValueError(f"torchvision's weights of {name} take images that are normalised in another way")
    path = Path(torch.hub.get_dir()) / "checkpoints" / best.url.rsplit("/", 1)[1]
    if not path.exists() and not download:
        raise ValueError(f"torchvision's weights of {name} are not at {path}: --download fetches them")
    if not path.exists():
        try:
            best.get_state_dict(progress=False, check_hash=True, weights_only=True)
        except RuntimeError as error:  # another hash than the one in its name
            raise ValueError(f"what was fetched of torchvision's weights of {name} is damaged: {error}") from error
    checkpoint.read(path, foreign=True)  # torchvision, which knows the names in its older files, would execute anything
    try:
        tensors = torchvision.models.get_model(name, weights=best, progress=False).state_dict()
    except (RuntimeError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} does not hold torchvision's weights of {name}: {str(error)[:200]}") from error
    of_vit = {"cls_token": "class_token", "pos_embed": "encoder.pos_embedding"}  # our names, torchvision's
    tensors = {k: tensors[of_vit.get(k, k.removeprefix("net."))] for k in encoder.state_dict()}
    if "pos_embed" in tensors:
        side = math.isqrt(tensors["pos_embed"].shape[1] - 1)  # all of these were trained on squares
        tensors["pos_embed"] = weights.resize_positions(tensors["pos_embed"], (side, side), encoder.grid)
    checkpoint.load_exactly(encoder, tensors, path)
