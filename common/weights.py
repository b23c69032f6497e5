"""An encoder's weights: read from a run or from elsewhere, and made to fit images and windows of other sizes.

`encoder.pt` is {"arch": what models.from_arch needs, "model": the encoder, "method": who made it, "step", and "mean",
"std" and perhaps "value_range" of its images}, and "classifier" after fine-tuning, "dense" after tools/dense.py. What
other code saved comes in the same form: formats.py opens its files, and layouts.py knows the names. `from_arch` and
`sizes` are those of models.py, which lies above this file.
"""

import dataclasses
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision

from common import checkpoint, config, layouts, transforms
from common.config import print_once
from common.formats import read_any, read_pickled
from common.layers import window_sizes

# ---------------------------------------- Reading

# Kinds of the options in "arch".
OPTIONS = {"window": int, "bias": str, "positions": str, "layer_scale": float, "reduction": list, "max_stride": int,
           "num_heads": int, "drop_layers": object}  # which models.build checks


def read_encoder(path, from_arch, sizes, img_size=(0, 0), num_heads=0, which=""):
    """The content of an encoder.pt, or of published weights (.pth, .pt, .bin, .safetensors, or the .index.json of their
    parts) in that form, with "notes" on what was assumed. Of published weights: `img_size` of their images, `num_heads`
    of a ViT, zeros to infer them, and `which` of several in a file. ValueError if the file is something else."""
    saved, notes = read_any(path)
    if checkpoint.is_run(saved):
        beside = Path(path).with_name("encoder.pt")
        raise ValueError(f"{path} is a last.pt, from which --resume goes on; {beside} is for --init")
    if not is_own(saved):
        saved = layouts.foreign(saved, path, from_arch, sizes, img_size, num_heads, which)
        return {**saved, "notes": saved["notes"] + notes}
    for name, value in (("init_size", any(img_size)), ("num_heads", num_heads), ("weights", which)):
        if value:
            raise ValueError(f"--{name} is of weights that do not tell it themselves, as {path} does")
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


def is_own(saved):
    """Is it an encoder.pt of ours, or meant to be one? Other code has an "arch" that is a name, say."""
    if not checkpoint.has_encoder(saved) or isinstance(saved["arch"], str):
        return False
    looks_like = isinstance(saved["arch"], dict) and {"model", "img_size"} <= saved["arch"].keys()
    return "method" in saved or looks_like


def is_encoder(saved, from_arch):
    """Is `saved` an encoder.pt, so that what is built of its `arch` is no larger than what the file holds, or than a
    network of torchvision is? ValueError, or an error of its kind, for nonsense."""
    arch, tensors, options = saved["arch"], saved["model"], saved["arch"]["options"]
    json.dumps([arch, saved.get("method"), saved.get("step")])  # TypeError unless plain data
    if not has_statistics(saved):
        return False
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


def has_statistics(saved):
    """Are "mean", "std" and "value_range" what they should be, as far as they are there?"""
    C, value_range = saved["arch"]["in_chans"], saved.get("value_range", [0, 1])
    lists = [saved.get("mean", [0.5] * C), saved.get("std", [0.5] * C), value_range]
    are_numbers = all(type(n) in (int, float) and math.isfinite(n) for numbers in lists for n in numbers)
    if not are_numbers or [len(numbers) for numbers in lists] != [C, C, 2]:
        return False
    return min(lists[1], default=0) > 0 and value_range[0] < value_range[1]


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
    """(cfg with model, patch_size, in_chans, img_size, mean, std and value_range as --init has them, content of --init
    or None). ValueError or FileNotFoundError if it is no encoder, or another one than the options ask for."""
    saved, arch = None, {"in_chans": 3, "img_size": (224, 224)}
    if cfg.plan and cfg.model != "auto" and not Path(cfg.init).exists():  # before it is made; --model says the size
        cfg = dataclasses.replace(cfg, init="none")
    if cfg.init != "none":
        saved = read_encoder(cfg.init, from_arch, sizes, cfg.init_size, cfg.num_heads, cfg.weights)
        arch = saved["arch"]
        for name, value in (("model", cfg.model), ("patch_size", cfg.patch_size)):
            if value not in ("auto", 0, arch[name]):
                raise ValueError(f"--{name} {value}, but the encoder in {cfg.init} has {name} {arch[name]}")
        cfg = dataclasses.replace(cfg, model=arch["model"], patch_size=arch["patch_size"])
    elif any(cfg.init_size) or cfg.num_heads or cfg.weights:
        raise ValueError("--init_size, --num_heads and --weights are of published weights, in --init")
    img_size = cfg.img_size if any(cfg.img_size) else tuple(arch["img_size"])
    cfg = dataclasses.replace(cfg, img_size=img_size, in_chans=cfg.in_chans or arch["in_chans"])
    config.check_channels(cfg)
    return with_statistics(cfg, saved) if saved else (cfg, saved)


