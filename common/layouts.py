"""Names: what other code calls the tensors of our encoders, and of which architecture they are.

A layout is told by a name that only it has, the architecture by names and shapes; both are checked, tensor by tensor,
against an encoder of models.py. What names and shapes cannot tell is taken from published recipes, and said.
"""

import collections
import math
import re

import torch
import torch.nn as nn

import models
from common import checkpoint

# Pieces of names, theirs -> ours. A table that is not many-to-one serves both directions.
TORCHVISION_VIT = {
    "class_token": "cls_token", "conv_proj.": "patch_embed.proj.", "encoder.pos_embedding": "pos_embed",
    "encoder.layers.encoder_layer_": "blocks.", "ln_1.": "norm1.", "ln_2.": "norm2.", "encoder.ln.": "norm.",
    "self_attention.in_proj_": "attn.qkv.", "self_attention.out_proj.": "attn.proj.", "mlp.0.": "mlp.fc1.",
    "mlp.3.": "mlp.fc2.", "heads.head.": "head."}
TORCHVISION_SWIN = {"features.0.0.": "patch_embed.proj.", "features.0.2.": "patch_embed.norm.", "mlp.0.": "mlp.fc1.",
                    "mlp.3.": "mlp.fc2."}
for stage in range(4):
    TORCHVISION_SWIN[f"features.{2 * stage + 1}."] = f"layers.{stage}.blocks."
    TORCHVISION_SWIN[f"features.{2 * stage + 2}."] = f"layers.{stage}.downsample."
TIMM_SWIN = {"layers.1.downsample.": "layers.0.downsample.", "layers.2.downsample.": "layers.1.downsample.",
             "layers.3.downsample.": "layers.2.downsample.", "head.fc.": "head."}  # timm merges before a stage
HUGGING_FACE = {
    "vit.": "", "embeddings.cls_token": "cls_token", "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.": "patch_embed.proj.", "encoder.layer.": "blocks.",
    "attention.attention.": "attn.", "attention.output.dense.": "attn.proj.", "intermediate.dense.": "mlp.fc1.",
    "output.dense.": "mlp.fc2.", "layernorm_before.": "norm1.", "layernorm_after.": "norm2.", "layernorm.": "norm.",
    "classifier.": "head."}

LAYER_SCALE = {"ls1.gamma": "gamma_1", "ls2.gamma": "gamma_2"}  # of timm's ViT

# (layout, start of a name that only it has, its table), the first that fits; torchvision's older files: linear_1, 2.
LAYOUTS = [
    ("Hugging Face's ViT", r"(vit\.)?embeddings\.patch_embeddings\.", HUGGING_FACE),
    ("torchvision's ViT", r"conv_proj\.", TORCHVISION_VIT | {"mlp.linear_1.": "mlp.fc1.", "mlp.linear_2.": "mlp.fc2."}),
    ("torchvision's Swin", r"features\.0\.0\.", TORCHVISION_SWIN),
    ("timm's Swin", r"layers\.3\.downsample\.", TIMM_SWIN),
    ("timm's PVTv2", r"stages\.0\.blocks\.0\.attn\.kv\.", {"stages.3.norm.": "norm."}),
    ("UM-MAE's pyramids", r"blocks\.\d+\.attn\.(posmlp|sr)\.", None),
    ("SimMIM's code", r"encoder\.patch_embed\.", {"encoder.": ""}),
    ("MAE's code or timm", r"patch_embed\.", LAYER_SCALE),
]

# What an encoder does without: decoders, tokens and heads of pre-training, and what is computed from sizes.
LEFT_OVER = re.compile(r"(encoder\.|vit\.|embeddings\.)*(decoder|(vis_)?mask_token|pooler\.|predictor\.|head\.\d)|"
                       r".*(relative_position_index|attn_mask)$")

LEFT_PART = re.compile(r".*(relative_position_index|attn_mask)$|((?:(?:encoder|vit|embeddings)\.)*\w+)")  # to sum up


def rename(name, table):
    return re.sub("|".join(map(re.escape, table)), lambda match: table[match[0]], name)


def flat_blocks(names):
    """The table of UM-MAE's pyramids, whose blocks are one flat list: a stage's first owns the merging before it."""
    numbers = {int(match[1]) for name in names if (match := re.match(r"blocks\.(\d+)\.", name))}
    table, stage, first = {}, 0, 0
    for i in sorted(numbers):
        if any(name.startswith(f"blocks.{i}.downsample.") for name in names):
            stage, first = stage + 1, i
            table[f"blocks.{i}.downsample."] = f"layers.{stage - 1}.downsample."
        table[f"blocks.{i}."] = f"layers.{stage}.blocks.{i - first}."
    return table


