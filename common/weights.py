"""Weights that travel: from a run to fine-tuning, to other sizes of images and windows; from elsewhere, to elsewhere.

`encoder.pt` is {"arch": what models.build needs, "model": the encoder, "method": who made it, "step"}, and "classifier"
after fine-tuning. What other code saved comes in the same form: layouts.py knows the names.

    python -m common.weights show FILE                        which encoder it is, and its tensors
    python -m common.weights export FILE --to timm OUT        or torchvision, or safetensors: the same weights for other
                                                              code; an OUT that ends in .safetensors is of that format
"""

import argparse
import dataclasses
import json
import math
from pathlib import Path

import torch

import models
from common import checkpoint, exports, layouts, protocols, tensorfile
from common.options import Size, parse_value, say, user_errors
from common.resizing import geometric_places, resize_bias_table, resize_positions  # noqa: F401

OPTIONS = {"window": int, "bias": str, "positions": str, "layer_scale": float, "reduction": list, "max_stride": int}


def read_encoder(path, size=(0, 0)):
    """The content of an encoder.pt, or of published weights (.pth, .pt, .safetensors) in that form, with "notes" on
    what was assumed. `size`: of the images that published weights were made for, zeros to infer it. ValueError if the
    file is damaged, hostile or something else, such as a last.pt."""
    old = False
    if Path(path).suffix == ".safetensors":
        saved = exports.unpack(*tensorfile.read(path))
    else:
        saved, old = checkpoint.read(path, foreign=True), checkpoint.is_old(path)
    if not isinstance(saved, dict) or ("arch" not in saved and not {"config", "step"} <= saved.keys()):  # no last.pt
        saved = layouts.foreign(saved, path, size)
        saved["notes"] += ["a file this old has no checksums"] * old
        return saved
    if any(size):
        raise ValueError(f"--init_size is of weights that do not tell their size themselves, as {path} does")
    saved.pop("notes", None)  # of this load alone, not of the file
    try:
        fits = is_encoder(saved)
    except ValueError as error:  # of models.build
        raise ValueError(f"{path}: {error}") from error
    except (AttributeError, KeyError, TypeError, RuntimeError):  # a part is missing or of another kind
        fits = False
    if not fits:
        raise ValueError(f"{path} is not an encoder.pt of this project")
    return saved


def is_encoder(saved):
    """Is `saved` what this project writes as encoder.pt, so that what is built of its `arch` is no larger than what the
    file holds, or than a network of torchvision is? ValueError, or an error of its kind, for nonsense."""
    arch, tensors, head = saved["arch"], saved["model"], saved.get("classifier")
    sizes, options = [*arch["img_size"], arch["patch_size"], arch["in_chans"]], arch["options"]
    json.dumps([arch, saved.get("method"), saved.get("step")])  # TypeError unless plain data
    if not (checkpoint.all_ordinary(tensors) and all(name in arch for name in ("width", "depth", "num_heads"))
            and len(sizes) == 4 and all(type(n) is int and 0 < n <= 2**16 for n in sizes)
            and all(isinstance(options[name], OPTIONS.get(name, ())) for name in options)
            and all(type(n) is int for n in options.get("reduction", []))):
        return False
    if "classifier" in saved and not (
            checkpoint.all_ordinary(head["tensors"]) and isinstance(head["classes"], list)
            and all(type(name) is str for name in head["classes"])
            and len(head["tensors"]["head.weight"]) == len(head["classes"])
            and head["pool"] in ("mean", "cls") and head["head_norm"] in ("layer", "batch", "none")):
        return False
    if arch["model"].startswith("torchvision:") and math.prod(arch["img_size"]) > 2**26:
        return False  # what builds it computes a map of one image, if only on meta here
    with torch.device("meta"):
        own = protocols.rebuild(arch).state_dict()
    return all(own[name].shape == tensors[name].shape for name in own.keys() & tensors.keys()) \
        and all(name.startswith("norm.") for name in own.keys() - tensors.keys())