def with_statistics(cfg, saved):
    """(cfg, saved) with mean and std of the images that each is for. What cfg asks for holds for both; or else those of
    the weights do or, for other channels, those that are usual (and `fit_channels` makes the weights fit)."""
    same_channels = cfg.in_chans == saved["arch"]["in_chans"]
    own = mean, std = statistics_of(saved)
    notes = assumed_statistics(saved)
    if same_channels and (cfg.mean or cfg.std):
        mean = transforms.for_each(cfg.mean, cfg.in_chans) or mean
        std = transforms.for_each(cfg.std, cfg.in_chans) or std
        differs = own != (mean, std) and not notes
        notes = [f"normalised by mean {listed(mean)}, std {listed(std)} as asked, not as in its training"] * differs
    value_range = cfg.value_range or tuple(saved.get("value_range", ()))
    if value_range and not cfg.value_range:
        notes.append(f"numbers of more than 8 bits as in its training: --value_range {listed(value_range)}")
    saved = {**saved, "mean": mean, "std": std, "notes": [*saved.get("notes", []), *notes]}
    if same_channels and (mean, std) != transforms.statistics(cfg.in_chans):
        cfg = dataclasses.replace(cfg, mean=tuple(mean), std=tuple(std))
    return dataclasses.replace(cfg, value_range=value_range), saved


def statistics_of(saved):
    """(mean, std) of the images that the encoder of an encoder.pt was made for; older files are of the usual ones."""
    usual = transforms.statistics(saved["arch"]["in_chans"])
    return saved.get("mean", usual[0]), saved.get("std", usual[1])


def assumed_statistics(saved):
    """What a user should know of weights from elsewhere, which do not tell how their images were normalised: lines."""
    if "mean" in saved or "notes" not in saved:
        return []
    mean, std = map(listed, statistics_of(saved))
    return [f"images taken to be normalised by mean {mean}, std {std} (--mean, --std): weights do not tell"]


def listed(numbers):
    return ",".join(f"{number:g}" for number in numbers)


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