def translate(tensors):
    """{their name: tensor} -> ({our name: tensor}, layout, {their name: tensor} that is left over). ValueError if no
    layout is known."""
    tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}  # of DistributedDataParallel
    known = [(layout, table) for layout, start, table in LAYOUTS if any(re.match(start, name) for name in tensors)]
    if not known:
        raise ValueError(f"names such as {', '.join(list(tensors)[:2])} belong to no encoder that is known here")
    layout, table = known[0]
    left = {name: tensor for name, tensor in tensors.items() if LEFT_OVER.match(name)}
    table = table or flat_blocks(tensors)
    ours = {rename(name, table): tensor for name, tensor in tensors.items() if name not in left}
    if len(ours) + len(left) != len(tensors):
        raise ValueError(f"two names of {layout} mean the same tensor")
    return join(ours), layout, left


def join(tensors):
    """Queries, keys and values in one tensor, where they come apart: SimMIM has no bias for keys, which no output
    depends on. 1x1 convolutions become linear layers."""
    joined = {}
    for name, tensor in tensors.items():
        if name.endswith(".q_bias"):
            v = tensors[name.replace("q_bias", "v_bias")]
            joined[name.replace("q_bias", "qkv.bias")] = torch.cat([tensor, torch.zeros_like(tensor), v])
        elif ".attn.query." in name:
            parts = [tensors[name.replace("query", part)] for part in ("query", "key", "value")]
            joined[name.replace("query", "qkv")] = torch.cat(parts)
        elif not re.search(r"\.(v_bias|attn\.key\.\w+|attn\.value\.\w+)$", name):
            linear = tensor.shape[2:] == (1, 1) and re.search(r"\.(posmlp\.\d|sr)\.", name)
            joined[name] = tensor.flatten(1) if linear else tensor
    return joined


def root(count):
    """Side of a square of `count` places; 0 if they make none."""
    side = math.isqrt(max(0, count))
    return side if side**2 == count else 0


def infer(tensors, size=(0, 0)):
    """(encoder of these tensors, under our names, without storage; what was assumed, as lines). `size`: of the images
    that the weights were made for; zeros to infer it. ValueError if models.py has no encoder of these sizes."""
    width, in_chans, patch_size = (tensors["patch_embed.proj.weight"].shape[i] for i in range(3))
    blocks = {match[0] for name in tensors if (match := re.match(r"((layers|stages)\.\d+\.)?blocks\.\d+\.", name))}
    depths = collections.Counter(name.partition("blocks.")[0] for name in blocks)
    depths = [depths[stage] for stage in sorted(depths)]
    kinds = {"blocks.0.norm1.weight": infer_vit, "layers.0.blocks.0.attn.qkv.weight": infer_swin,
             "layers.0.blocks.0.attn.kv.weight": infer_pvt, "stages.0.blocks.0.attn.kv.weight": infer_pvt2}
    kind = next((kind for name, kind in kinds.items() if name in tensors), infer_vit)
    patch_size = patch_size if kind is infer_vit else 4  # pyramids have no other; PVTv2's patches overlap
    sizes, found, side, options, notes = kind(tensors, width, depths)
    model = next((name for name, numbers in sizes.items() if numbers[: len(found)] == found), None)
    if model is None:
        raise ValueError(f"no encoder of ours has width and depth {found}; there are "
                         + ", ".join(f"{name} {numbers[: len(found)]}" for name, numbers in sizes.items()))
    if not side and not any(size):
        raise ValueError("its positions make no square: --init_size HxW says which images these weights were made for")
    notes = [] if any(size) else notes
    with torch.device("meta"):
        size = size if any(size) else (side * patch_size, side * patch_size)
        return models.build(model, size, patch_size, in_chans, **options), notes


# For each kind: (table of sizes, what to look up there, side of the grid, options of models.build, assumptions).


def infer_vit(tensors, width, depths):
    shared, own = "rel_pos_bias.relative_position_bias_table", "blocks.0.attn.relative_position_bias_table"
    kind = "shared_bias" if shared in tensors else "block_bias" if own in tensors else "absolute"
    table = tensors[{"shared_bias": shared, "block_bias": own, "absolute": "pos_embed"}[kind]]
    side = root(table.shape[1] - 1) if kind == "absolute" else (root(len(table) - 3) + 1) // 2
    options = {"positions": kind, "layer_scale": 0.1 if "blocks.0.gamma_1" in tensors else 0.0}
    return models.VIT, (width, depths[0]), side, options, []


