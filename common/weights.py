"""An encoder's weights: read from a run or from elsewhere, and made to fit images and windows of other sizes.

`encoder.pt` is {"arch": what models.from_arch needs, "model": the encoder, "method": who made it, "step"}, and
"classifier" after fine-tuning, "dense" after tools/dense.py. What other code saved comes in the same form: layouts.py
knows the names. `from_arch` and `sizes` are those of models.py, which lies above this file.
"""

import argparse
import collections
import dataclasses
import json
import math
import pickle
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision

from common import checkpoint, layouts
from common.config import print_once
from common.layers import window_sizes
from common.transforms import mean_std

# ---------------------------------------- Reading

# Kinds of the options in "arch".
OPTIONS = {"window": int, "bias": str, "positions": str, "layer_scale": float, "reduction": list, "max_stride": int,
           "drop_layers": object}  # which models.build checks
# Other people's files hold their options, too. These become containers that do nothing.
OPTION_CLASSES = (argparse.Namespace, (collections.OrderedDict, "yacs.config.CfgNode"))


def read_encoder(path, from_arch, sizes, img_size=(0, 0)):
    """The content of an encoder.pt, or of published weights (.pth, .pt, .safetensors) in that form, with "notes" on
    what was assumed. `img_size`: of the images that published weights were made for, zeros to infer it. ValueError if
    the file is something else."""
    is_safetensors = Path(path).suffix == ".safetensors"
    saved, notes = (unpack(*read_safetensors(path)), []) if is_safetensors else read_pickled(path)
    is_run = isinstance(saved, dict) and {"config", "step"} <= saved.keys()
    if not is_run and not (isinstance(saved, dict) and "arch" in saved):
        saved = layouts.foreign(saved, path, from_arch, sizes, img_size)
        return {**saved, "notes": saved["notes"] + notes}
    if any(img_size):
        raise ValueError(f"--init_size is of weights that do not hold their size themselves, as {path} does")
    saved.pop("notes", None)  # of an earlier load
    try:
        saved["arch"] = arch = {**saved["arch"]}
        if "drop_layers" in arch:  # where files had it once
            arch["options"] = {**arch["options"], "drop_layers": arch.pop("drop_layers")}
        fits = is_encoder(saved, from_arch)
    except ValueError as error:  # of models.build
        raise ValueError(f"{path}: {error}") from error
    except (AttributeError, KeyError, TypeError, RuntimeError):  # a part is missing or of another kind
        fits = False
    if not fits:
        raise ValueError(f"{path} is not an encoder.pt of this project")
    return saved


def read_pickled(path):
    """(content, notes) of a file of torch.save, be it other people's: it may hold their options, and be of the format
    before 1.6, pickles in a row, of which the first is a magic number. Errors as of checkpoint.read."""
    checkpoint.require_room(path)
    start = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)
    with open(path, "rb") as file:
        is_old = file.read(len(start)) == start
    content = checkpoint.read(path, OPTION_CLASSES, has_checksums=not is_old)
    return content, ["a file this old has no checksums"] * is_old


def read_safetensors(path):
    """({name: tensor}, metadata {str: str}) of a file; it has no checksums. ValueError (one line) if it is damaged, or
    without the library."""
    checkpoint.require_room(path)
    safetensors = safetensors_library()
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except Exception as error:  # of the library, and of what Python thinks of a shape
        raise ValueError(f"{path} is not a whole checkpoint: {' '.join(str(error).split())[:200]}") from error


def safetensors_library():
    try:
        import safetensors.torch
    except ImportError as error:
        raise ValueError("a .safetensors file needs the safetensors library: pip install safetensors") from error
    return safetensors


def unpack(tensors, metadata):
    """The encoder.pt that tools/convert.py packed into a safetensors file; of somebody else's the tensors alone."""
    try:
        saved = json.loads(metadata["encoder"])
        head = {name: tensors[name] for name in tensors if name.startswith(("head.", "fc_norm."))}
        saved["model"] = {name: tensor for name, tensor in tensors.items() if name not in head}
        if "classifier" in saved:
            saved["classifier"]["tensors"] = head
        return saved
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return tensors


