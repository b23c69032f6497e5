"""Encoder files: say what one holds, write it for other code, cut or shuffle its layers.

    python -m tools.convert show FILE                      which encoder it is, and its tensors
    python -m tools.convert export FILE --to timm OUT      the same for other code: timm, torchvision or safetensors
    python -m tools.convert --drop_layers 2 IN OUT         IN without its last two blocks
    python -m tools.convert --shuffle_layers IN OUT        every block gets the weights of another one, at random

FILE and IN are an encoder.pt, or weights from elsewhere. An exported model computes there what ours does here. Cut and
shuffled encoders show what depth and order of blocks are worth (Dark Secrets, Xie et al., arXiv 2205.13543).
"""

import argparse
import json
import sys
from pathlib import Path

import torch

import models
from common import checkpoint, folder, formats, layouts, weights
from common.config import Size, parse_value, print_once, user_errors
from common.layers import offset_index, raster, window_sizes
from common.randomness import seed_of


def show(saved, path):
    arch, head, tensors = saved["arch"], saved.get("classifier"), saved["model"]
    print_once("\n  ".join([f"{path}: {saved.get('method')}", *saved.get("notes", [])]))
    print_once("  " + ", ".join(f"{name} {value}" for name, value in arch.items()))
    mean, std = map(weights.listed, weights.statistics_of(saved))
    print_once(f"  of images with mean {mean}, std {std}" + ", if they were the usual ones" * ("mean" not in saved))
    if head:
        print_once(f"  classifier: pool {head['pool']}, norm {head['head_norm']}, {len(head['classes'])} classes")
    print_once(f"  {len(tensors)} tensors, {sum(t.numel() for t in tensors.values()) / 1e6:.2f} M numbers")
    for name, tensor in {**tensors, **(head["tensors"] if head else {})}.items():
        print_once(f"    {name} {tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}")


# ---------------------------------------- Edit