def load_encoder(encoder, saved, path, fresh=(), cfg=None):
    """Copy the encoder of an encoder.pt, its tables and patch embedding made to fit what `encoder` has, and images as
    `cfg` normalises them, and print what was done; `fresh` names what of a model is newly initialised beside it.
    ValueError if heads, depth, width or patch differ (weights of 12 heads fit 6 heads, and are wrong there), or if a
    tensor would be left unset."""
    arch, tensors = saved["arch"], dict(saved["model"])
    there, here = {**arch, **arch["options"]}, {**encoder.arch, **encoder.arch["options"]}
    for name in ("model", "patch_size", "width", "depth", "num_heads", "bias", "layer_scale"):
        if there.get(name) != here.get(name):
            raise ValueError(f"{path} holds an encoder with {name} {there.get(name)}, not {here.get(name)}")
    method = "bicubic" if saved.get("method") == "FastMIM" else "geometric"  # each as its own fine-tuning
    images = transforms.statistics(encoder.arch["in_chans"], cfg)
    notes = [*saved.get("notes", []), *fit_channels(tensors, saved, encoder, images, path),
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
    none, if it may not be fetched, or if its images are normalised in another way than `cfg` says."""
    images = {"img_size": cfg.img_size, "in_chans": cfg.in_chans}
    if source.startswith("torchvision:"):
        encoder = from_arch({"model": source, "patch_size": 0, "options": {}, **images})
        name = source.removeprefix("torchvision:")
        if (wants := published_statistics(name)) != transforms.statistics(3, cfg):
            raise ValueError(f"torchvision's weights of {name} take images normalised by mean {listed(wants[0])}, std "
                             f"{listed(wants[1])}: a teacher sees those of the run (--mean, --std)")
        if not cfg.plan:
            load_published(encoder, name, cfg.download)
    else:
        saved = read_encoder(source, from_arch, sizes)
        saved = {**saved, "notes": [*saved.get("notes", []), *assumed_statistics(saved)]}
        encoder = from_arch(saved["arch"], **images, final_norm=not lost_its_norm(saved))
        if not cfg.plan:
            load_encoder(encoder, saved, source, cfg=cfg)
    return encoder.eval().requires_grad_(False)


def published_file(name):
    """Where torchvision keeps its best weights of the model `name`, be they there or not."""
    best = torchvision.models.get_model_weights(name).DEFAULT
    return Path(torch.hub.get_dir()) / "checkpoints" / best.url.rsplit("/", 1)[1]


def published_statistics(name):
    """(mean, std) of the images that torchvision's best weights of the model `name` were trained on."""
    images = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    return list(images.mean), list(images.std)


def load_published(encoder, name, download=False):
    """Copy torchvision's best weights of its model `name` into an encoder of backbones.py, which then wants images as
    `published_statistics` says. ValueError if torchvision has not fetched them and must not `download`, if they are
    damaged or hostile, or if the network itself would change the images first."""
    best = torchvision.models.get_model_weights(name).DEFAULT
    if name in ("googlenet", "inception_v3"):  # with these weights, torchvision normalises again, inside
        raise ValueError(f"torchvision's weights of {name} take images that are normalised in another way")
    path = published_file(name)
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

def fit_channels(tensors, saved, encoder, images, path):
    """Make the patch embedding in `tensors` fit images of other channels, or with another mean and std: `images`. A
    grey image gives what it gave before, exactly (patches that overlap the border of an image aside), because the
    weights of new channels sum up to those of old ones. Returns what was done, as lines."""
    weight_name, bias_name = "patch_embed.proj.weight", "patch_embed.proj.bias"
    (old_mean, old_std), (new_mean, new_std) = statistics_of(saved), images
    old, new = len(old_mean), len(new_mean)
    if (list(old_mean), list(old_std)) == (list(new_mean), list(new_std)):
        return []
    own, weight, bias = encoder.state_dict().get(weight_name), tensors.get(weight_name), tensors.get(bias_name)
    if own is None or weight is None or bias is None or weight.shape != (len(own), old, *own.shape[2:]):
        what = f"in_chans {old}, not {new}" if old != new else f"mean {listed(old_mean)}, std {listed(old_std)}"
        raise ValueError(f"{path} holds an encoder with {what}, and nothing that could be made to fit")

    # share[k, c]: how much of old channel c becomes new channel k. Each column sums up to 1.
    share = torch.zeros(new, old, dtype=torch.float64)
    for i in range(max(old, new)):
        share[i % new, i % old] = 1
    share = share / share.sum(dim=0)
    # x_c = (pixel - m_c) / s_c = x'_k s'_k / s_c + (m'_k - m_c) / s_c, with ' for the new images
    old_mean, old_std = torch.tensor([old_mean, old_std], dtype=torch.float64)  # each (old,)
    new_mean, new_std = torch.tensor([new_mean, new_std], dtype=torch.float64)  # each (new,)
    scale = share * new_std[:, None] / old_std  # (new, old)
    shift = (share * (new_mean[:, None] - old_mean) / old_std).sum(dim=0)  # (old,)
    tensors[weight_name] = torch.einsum("kc,dcij->dkij", scale, weight.double()).to(weight.dtype)  # (D, new, p, p)
    tensors[bias_name] = (bias.double() + weight.double().sum(dim=(2, 3)) @ shift).to(bias.dtype)  # (D,)
    if old == new:
        return [f"patch embedding made to fit images normalised by mean {listed(images[0])}, std {listed(images[1])}"]
    rule = "their sum" if new == 1 else f"the {old} in turn, in equal shares"
    return [f"patch embedding of {old} channels made one of {new}: {rule}, for a mean of {listed(images[0])} and a std "
            f"of {listed(images[1])}"]


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