def is_encoder(saved, from_arch):
    """Is `saved` an encoder.pt, so that what is built of its `arch` is no larger than what the file holds, or than a
    network of torchvision is? ValueError, or an error of its kind, for nonsense."""
    arch, tensors, options = saved["arch"], saved["model"], saved["arch"]["options"]
    json.dumps([arch, saved.get("method"), saved.get("step")])  # TypeError unless plain data
    numbers = [*arch["img_size"], arch["patch_size"], arch["in_chans"]]
    if len(numbers) != 4 or not all(type(n) is int and 0 < n <= 2**16 for n in numbers):
        return False
    has_sizes = {"width", "depth", "num_heads"} <= arch.keys()
    has_kinds = all(isinstance(value, OPTIONS.get(name, ())) for name, value in options.items())
    if not (has_sizes and has_kinds and all(type(n) is int for n in options.get("reduction", []))):
        return False
    if not layouts.is_state_dict(tensors) or ("classifier" in saved and not is_classifier(saved["classifier"])):
        return False
    if arch["model"].startswith("torchvision:") and math.prod(arch["img_size"]) > 2**26:
        return False  # building it computes the maps of one image
    with torch.device("meta"):
        own = from_arch(arch).state_dict()
    if any(own[name].shape != tensors[name].shape for name in own.keys() & tensors.keys()):
        return False
    return all(name.startswith("norm.") for name in own.keys() - tensors.keys())  # a head took its place


def is_classifier(head):
    """Is `head` what finetune.Classifier exports?"""
    classes = head["classes"]
    return layouts.is_state_dict(head["tensors"]) and isinstance(classes, list) \
        and all(type(name) is str for name in classes) and len(head["tensors"]["head.weight"]) == len(classes) \
        and head["pool"] in ("mean", "cls") and head["head_norm"] in ("layer", "batch", "none")


def lost_its_norm(saved):
    """Did a head take the place of the encoder's last norm, be it a head that was cut off since?"""
    head, was_cut = saved.get("classifier"), "drop_layers" in saved["arch"]["options"]
    return "dense" in saved or bool(head and head["head_norm"] == "layer") \
        or (was_cut and "norm.weight" not in saved["model"])


# ---------------------------------------- From --init to an encoder

def as_in_init(cfg, from_arch, sizes):
    """(cfg with model, patch_size, in_chans and img_size as --init has them, content of --init or None). ValueError or
    FileNotFoundError if it is no encoder, or another one than the options ask for."""
    saved, arch = None, {"in_chans": 3, "img_size": (224, 224)}
    if cfg.init != "none":
        saved = read_encoder(cfg.init, from_arch, sizes, cfg.init_size)
        arch = saved["arch"]
        for name, value in (("model", cfg.model), ("patch_size", cfg.patch_size)):
            if value not in ("auto", 0, arch[name]):
                raise ValueError(f"--{name} {value}, but the encoder in {cfg.init} has {name} {arch[name]}")
        cfg = dataclasses.replace(cfg, model=arch["model"], patch_size=arch["patch_size"])
    img_size = cfg.img_size if any(cfg.img_size) else tuple(arch["img_size"])
    return dataclasses.replace(cfg, img_size=img_size, in_chans=cfg.in_chans or arch["in_chans"]), saved


def encoder_for(cfg, saved, from_arch, trains, final_norm=True):
    """The encoder that the options describe, with what `as_in_init` found in `saved`, and random weights. If it
    `trains`, so do its positions, and it has stochastic depth."""
    options = dict(saved["arch"]["options"]) if saved else {}
    if cfg.window:
        options["window"] = cfg.window
    if options.get("positions") == "shared_bias" and trains:
        options["positions"] = "block_bias"  # as SimMIM fine-tunes: every block gets a table of its own
    arch = {name: getattr(cfg, name) for name in ("model", "img_size", "patch_size", "in_chans")}
    encoder = from_arch({**arch, "options": options}, learn_positions=trains,
                        drop_path=cfg.drop_path if trains else 0.0, final_norm=final_norm)
    encoder.checkpointing = cfg.activation_checkpointing
    return encoder