def as_in_init(cfg):
    """(cfg with model, patch_size, in_chans and img_size as --init has them, content of --init or None). ValueError or
    FileNotFoundError, in one line, if it is no encoder, or another one than the options ask for."""
    arch, saved = {"in_chans": 3, "img_size": (224, 224)}, None
    if cfg.init != "none":
        saved = read_encoder(cfg.init, cfg.init_size)
        arch = {name: saved["arch"][name] for name in ("model", "patch_size", "in_chans", "img_size")}
    for name in arch.keys() - {"img_size", "in_chans"}:
        if getattr(cfg, name) not in ("auto", 0, arch[name]):
            raise ValueError(f"--{name} {getattr(cfg, name)}, but the encoder in {cfg.init} has {name} {arch[name]}")
    size = cfg.img_size if any(cfg.img_size) else tuple(arch["img_size"])
    return dataclasses.replace(cfg, **{**arch, "img_size": size, "in_chans": cfg.in_chans or arch["in_chans"]}), saved


def encoder_for(cfg, saved, trains):
    """The encoder that the options describe, which has what `as_in_init` found in `saved`, with random weights; cut if
    that one is. If it `trains`, so do its positions, and it has stochastic depth."""
    arch = saved["arch"] if saved else {"options": {}}
    options = arch["options"] | ({"window": cfg.window} if cfg.window else {})
    if options.get("positions") == "shared_bias" and trains:
        options["positions"] = "block_bias"  # as SimMIM fine-tunes: every block gets a table of its own
    own = {name: getattr(cfg, name) for name in ("model", "img_size", "patch_size", "in_chans")}
    encoder = protocols.rebuild({**arch, **own, "options": options}, learn_positions=trains,
                                drop_path=cfg.drop_path if trains else 0.0)
    encoder.checkpointing = cfg.activation_checkpointing
    return encoder


