"""Models of the five methods out of their last.pt, and what they predict of a few images, for show.py and notebooks."""

import dataclasses

import torch

import fastmim
import lut
import mae
import simmim
import um_mae
from common import checkpoint, randomness

SCRIPTS = {mae.MAE: mae, simmim.SimMIM: simmim, um_mae.UMMAE: um_mae, fastmim.FastMIM: fastmim, lut.LUT: lut}
# What training alone needs: frozen teachers, where weights came from, stochastic depth
WITHOUT = {"teacher": "none", "init": "none", "drop_path": 0.0}
# Options that choose a mask, of one method or another
MASKING = ("mask_ratio", "mask", "sampling", "secondary_ratio", "mask_unit")


def content_of(path):
    """What a checkpoint holds; None if it is damaged, of another format, or no file but torchvision:NAME."""
    try:
        return checkpoint.read(path)
    except (ValueError, FileNotFoundError):
        return None


def load(path, **changes):
    """The model in a last.pt of any of the five methods (mae.MAE, simmim.SimMIM, ...), in eval mode on the CPU. Its
    options are in model.cfg; `changes` are others that fit its weights, as mask_ratio=0.5. A FastMIM teacher is no part
    of a last.pt and not of this model. ValueError, in one line, if the file is damaged, of another script, or does not
    fit the changes; FileNotFoundError."""
    saved = checkpoint.read(path)
    checkpoint.require_run(saved, path)
    model_class = class_of(saved["config"])
    if model_class is None:
        raise ValueError(f"{path} is of none of the five methods; what finetune.py or a tool trained is in the "
                         "encoder.pt beside it")

    config_class, script = SCRIPTS[model_class].Config, SCRIPTS[model_class].__name__
    defaults = {field.name: field.default for field in dataclasses.fields(config_class)}
    if unknown := changes.keys() - defaults.keys():
        raise ValueError(f"{path} is of {script}.py, which has no --{min(unknown)}")
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in saved["config"].items()}
    for name, value in options.items():
        numbers = value if isinstance(value, tuple) else ()
        if type(value) is not type(defaults[name]) or not all(type(number) in (int, float) for number in numbers):
            raise ValueError(f"{path}: --{name} cannot be {value!r}")
    without = {name: value for name, value in WITHOUT.items() if name in defaults}
    cfg = config_class(**{**options, **without, **changes})
    cfg.check()

    model, tensors = model_class(cfg), saved["model"]
    if options.get("teacher", "none") != "none":  # it came with a layer that leads to it
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("project.")}
    checkpoint.load_exactly(model, tensors, path)
    return model.eval()


def class_of(options):
    """The class in SCRIPTS whose script has all these options; None if there is none."""
    for model_class, script in SCRIPTS.items():
        if options.keys() <= {field.name for field in dataclasses.fields(script.Config)}:
            return model_class
    return None


@torch.no_grad()
def reconstruction(model, imgs, seed=0):
    """({row title: images (B, C, H, W) in [0, 1]}, title with method, masking and loss) of normalised imgs (B, C, H,
    W)."""
    script = SCRIPTS[type(model)]
    noise = randomness.noise(seed, 0, len(imgs), model.num_noise, use="sample")  # (B, num_noise)
    if hasattr(model, "input_shape"):  # pairs of views: here both are the image
        imgs = torch.stack([imgs, imgs], dim=1)  # (B, 2, C, H, W)
    loss = model(imgs, noise).item()
    rows = script.reconstruct(model, imgs, noise)

    cfg = model.cfg
    method = script.__doc__.partition(":")[0]
    options = {name: getattr(cfg, name) for name in MASKING if hasattr(cfg, name)}
    if "mask_unit" in options:  # 0 stands for a token
        options["mask_unit"] = imgs.shape[-1] // model.grid[1]
    options = ", ".join(f"{name} {value}" for name, value in options.items())
    terms = "".join(f"\n{name} {term.item():.4f}" for name, term in getattr(model, "terms", {}).items())
    return rows, f"{method}, {cfg.model}\n{options}\nloss {loss:.4f} (target {cfg.target}){terms}"