def load_encoder(encoder, saved, path, fresh=()):
    """Copy the encoder of an encoder.pt, its tables and patch embedding resized to what `encoder` has, and print what
    was done; `fresh` names what of a model is newly initialised beside it. ValueError if heads, depth, width or patch
    differ (weights of 12 heads fit 6 heads, and are wrong there), or if a tensor would be left unset."""
    arch, tensors = saved["arch"], dict(saved["model"])
    there, here = {**arch, **arch["options"]}, {**encoder.arch, **encoder.arch["options"]}
    for name in ("model", "patch_size", "width", "depth", "num_heads", "bias", "layer_scale"):
        if there.get(name) != here.get(name):
            raise ValueError(f"{path} holds an encoder with {name} {there.get(name)}, not {here.get(name)}")
    method = "bicubic" if saved.get("method") == "FastMIM" else "geometric"  # each as its own fine-tuning
    notes = [*saved.get("notes", []), *fit_channels(tensors, arch, encoder, path),
             *fit_tables(tensors, arch, encoder, path, method)]
    over = [name for name in tensors if name not in encoder.state_dict()]
    if over and all(name.startswith("norm.") for name in over):  # a head with its own norm replaces the last one
        notes.append(f"left over: {', '.join(over)}")
        tensors = {name: tensor for name, tensor in tensors.items() if name not in over}
    checkpoint.load_exactly(encoder, tensors, path)
    if fresh:
        notes += ["left over: the classifier"] * ("classifier" in saved) + [f"newly initialised: {', '.join(fresh)}"]
    print_once("\n  ".join([f"loaded {len(tensors)} tensors of {arch['model']} from {path}", *notes]))


def frozen_encoder(source, cfg, from_arch, sizes):
    """A teacher for images as `cfg` has them, in eval mode and without gradients: the encoder in a file, or
    torchvision:NAME with torchvision's weights; with random weights under --plan. ValueError or OSError if there is
    none, or if it may not be fetched."""
    images = {"img_size": cfg.img_size, "in_chans": cfg.in_chans}
    if source.startswith("torchvision:"):
        encoder = from_arch({"model": source, "patch_size": 0, "options": {}, **images})
        if not cfg.plan:
            load_published(encoder, source.removeprefix("torchvision:"), cfg.download)
    else:
        saved = read_encoder(source, from_arch, sizes)
        encoder = from_arch(saved["arch"], **images, final_norm=not lost_its_norm(saved))
        if not cfg.plan:
            load_encoder(encoder, saved, source)
    return encoder.eval().requires_grad_(False)


def load_published(encoder, name, download):
    """Copy torchvision's best weights of its model `name` into an encoder of backbones.py. ValueError if torchvision
    has not fetched them and `download` is not set, if they are damaged or hostile, or if they were trained on images
    that were normalised in another way than ours."""
    best = torchvision.models.get_model_weights(name).DEFAULT
    as_ours = torch.allclose(torch.tensor(best.transforms().mean), mean_std(3)[0].view(3))
    if name in ("googlenet", "inception_v3") or not as_ours:
        raise ValueError(f"torchvision's weights of {name} take images that are normalised in another way")
    path = Path(torch.hub.get_dir()) / "checkpoints" / best.url.rsplit("/", 1)[1]
    if not path.exists():
        if not download:
            raise ValueError(f"torchvision's weights of {name} are not at {path}: --download fetches them")
        try:
            best.get_state_dict(progress=False, check_hash=True, weights_only=True)
        except RuntimeError as error:  # another hash than the one in its name
            raise ValueError(f"what was fetched of torchvision's weights of {name} is damaged: {error}") from error
    # torchvision knows the names in its older files, but would execute anything: look into the file first.
    read_pickled(path)
    try:
        tensors = torchvision.models.get_model(name, weights=best, progress=False).state_dict()
    except (RuntimeError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} does not hold torchvision's weights of {name}: {str(error)[:200]}") from error
    names = {"cls_token": "class_token", "pos_embed": "encoder.pos_embedding"}  # ours of a ViT, torchvision's
    tensors = {own: tensors[names.get(own, own.removeprefix("net."))] for own in encoder.state_dict()}
    if "pos_embed" in tensors:
        side = math.isqrt(tensors["pos_embed"].shape[1] - 1)  # all of these were trained on squares
        tensors["pos_embed"] = resize_positions(tensors["pos_embed"], (side, side), encoder.grid)
    checkpoint.load_exactly(encoder, tensors, path)