def infer_swin(tensors, width, depths):
    tables = [tensors.get(f"layers.{s}.blocks.0.attn.relative_position_bias_table") for s in range(len(depths))]
    if tables[0] is None:  # UM-MAE's, which fits any window
        notes = ["images taken to be of 256 px, in windows of 16 tokens, as UM-MAE fine-tunes (--init_size, --window)"]
        return models.SWIN, (width, tuple(depths)), 64, {"bias": "continuous", "window": 16}, notes
    windows = [(root(len(table)) + 1) // 2 for table in tables]
    smaller = [(side * 2**s, []) for s, side in enumerate(windows) if 0 < side < windows[0]]  # one window, whole map
    assumed = f"images taken to be of {32 * windows[0]} px: its tables fit any that are not smaller (--init_size)"
    side, notes = smaller[0] if smaller else (8 * windows[0], [assumed])
    return models.SWIN, (width, tuple(depths)), side, {"window": windows[0]}, notes


def infer_pvt(tensors, width, depths):
    widths = tuple(len(tensors[f"layers.{s}.blocks.0.norm1.weight"]) for s in range(len(depths)))
    notes = ["keys taken to be pooled by 8,4,2,1, as UM-MAE fine-tunes"]
    return models.PVT, (widths, tuple(depths)), root(tensors["pos_embed"].shape[1]), {"reduction": (8, 4, 2, 1)}, notes


def infer_pvt2(tensors, width, depths):
    widths = tuple(len(tensors[f"stages.{s}.blocks.0.norm1.weight"]) for s in range(len(depths)))
    return models.PVT2, (widths, tuple(depths)), 56, {}, ["images taken to be of 224 px: it fits any (--init_size)"]


def classifier_of(tensors):
    """Move norm and head of a classifier out of `tensors`; what encoder.pt says of one, or None. Without a norm of its
    own, a head sits on a ViT's class token or on the mean of a pyramid's tokens. The classes have no names there."""
    head = {name: tensors.pop(name) for name in list(tensors) if name.startswith(("head.", "fc_norm."))}
    if "head.weight" not in head:
        return None
    layer = "fc_norm.weight" in head
    pool = "cls" if "cls_token" in tensors and not layer else "mean"
    return {"pool": pool, "head_norm": "layer" if layer else "none",
            "classes": [str(i) for i in range(len(head["head.weight"]))], "unnamed": True, "tensors": head}


def foreign(content, where, size=(0, 0)):
    """What encoder.pt would hold, and "notes", of a file from elsewhere: `content` is its state dict, or has one as
    "model" or "state_dict". `size` as in `infer`. ValueError if no encoder of ours fits it tensor by tensor."""
    for key in ("model", "state_dict"):
        content = content.get(key, content) if isinstance(content, dict) else content
    if not checkpoint.all_ordinary(content):
        raise ValueError(f"{where} is not an encoder.pt of this project, nor the plain state dict of another one")
    try:
        tensors, layout, left = translate(content)
        head = classifier_of(tensors)
        encoder, notes = infer(tensors, size)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    except (KeyError, IndexError, RuntimeError, TypeError) as error:  # a tensor is missing or of another rank
        raise ValueError(f"{where} is no whole encoder: {type(error).__name__} {error}") from error
    both = tensors | (head["tensors"] if head else {})
    if kinds := {str(tensor.dtype) for tensor in both.values() if tensor.dtype != torch.float32}:
        notes.append(f"{', '.join(sorted(kinds))} made torch.float32")
    both = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in both.items()}
    checkpoint.require_state(expected(encoder, head), both, where)
    found = {"arch": encoder.arch, "model": {name: both[name] for name in tensors}, "method": layout}
    if head:
        found["classifier"] = head | {"tensors": {name: both[name] for name in head["tensors"]}}
    if "mask_token" in left and left["mask_token"].dim() == 4:  # a colour, in place of a token
        found["method"] = "FastMIM"
    notes = [f"names are those of {layout}", *notes, *remarks(found, left),
             "check the licence of these weights (MAE's, for one, is CC-BY-NC)"]
    return found | {"notes": notes}


def expected(encoder, head=None):
    """{name: tensor} that an encoder has to have, and the "classifier" of an encoder.pt on it, if there is one. Its
    LayerNorm stands in the place of the encoder's last one."""
    own, D = encoder.state_dict(), encoder.width
    if not head:
        return own
    if head["head_norm"] == "layer":
        own = {name: tensor for name, tensor in own.items() if not name.startswith("norm.")}
    parts = {"fc_norm": {"layer": nn.LayerNorm(D), "batch": nn.BatchNorm1d(D, affine=False)}.get(head["head_norm"]),
             "head": nn.Linear(D, len(head["classes"]), device="meta")}
    return own | nn.ModuleDict({name: part for name, part in parts.items() if part}).state_dict()


def remarks(found, left):
    """What there is to say of weights from elsewhere, as lines."""
    notes, head = [], found.get("classifier")
    if head:
        on = "the class token" if head["pool"] == "cls" else "the mean of its tokens"
        notes.append(f"with a head on {on}; its {len(head['classes'])} classes have no names, only an order")
    eps = {"Hugging Face's ViT": "its norms have eps 1e-12", "UM-MAE's pyramids": "norms inside blocks have eps 1e-5"}
    if found["method"] in eps:
        notes.append(f"{eps[found['method']]} there, 1e-6 here")
    if found["method"] == "FastMIM" and found["arch"]["model"] == "vit_b":
        notes.append("FastMIM's released code pre-trains ViT-B with 6 heads; here it has 12")
    if left:
        parts = collections.Counter(part[1] or part[2] for part in map(LEFT_PART.match, left))
        notes.append("left over: " + ", ".join(f"{part} ({count})" for part, count in parts.items()))
    return notes