def edit(saved, drop_layers=0, seed=None):
    """(content of an encoder.pt without its last `drop_layers` blocks, what was done as lines). With a seed, each block
    left gets the tensors of one drawn at random from all, none twice. ValueError if there are no such blocks."""
    if drop_layers < 1 and seed is None:
        raise ValueError("--drop_layers takes 1 or more; without it, say --shuffle_layers")
    arch, tensors = saved["arch"], saved["model"]
    prefixes = ("blocks.", "layers.2.blocks.", "stages.2.blocks.")  # of a ViT, of a pyramid's third stage
    prefix = next((prefix for prefix in prefixes if f"{prefix}0.norm1.weight" in tensors), None)
    if prefix is None:
        raise ValueError(f"--drop_layers and --shuffle_layers know ViT, Swin and PVT, not {arch['model']}")
    if drop_layers:
        options = arch["options"]
        arch = {**arch, "options": {**options, "drop_layers": options.get("drop_layers", 0) + drop_layers}}
    with torch.device("meta"):
        own = models.from_arch(arch).state_dict()

    # order[i] is the block whose tensors block i gets.
    total, left, notes = number_of_blocks(tensors, prefix), number_of_blocks(own, prefix), []
    order = range(left)
    if seed is not None:
        generator = torch.Generator().manual_seed(seed_of(seed, "shuffled layers"))
        order = torch.randperm(total, generator=generator)[:left].tolist()
        notes.append(f"{prefix}0 to {left - 1} are those that were {', '.join(map(str, order))}")
    if dropped := sorted(set(range(total)) - set(order)):
        notes.append(f"left over: {prefix}{', '.join(map(str, dropped))}")
    kept = {}
    for name in own:
        source = name
        if name.startswith(prefix):
            block, rest = name.removeprefix(prefix).split(".", 1)
            source = f"{prefix}{order[int(block)]}.{rest}"
        if source in tensors:
            kept[name] = tensors[source]
    if "norm.weight" in kept and kept["norm.weight"].shape != own["norm.weight"].shape:
        width = own["norm.weight"].shape
        kept |= {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
        notes.append("left over: the fourth stage; its norm starts anew behind the third")
    without = {"notes"}  # of reading
    if drop_layers and not {"classifier", "dense"}.isdisjoint(saved):  # which fit the last block alone
        without |= {"classifier", "dense"}
        notes.append("left over: the head")
    edited = {**saved, "arch": arch, "model": kept}
    return {name: value for name, value in edited.items() if name not in without}, notes


def number_of_blocks(names, prefix):
    return len({name.removeprefix(prefix).split(".")[0] for name in names if name.startswith(prefix)})


# ---------------------------------------- Export

def export(saved, path, target, out):
    """Write the content of an encoder.pt to `out` as `target` has it, and print how to load it there. ValueError, and
    nothing written, if `target` has no such encoder or head."""
    is_safetensors = out.suffix == ".safetensors"
    if target == "safetensors" and not is_safetensors:
        raise ValueError(f"{out} should end in .safetensors")
    head = saved.get("classifier")
    if weights.lost_its_norm(saved) and not head:
        raise ValueError(f"{path} lacks the encoder's last norm, in whose place tools/dense.py or finetune.py put a "
                         "head: export the encoder that its training began with")
    with torch.device("meta"):
        encoder = models.from_arch(saved["arch"])
    checkpoint.require_state(layouts.expected(encoder, head), pack(saved)[0], path)

    if target == "safetensors":
        write_safetensors(out, *pack(saved))
        return print_once(f"wrote {out}; finetune.py --init takes it")
    require_known(saved, target)
    tensors, call = to_timm(saved) if target == "timm" else to_torchvision(saved)
    if is_safetensors:
        write_safetensors(out, tensors, {"format": "pt"})
    else:
        checkpoint.write(out, tensors)
    load = f"safetensors.torch.load_file('{out}')" if is_safetensors else f"torch.load('{out}')"
    strict = "" if head or target == "timm" else ", strict=False"
    print_once(f"wrote {out}, to be loaded by\nmodel = {call}\nmodel.load_state_dict({load}{strict})")


def write_safetensors(out, tensors, metadata):
    """OSError, and what was there, if the disk is full."""
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    content = formats.safetensors_library().torch.save(tensors, metadata)
    with folder.replacing(out) as part:
        part.write_bytes(content)


def pack(saved):
    """(tensors, metadata) of an encoder.pt for a safetensors file: formats.unpack is the inverse."""
    kept = ("arch", "method", "step", "mean", "std", "value_range")
    about, tensors = {name: saved[name] for name in kept if name in saved}, saved["model"]
    if "classifier" in saved:
        about["classifier"] = dict(saved["classifier"])
        tensors = {**tensors, **about["classifier"].pop("tensors")}
    return tensors, {"format": "pt", "encoder": json.dumps(about)}


def require_known(saved, target):
    """ValueError, in one line, unless timm or torchvision has an encoder, and a head, like those in `saved`."""
    arch, head = saved["arch"], saved.get("classifier")
    options = {name: value for name, value in arch["options"].items() if name != "num_heads"}  # theirs to choose
    is_vit, is_swin = arch["model"] in models.VIT, arch["model"] in models.SWIN
    is_own = arch["model"].startswith("torchvision:") and not arch["model"].startswith("torchvision:vit_")
    known = is_swin and options["bias"] == "table"
    if target == "timm":
        known |= (is_vit and options["positions"] == "absolute") or arch["model"] in models.PVT2
    else:  # of a network of its own, torchvision has another head
        known |= (is_vit and options == {"positions": "absolute", "layer_scale": 0.0}) or (is_own and not head)
    if not known or "drop_layers" in options:
        cut = f", cut by {options['drop_layers']} layers" if "drop_layers" in options else ""
        raise ValueError(f"{target} has no encoder like {arch['model']} {options}{cut}{' with a head' * bool(head)}; "
                         "--to safetensors keeps it as it is")
    if is_vit or is_own:
        return
    if head and (head["pool"], head["head_norm"]) not in (("mean", "none"), ("mean", "batch")):
        raise ValueError(f"{target}'s pyramids norm their tokens before the mean, not after it: fine-tune with "
                         "--head_norm none, or export the encoder of the pre-training run")
    maps = [[-(-n // 2**s) for n in arch["img_size"]] for s in range(2, 6)]
    sides = window_sizes(arch["img_size"], options["window"]) if is_swin else [(8, 8), (4, 4), (2, 2), (1, 1)]
    if any(n % side for pair in zip(maps, sides, strict=True) for n, side in zip(*pair, strict=True)):
        raise ValueError(f"{arch['model']} {options} does not tile images of {arch['img_size']}, and {target}'s treats "
                         "what is left over in another way")


def to_timm(saved):
    """({timm's name: tensor}, the call that makes the model) of an encoder.pt; `require_known` first."""
    arch, (pool, norm, tensors) = saved["arch"], with_head(saved)
    (h, w), K = arch["img_size"], len(tensors.get("head.weight", ()))
    common = f"in_chans={arch['in_chans']}, num_classes={K}"
    image = f"img_size=({h}, {w}), patch_size={arch['patch_size']}, {common}"
    if arch["model"] in models.VIT:
        pool = {"cls": "token", "mean": "avg"}[pool]
        call = (f"VisionTransformer({image}, embed_dim={arch['width']}, depth={arch['depth']}, "
                f"num_heads={arch['num_heads']}, global_pool='{pool}', fc_norm={norm == 'layer'}")
        if scale := arch["options"]["layer_scale"]:
            tensors, call = renamed(tensors, layouts.LAYER_SCALE), f"{call}, init_values={scale}"
    elif arch["model"] in models.PVT2:
        widths, depths, heads, ratios = models.PVT2[arch["model"]]
        tensors = {f"stages.3.{name}" if name.startswith("norm.") else name: t for name, t in tensors.items()}
        call = (f"PyramidVisionTransformerV2({common}, embed_dims={widths}, depths={depths}, num_heads={heads}, "
                f"mlp_ratios={ratios}")
    else:
        tensors = renamed(tensors, layouts.TIMM_SWIN)
        call = (f"SwinTransformer({image}, embed_dim={arch['width'][0]}, depths={arch['depth']}, "
                f"num_heads={arch['num_heads']}, window_size={arch['options']['window']}")
    return tensors, f"timm.models.{call})"


def to_torchvision(saved):
    """({torchvision's name: tensor}, the call that makes the model) of an encoder.pt; `require_known` first."""
    arch, (pool, _, tensors) = saved["arch"], with_head(saved)
    (h, w), K = arch["img_size"], len(tensors.get("head.weight", ())) or 1000
    if arch["in_chans"] != 3:
        raise ValueError(f"torchvision's models take 3 channels, not {arch['in_chans']}; --to timm")
    if arch["model"].startswith("torchvision:"):
        name = arch["model"].removeprefix("torchvision:")
        return {k.removeprefix("net."): t for k, t in tensors.items()}, f"torchvision.models.{name}()"
    if arch["model"] in models.VIT:
        if h != w or pool == "mean":
            raise ValueError("torchvision's ViT takes square images and classifies by the class token; --to timm")
        # Of the class token alone, a norm behind the pooling is a norm ahead of it.
        tensors = {name.replace("fc_norm", "norm"): tensor for name, tensor in tensors.items()}
        sizes = f"{h}, {arch['patch_size']}, {arch['depth']}, {arch['num_heads']}, {arch['width']}, {4 * arch['width']}"
        call = f"torchvision.models.VisionTransformer({sizes}, num_classes={K})"
        return renamed(tensors, layouts.TORCHVISION_VIT), call
    window = arch["options"]["window"]
    if min(window_sizes((h, w), window)[3]) < window:
        raise ValueError(f"torchvision's Swin has windows of {window} in all stages, too large in the last; --to timm")
    tensors = renamed(tensors, layouts.TORCHVISION_SWIN)
    index = offset_index(raster((window, window)), (window, window)).flatten()  # a buffer that it saves
    for name in [name for name in tensors if name.endswith("bias_table")]:
        tensors[name.replace("bias_table", "index")] = index.clone()
    return tensors, (f"torchvision.models.SwinTransformer([4, 4], {arch['width'][0]}, {arch['depth']}, "
                     f"{arch['num_heads']}, [{window}, {window}], num_classes={K})")


def renamed(tensors, table):
    """Tensors of our names under theirs, by a table of layouts.py."""
    names = {ours: theirs for theirs, ours in table.items()}
    return {layouts.rename(name, names): tensor for name, tensor in tensors.items()}


def with_head(saved):
    """(pool, norm, tensors of encoder and head) of an encoder.pt; without a head, those of a class token. A BatchNorm
    is folded into the linear layer behind it, and so leaves none."""
    head = saved.get("classifier", {"pool": "cls", "head_norm": "none", "tensors": {}})
    tensors, norm = dict(head["tensors"]), head["head_norm"]
    if norm == "batch":
        mean, var = tensors.pop("fc_norm.running_mean"), tensors.pop("fc_norm.running_var")
        tensors.pop("fc_norm.num_batches_tracked")
        weight = tensors["head.weight"] / (var + 1e-6).sqrt()  # (K, D); 1e-6: finetune.Classifier's eps
        tensors |= {"head.weight": weight, "head.bias": tensors["head.bias"] - weight @ mean}
        norm = "none"
    return head["pool"], norm, {**saved["model"], **tensors}


# ---------------------------------------- Command line

def main(argv=None):
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] not in ("show", "export", "edit", "-h", "--help"):
        words.insert(0, "edit")
    parser = argparse.ArgumentParser(prog="python -m tools.convert", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("show", "export", "edit"):
        command = commands.add_parser(name)
        command.add_argument("file", help="encoder.pt, or weights from elsewhere")
        command.add_argument("--init_size", default="0", help="HxW of the images that the weights were made for")
        command.add_argument("--num_heads", type=int, default=0, help="of a ViT from elsewhere, if not as is usual")
        command.add_argument("--weights", default="", help="which of several in a file from elsewhere, as ema")
        if name != "show":
            command.add_argument("out", type=Path, help="file to write; .safetensors at its end makes it one")
        if name == "export":
            command.add_argument("--to", required=True, choices=["timm", "torchvision", "safetensors"])
        if name == "edit":
            command.add_argument("--drop_layers", type=int, default=0, help="blocks; of a pyramid: stage 4 and so many")
            command.add_argument("--shuffle_layers", action="store_true")
            command.add_argument("--seed", type=int, default=0, help="of the shuffling")
    args = parser.parse_args(words)
    with user_errors():
        img_size = parse_value("init_size", Size, args.init_size)
        saved = weights.read_encoder(args.file, models.from_arch, models.SIZES, img_size, args.num_heads,
                                     args.weights)
        if args.command == "show":
            return show(saved, args.file)
        if args.out.exists():
            raise ValueError(f"{args.out} is there already")
        if args.command == "export":
            export(saved, args.file, args.to, args.out)
        else:
            edited, notes = edit(saved, args.drop_layers, args.seed if args.shuffle_layers else None)
            checkpoint.write(args.out, edited)
            print_once("\n  ".join([f"wrote {args.out}", *saved.get("notes", []), *notes]))


if __name__ == "__main__":
    main()