# ---------------------------------------- Other channels, image sizes and windows

def fit_channels(tensors, arch, encoder, path):
    """Make the patch embedding in `tensors` fit images of other channels; the sum over channels stays, so that a grey
    image looks as before. Returns what was done, as lines."""
    name, old, new = "patch_embed.proj.weight", arch["in_chans"], encoder.arch["in_chans"]
    if old == new:
        return []
    own, weight = encoder.state_dict().get(name), tensors.get(name)
    if own is None or weight is None or weight.shape != (len(own), old, *own.shape[2:]):
        raise ValueError(f"{path} holds an encoder with in_chans {old}, not {new}, and nothing that could be resized")
    if new == 1:
        tensors[name] = weight.sum(dim=1, keepdim=True)  # (D, 1, p, p)
        rule = "their sum"
    else:
        tensors[name] = weight[:, torch.arange(new) % old] * (old / new)  # (D, new, p, p)
        rule = f"the {old} in turn, times {old}/{new}"
    return [f"patch embedding of {old} channels made one of {new}: {rule}"]


def fit_tables(tensors, arch, encoder, path, method):
    """Make positions and bias tables in `tensors`, of the encoder of `arch`, fit `encoder`: resize them, bias tables by
    `method`, and copy one for all blocks to every block. Returns what was done, as lines."""
    own, table, notes, resized = encoder.state_dict(), "relative_position_bias_table", [], set()
    if f"rel_pos_bias.{table}" in tensors and f"blocks.0.attn.{table}" in own:  # SimMIM's fine-tuning starts like this
        shared = tensors.pop(f"rel_pos_bias.{table}")
        tensors.update({name: shared for name in own if name.endswith(f".attn.{table}")})
        notes.append("one bias table for all blocks copied to every block")

    for name in [name for name in tensors if name.endswith(table) and name in own and not name.startswith("net.")]:
        old, new = window_of(name, arch), window_of(name, encoder.arch)
        if old != new:
            rows = (2 * old[0] - 1) * (2 * old[1] - 1)
            rows += 0 if name.startswith("layers.") else 3  # a ViT's, for its class token (BEiT)
            checkpoint.require_like(torch.zeros(rows, own[name].shape[1]), tensors[name], f"{path}, {name}")
            tensors[name] = resize_bias_table(tensors[name], old, new, method)
            resized.add(f"{old[0]}x{old[1]} to {new[0]}x{new[1]}")
    if resized:
        notes.append(f"bias tables resized from {', '.join(sorted(resized))} ({method})")

    grid = tuple(n // arch["patch_size"] for n in arch["img_size"])
    if grid != encoder.grid and "pos_embed" in tensors:
        expected = torch.empty(1, encoder.num_prefix + grid[0] * grid[1], encoder.embed_width, device="meta")
        checkpoint.require_like(expected, tensors["pos_embed"], path)
        tensors["pos_embed"] = resize_positions(tensors["pos_embed"], grid, encoder.grid, encoder.num_prefix)
        notes.append(f"positions resized from {grid[0]}x{grid[1]} to {encoder.grid[0]}x{encoder.grid[1]}")
    return notes


def fit_run(saved, encoder, path):
    """(the model in `saved`, a last.pt whose encoder is `encoder` for other images or windows, with tables that fit;
    what was done, as lines). Fixed positions are computed, bias tables resized like images (FastMIM, A.3.2)."""
    img_size, window = saved["config"].get("img_size"), saved["config"].get("window")
    numbers = [*img_size, window] if isinstance(img_size, list) else []
    in_range = all(type(n) is int and 0 <= n < 2**16 for n in numbers)
    if len(numbers) != 3 or not in_range or not layouts.is_state_dict(saved["model"]):
        raise ValueError(f"{path} is of another script's run")
    arch = {**encoder.arch, "img_size": img_size, "options": {**encoder.arch["options"], "window": window}}
    inner = {name.removeprefix("encoder."): t for name, t in saved["model"].items() if name.startswith("encoder.")}
    is_fixed = "pos_embed" in dict(encoder.named_buffers())
    if is_fixed:
        inner.pop("pos_embed", None)
    notes = fit_tables(inner, arch, encoder, path, "bicubic")
    if is_fixed:
        inner["pos_embed"] = encoder.pos_embed
    return {**saved["model"], **{f"encoder.{name}": tensor for name, tensor in inner.items()}}, notes


def window_of(name, arch):
    """(rows, columns) of the windows for which an encoder has the bias table `name`: of a ViT, the whole grid."""
    if not name.startswith("layers."):
        return tuple(n // arch["patch_size"] for n in arch["img_size"])
    stage = int(name.split(".")[1])
    return window_sizes(arch["img_size"], arch["options"]["window"])[stage]


def resize_positions(table, old_grid, new_grid, num_prefix=1):
    """A position table (1, num_prefix + h*w, D) for another grid, by bicubic interpolation; the rows of class tokens in
    front stay. The grids are given, not guessed: 64 tokens may be 8x8 or 4x16."""
    prefix, grid = table[:, :num_prefix], table[:, num_prefix:]
    grid = grid.reshape(1, *old_grid, -1).permute(0, 3, 1, 2)  # (1, D, h, w)
    grid = F.interpolate(grid, new_grid, mode="bicubic", align_corners=False)  # (1, D, h', w')
    return torch.cat([prefix, grid.flatten(2).transpose(1, 2)], dim=1)  # (1, num_prefix + h'*w', D)


def resize_bias_table(table, old_window, new_window, method="geometric"):
    """A table of relative-position biases (T, heads), T = (2h-1)*(2w-1) and rows of a class token, for other windows.
    "bicubic" interpolates it like an image (FastMIM's paper). "geometric" is SimMIM's way: a cubic spline through
    entries at distances that grow like a geometric series until the old table reaches as far as the new one, so that
    near neighbours, which matter most, keep their resolution; for a smaller window, the table is cut."""
    h, w = 2 * old_window[0] - 1, 2 * old_window[1] - 1
    new_h, new_w = 2 * new_window[0] - 1, 2 * new_window[1] - 1
    offsets, extra = table[: h * w].view(h, w, -1), table[h * w :]  # (h, w, heads)
    if method == "bicubic":
        image = offsets.permute(2, 0, 1)[None]  # (1, heads, h, w)
        offsets = F.interpolate(image, (new_h, new_w), mode="bicubic")[0].permute(1, 2, 0)  # (h', w', heads)
    elif method == "geometric":
        rows = spline_matrix(geometric_places(h // 2, new_h // 2), new_h // 2)  # (h', h)
        columns = spline_matrix(geometric_places(w // 2, new_w // 2), new_w // 2)  # (w', w)
        offsets = torch.einsum("ij,jlc,kl->ikc", rows, offsets.double(), columns).to(table.dtype)  # (h', w', heads)
    else:
        raise ValueError(f"bias tables are resized by geometric or bicubic interpolation, not {method}")
    return torch.cat([offsets.flatten(0, 1), extra])


def geometric_places(count, radius):
    """Where the entries of one side of a table lie: 0 and +-(1 + q + ... + q^(i-1)) for i = 1 to `count`, fp64, with q
    such that the last one lies at `radius`, or q = 1 if `radius` is not larger than `count`."""
    powers = torch.arange(count, dtype=torch.float64)
    low, high = 1.0, 1.0 + radius
    for _ in range(60):  # bisection
        q = (low + high) / 2
        if (q**powers).sum() > radius:
            high = q
        else:
            low = q
    places = (low**powers).cumsum(0)
    return torch.cat([-places.flip(0), places.new_zeros(1), places])


def spline_matrix(places, radius):
    """The matrix that takes values at `places` (n,) to values at -radius ... radius, (2 * radius + 1, n): by the cubic
    spline whose third derivative does not jump next to its ends (a polynomial for n <= 4), constant beyond them."""
    scale = max(1, radius)  # keeps the system well-conditioned

    def basis(x):
        powers = [(x / scale) ** k for k in range(min(4, len(places)))]
        cubes = [((x - knot) / scale).clamp(min=0) ** 3 for knot in places[2:-2]]
        return torch.stack(powers + cubes, dim=1)

    targets = torch.arange(-radius, radius + 1, dtype=torch.float64).clamp(places[0], places[-1])
    return torch.linalg.solve(basis(places), basis(targets), left=False)