def load_encoder(encoder, saved, where, fresh=()):
    """Copy the encoder of an encoder.pt, its tables and patch embedding resized to what `encoder` has, and say what was
    done; `fresh` names what of a model is newly initialised beside the encoder.

    ValueError if heads, depth, width or patch differ (weights of 12 heads fit 6 heads, and are wrong there), or if a
    tensor of the encoder would be left unset.
    """
    arch, tensors = saved["arch"], dict(saved["model"])
    for name in ("model", "patch_size", "width", "depth", "num_heads"):
        if arch[name] != encoder.arch[name]:
            raise ValueError(f"{where} holds an encoder with {name} {arch[name]}, not {encoder.arch[name]}")
    for name in ("bias", "layer_scale"):
        there, here = arch["options"].get(name), encoder.arch["options"].get(name)
        if there != here:
            raise ValueError(f"{where} holds an encoder with {name} {there}, not {here}")
    grid = tuple(n // arch["patch_size"] for n in arch["img_size"])
    method = "bicubic" if saved.get("method") == "FastMIM" else "geometric"  # each as its own fine-tuning
    notes = [*saved.get("notes", []), *adapt_channels(tensors, arch, encoder, where),
             *adapt_bias_tables(tensors, arch, encoder, where, method)]
    if grid != encoder.grid and "pos_embed" in tensors:
        rows = encoder.num_prefix + grid[0] * grid[1]
        checkpoint.require_like(torch.empty(1, rows, encoder.embed_width, device="meta"), tensors["pos_embed"], where)
        tensors["pos_embed"] = resize_positions(tensors["pos_embed"], grid, encoder.grid, encoder.num_prefix)
        notes.append(f"positions resized from {grid[0]}x{grid[1]} to {encoder.grid[0]}x{encoder.grid[1]}")
    over = [name for name in tensors if name not in encoder.state_dict()]
    if over and all(name.startswith("norm.") for name in over):  # a head with its own norm replaces the last one
        notes.append(f"left over: {', '.join(over)}")
        tensors = {name: tensor for name, tensor in tensors.items() if name not in over}
    checkpoint.load_exactly(encoder, tensors, where)
    if fresh:
        notes += ["left over: the classifier"] * ("classifier" in saved) + [f"newly initialised: {', '.join(fresh)}"]
    say("\n  ".join([f"loaded {len(tensors)} tensors of {arch['model']} from {where}", *notes]))


def adapt_channels(tensors, arch, encoder, where):
    """Make the patch embedding fit images of other channels, and say so, as a list of lines: for one channel, the sum
    over channels, which sees a grey image as before; else the channels in turn, scaled to keep the sum."""
    name, old, new = "patch_embed.proj.weight", arch["in_chans"], encoder.arch["in_chans"]
    if old == new:
        return []
    own, weight = encoder.state_dict().get(name), tensors.get(name)
    if own is None or weight is None or weight.shape != (len(own), old, *own.shape[2:]):
        raise ValueError(f"{where} holds an encoder with in_chans {old}, not {new}, and nothing that could be resized")
    one = weight.sum(dim=1, keepdim=True)  # (D, 1, p, p)
    tensors[name] = one if new == 1 else weight[:, torch.arange(new) % old] * (old / new)  # (D, new, p, p)
    rule = "their sum" if new == 1 else f"the {old} in turn, times {old}/{new}"
    return [f"patch embedding of {old} channels made one of {new}: {rule}"]


def adapt_bias_tables(tensors, arch, encoder, where, method):
    """Make the bias tables among `tensors`, of the encoder that `arch` describes, fit `encoder`: one for all blocks
    becomes one per block, and other windows get resized tables, by `method`. Changes `tensors`; returns what was done,
    as lines."""
    own, table, sizes, notes = encoder.state_dict(), "relative_position_bias_table", set(), []
    if f"rel_pos_bias.{table}" in tensors and f"blocks.0.attn.{table}" in own:  # SimMIM's fine-tuning starts like this
        shared = tensors.pop(f"rel_pos_bias.{table}")
        tensors |= {name: shared for name in own if name.endswith(f".attn.{table}")}
        notes.append("one bias table for all blocks copied to every block")
    for name in [name for name in tensors if name.endswith(table) and name in own and not name.startswith("net.")]:
        stage = int(name.split(".")[1]) if name.startswith("layers.") else None  # None: a ViT, one window over the grid
        old, new = (tuple(n // a["patch_size"] for n in a["img_size"]) if stage is None else
                    models.window_sizes(a["img_size"], a["options"]["window"])[stage] for a in (arch, encoder.arch))
        if old != new:
            rows = (2 * old[0] - 1) * (2 * old[1] - 1) + (3 if stage is None else 0)  # 3: BEiT's, for a class token
            checkpoint.require_like(torch.zeros(rows, own[name].shape[1]), tensors[name], f"{where}, {name}")
            tensors[name] = resize_bias_table(tensors[name], old, new, method)
            sizes.add(f"{old[0]}x{old[1]} to {new[0]}x{new[1]}")
    return notes + [f"bias tables resized from {', '.join(sorted(sizes))} ({method})"] * bool(sizes)


def show(saved, where):
    """Print what a file holds."""
    arch, head, tensors = saved["arch"], saved.get("classifier"), saved["model"]
    print(f"{where}: {saved.get('method')}", *saved.get("notes", []), sep="\n  ")
    print("  " + ", ".join(f"{name} {value}" for name, value in arch.items()))
    if head:
        print(f"  classifier: pool {head['pool']}, norm {head['head_norm']}, {len(head['classes'])} classes")
    print(f"  {len(tensors)} tensors, {sum(t.numel() for t in tensors.values()) / 1e6:.2f} M numbers")
    for name, tensor in {**tensors, **(head["tensors"] if head else {})}.items():
        print(f"    {name} {tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    for name in ("show", "export"):
        command = commands.add_parser(name)
        command.add_argument("file", help="encoder.pt, or weights from elsewhere")
        command.add_argument("--init_size", default="0", help="HxW of the images that the weights were made for")
        if name == "export":
            command.add_argument("--to", required=True, choices=["timm", "torchvision", "safetensors"])
            command.add_argument("out", help="file to write; one that ends in .safetensors gets that format")
    args = parser.parse_args(argv)
    with user_errors():
        saved = read_encoder(args.file, parse_value("init_size", Size, args.init_size))
        show(saved, args.file) if args.what == "show" else exports.export(saved, args.file, args.to, args.out)


if __name__ == "__main__":
    main()
