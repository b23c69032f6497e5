"""Weights for other code: the content of an encoder.pt under the names of timm or torchvision, whose own models then
compute what ours does, or as it is in a safetensors file. What a target cannot express is refused.
"""

import json
from pathlib import Path

import torch

import models
from common import checkpoint, layouts, protocols
from common.layers import offset_index, raster


def export(saved, where, target, out):
    """Write the content of an encoder.pt to `out` as `target` has it, and print how to load it there. ValueError, and
    nothing written, if `target` has no such encoder or head, or if `out` exists."""
    out = Path(out)
    safe = out.suffix == ".safetensors"
    for there in (out, out.with_name(out.name + ".tmp")):  # what checkpoint.write would take the place of
        if there.exists():
            raise ValueError(f"{there} is there already")
    if target == "safetensors" and not safe:
        raise ValueError(f"{out} should end in .safetensors")
    if "dense" in saved:
        raise ValueError(f"{where} is of dense.py, whose head took the place of the encoder's last norm, so that other "
                         "code lacks it; export the encoder that its training began with")
    arch, head = saved["arch"], saved.get("classifier")
    both = {**saved["model"], **(head["tensors"] if head else {})}
    with torch.device("meta"):
        encoder = protocols.rebuild(arch)
    checkpoint.require_state(layouts.expected(encoder, head), both, where)
    if target == "safetensors":
        checkpoint.write(out, pack(saved))
        return print(f"wrote {out}; finetune.py --init takes it")
    require_known(saved, target)
    tensors, call = {"timm": to_timm, "torchvision": to_torchvision}[target](saved)
    checkpoint.write(out, (tensors, {"format": "pt"}) if safe else tensors)
    load = f"safetensors.torch.load_file('{out}')" if safe else f"torch.load('{out}')"
    strict = "" if head or target == "timm" else ", strict=False"
    print(f"wrote {out}, to be loaded by\nmodel = {call}\nmodel.load_state_dict({load}{strict})")


def to_timm(saved):
    """({timm's name: tensor}, the call that makes the model) of an encoder.pt; `require_known` first."""
    arch, (pool, norm, tensors) = saved["arch"], with_head(saved)
    (h, w), K, model = arch["img_size"], len(tensors.get("head.weight", ())), "VisionTransformer"
    sizes = f"img_size=({h}, {w}), patch_size={arch['patch_size']}, in_chans={arch['in_chans']}, num_classes={K}, "
    if arch["model"] in models.VIT:
        pool = {"cls": "token", "mean": "avg"}[pool]
        sizes += (f"embed_dim={arch['width']}, depth={arch['depth']}, num_heads={arch['num_heads']}, "
                  f"global_pool='{pool}', fc_norm={norm == 'layer'}")
        if scale := arch["options"]["layer_scale"]:
            tensors, sizes = renamed(tensors, layouts.LAYER_SCALE), f"{sizes}, init_values={scale}"
    elif arch["model"] in models.PVT2:
        widths, depths, heads, ratios = models.PVT2[arch["model"]]
        tensors = {f"stages.3.{name}" if name.startswith("norm.") else name: t for name, t in tensors.items()}
        model, sizes = "PyramidVisionTransformerV2", (
            f"in_chans={arch['in_chans']}, num_classes={K}, embed_dims={widths}, depths={depths}, num_heads={heads}, "
            f"mlp_ratios={ratios}")
    else:
        model, tensors = "SwinTransformer", renamed(tensors, layouts.TIMM_SWIN)
        sizes += (f"embed_dim={arch['width'][0]}, depths={arch['depth']}, num_heads={arch['num_heads']}, "
                  f"window_size={arch['options']['window']}")
    return tensors, f"timm.models.{model}({sizes})"


def to_torchvision(saved):
    """({torchvision's name: tensor}, the call that makes the model) of an encoder.pt; `require_known` first."""
    arch, (pool, _, tensors) = saved["arch"], with_head(saved)
    K, (h, w) = len(tensors.get("head.weight", ())) or 1000, arch["img_size"]
    if arch["in_chans"] != 3:
        raise ValueError(f"torchvision's models take 3 channels, not {arch['in_chans']}; --to timm")
    if arch["model"].startswith("torchvision:"):
        name = arch["model"].removeprefix("torchvision:")
        return {k.removeprefix("net."): t for k, t in tensors.items()}, f"torchvision.models.{name}()"
    if arch["model"] in models.VIT:
        if h != w or pool == "mean":
            raise ValueError("torchvision's ViT takes square images and classifies by the class token; --to timm")
        # of the class token alone, a norm behind the pooling is a norm ahead of it
        tensors = {name.replace("fc_norm", "norm"): tensor for name, tensor in tensors.items()}
        tensors = renamed(tensors, layouts.TORCHVISION_VIT)
        D = arch["width"]
        return tensors, (f"torchvision.models.VisionTransformer({h}, {arch['patch_size']}, {arch['depth']}, "
                         f"{arch['num_heads']}, {D}, {4 * D}, num_classes={K})")
    window = arch["options"]["window"]
    if min(models.window_sizes((h, w), window)[3]) < window:
        raise ValueError(f"torchvision's Swin has windows of {window} in all stages, too large in the last; --to timm")
    tensors = renamed(tensors, layouts.TORCHVISION_SWIN)
    index = offset_index(raster((window, window)), (window, window)).flatten()  # a buffer that it saves
    for name in [name for name in tensors if name.endswith("bias_table")]:
        tensors[name.replace("bias_table", "index")] = index
    return tensors, (f"torchvision.models.SwinTransformer([4, 4], {arch['width'][0]}, {arch['depth']}, "
                     f"{arch['num_heads']}, [{window}, {window}], num_classes={K})")


def require_known(saved, target):
    """ValueError, in one line, unless timm or torchvision has an encoder, and a head, like those in `saved`."""
    arch, head, options = saved["arch"], saved.get("classifier"), saved["arch"]["options"]
    vit, swin, pvt2 = (arch["model"] in sizes for sizes in (models.VIT, models.SWIN, models.PVT2))
    theirs = arch["model"].startswith("torchvision:") and not arch["model"].startswith("torchvision:vit_")
    if target == "timm":
        known = (vit and options["positions"] == "absolute") or (swin and options["bias"] == "table") or pvt2
    else:  # of a network of its own, torchvision has another head
        known = (vit and options == {"positions": "absolute", "layer_scale": 0.0}) or (theirs and not head) \
            or (swin and options["bias"] == "table")
    if not known or arch.get("drop_layers"):
        cut = f", cut by {arch['drop_layers']} layers" if arch.get("drop_layers") else ""
        raise ValueError(f"{target} has no encoder like {arch['model']} {options}{cut}{' with a head' * bool(head)}; "
                         "--to safetensors keeps it as it is")
    if vit or theirs:
        return
    if head and (head["pool"], head["head_norm"]) not in (("mean", "none"), ("mean", "batch")):
        raise ValueError(f"{target}'s pyramids norm their tokens before the mean, not after it: fine-tune with "
                         "--head_norm none, or export the encoder of the pre-training run")
    maps = [[-(-n // 2**s) for n in arch["img_size"]] for s in range(2, 6)]
    sides = models.window_sizes(arch["img_size"], options["window"]) if swin else [(8, 8), (4, 4), (2, 2), (1, 1)]
    if any(n % side for pair in zip(maps, sides, strict=True) for n, side in zip(*pair, strict=True)):
        raise ValueError(f"{arch['model']} {options} does not tile images of {arch['img_size']}, and {target}'s treats "
                         "what is left over in another way")


def renamed(tensors, table):
    """Tensors of our names under theirs, by a table of layouts.py."""
    names = {ours: theirs for theirs, ours in table.items()}
    return {layouts.rename(name, names): tensor for name, tensor in tensors.items()}


def with_head(saved):
    """(pool, norm, tensors of encoder and head) of an encoder.pt. A BatchNorm without affine is folded into the linear
    head behind it, and so leaves none; without a classifier, pool and norm are those of a class token."""
    head = saved.get("classifier")
    if not head:
        return "cls", "none", saved["model"]
    tensors, norm = dict(head["tensors"]), head["head_norm"]
    if norm == "batch":
        mean, var = tensors.pop("fc_norm.running_mean"), tensors.pop("fc_norm.running_var")
        tensors.pop("fc_norm.num_batches_tracked")
        weight = tensors["head.weight"] / (var + 1e-6).sqrt()  # (K, D); 1e-6: finetune.Classifier's eps
        tensors |= {"head.weight": weight, "head.bias": tensors["head.bias"] - weight @ mean}
    return head["pool"], "layer" if norm == "layer" else "none", {**saved["model"], **tensors}


def pack(saved):
    """(tensors, metadata) for a safetensors file, of the content of an encoder.pt: names cannot clash."""
    head = saved.get("classifier", {})
    about = {"arch": saved["arch"], "method": saved.get("method"), "step": saved.get("step")}
    if head:
        about["classifier"] = {name: value for name, value in head.items() if name != "tensors"}
    return {**saved["model"], **head.get("tensors", {})}, {"format": "pt", "encoder": json.dumps(about)}


def unpack(tensors, about):
    """The inverse of `pack`, or the tensors alone if there is no such metadata."""
    try:
        saved = json.loads(about["encoder"])
        head = {name: tensors[name] for name in tensors if name.startswith(("head.", "fc_norm."))}
        saved["model"] = {name: tensor for name, tensor in tensors.items() if name not in head}
        if "classifier" in saved:
            saved["classifier"]["tensors"] = head
        return saved
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):  # of somebody else
        return tensors
