"""Names: what other code calls the tensors of our encoders, and of which architecture they are.

A layout is known by a name that only it has, the architecture by names and shapes; both are checked, tensor by tensor,
against an encoder of ours. What names and shapes cannot tell is taken from published recipes, and a note says so.
`from_arch` and `sizes` are those of models.py, which lies above this file.
"""

import collections
import math
import re

import torch
import torch.nn as nn

from common import checkpoint

# Pieces of names, theirs -> ours. A table that is not many-to-one serves both directions.
TORCHVISION_VIT = {
    "class_token": "cls_token", "conv_proj.": "patch_embed.proj.", "encoder.pos_embedding": "pos_embed",
    "encoder.layers.encoder_layer_": "blocks.", "ln_1.": "norm1.", "ln_2.": "norm2.", "encoder.ln.": "norm.",
    "self_attention.in_proj_": "attn.qkv.", "self_attention.out_proj.": "attn.proj.", "mlp.0.": "mlp.fc1.",
    "mlp.3.": "mlp.fc2.", "heads.head.": "head."}
TORCHVISION_SWIN = {
    "features.0.0.": "patch_embed.proj.", "features.0.2.": "patch_embed.norm.", "mlp.0.": "mlp.fc1.",
    "mlp.3.": "mlp.fc2."}
for stage in range(4):
    TORCHVISION_SWIN[f"features.{2 * stage + 1}."] = f"layers.{stage}.blocks."
    TORCHVISION_SWIN[f"features.{2 * stage + 2}."] = f"layers.{stage}.downsample."
TIMM_SWIN = {  # timm merges before a stage
    "layers.1.downsample.": "layers.0.downsample.", "layers.2.downsample.": "layers.1.downsample.",
    "layers.3.downsample.": "layers.2.downsample.", "head.fc.": "head."}
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
    """A name with all pieces that the table knows replaced."""
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
    """{their name: tensor} -> ({our name: tensor}, layout, {their name: tensor} left over). ValueError if none is."""
    tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}  # of DistributedDataParallel
    known = [(layout, table) for layout, start, table in LAYOUTS if any(re.match(start, name) for name in tensors)]
    if not known:
        raise ValueError(f"names such as {', '.join(list(tensors)[:2])} belong to no encoder that is known here")
    layout, table = known[0]
    if table is None:
        table = flat_blocks(tensors)
    left = {name: tensor for name, tensor in tensors.items() if LEFT_OVER.match(name)}
    ours = {rename(name, table): tensor for name, tensor in tensors.items() if name not in left}
    if len(ours) + len(left) != len(tensors):
        raise ValueError(f"two names of {layout} mean the same tensor")
    return join(ours), layout, left


def join(tensors):
    """Queries, keys and values in one tensor; SimMIM has no bias for keys, which no output depends on. 1x1 convolutions
    become linear layers."""
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


def infer(tensors, from_arch, sizes, img_size=(0, 0)):
    """(encoder of these tensors, under our names, without storage; what was assumed, as lines). `img_size`: of the
    images that the weights were made for; zeros to infer it. ValueError if no encoder of ours has these sizes."""
    shape = tensors["patch_embed.proj.weight"].shape
    width, in_chans, patch_size = shape[0], shape[1], shape[2]
    blocks = {match[0] for name in tensors if (match := re.match(r"((layers|stages)\.\d+\.)?blocks\.\d+\.", name))}
    count = collections.Counter(name.partition("blocks.")[0] for name in blocks)
    depths = tuple(count[stage] for stage in sorted(count))
    kinds = {"layers.0.blocks.0.attn.qkv.weight": infer_swin, "layers.0.blocks.0.attn.kv.weight": infer_pvt,
             "stages.0.blocks.0.attn.kv.weight": infer_pvt2}
    kind = next((kind for name, kind in kinds.items() if name in tensors), infer_vit)
    family, numbers, side, options, notes = kind(tensors, width, depths)
    if family != "vit":
        patch_size = 4  # pyramids have no other; PVTv2's patches overlap
    known = {model: own[: len(numbers)] for model, own in sizes[family].items()}
    model = next((model for model in known if known[model] == numbers), None)
    if model is None:
        there_are = ", ".join(f"{model} {own}" for model, own in known.items())
        raise ValueError(f"no encoder of ours has width and depth {numbers}; there are {there_are}")
    if any(img_size):
        notes = []
    elif side:
        img_size = (side * patch_size, side * patch_size)
    else:
        raise ValueError("its positions make no square: --init_size HxW says which images these weights were made for")
    arch = {"model": model, "img_size": img_size, "patch_size": patch_size, "in_chans": in_chans, "options": options}
    with torch.device("meta"):
        return from_arch(arch), notes


# For each kind: (its key in `sizes`, numbers to look up there, side of the grid or 0, options of the encoder, notes).

def infer_vit(tensors, width, depths):
    shared, own = "rel_pos_bias.relative_position_bias_table", "blocks.0.attn.relative_position_bias_table"
    if shared in tensors or own in tensors:
        kind, table = ("shared_bias", tensors[shared]) if shared in tensors else ("block_bias", tensors[own])
        side = (root(len(table) - 3) + 1) // 2
    else:
        kind, side = "absolute", root(tensors["pos_embed"].shape[1] - 1)
    options = {"positions": kind, "layer_scale": 0.1 if "blocks.0.gamma_1" in tensors else 0.0}
    return "vit", (width, depths[0]), side, options, []


def infer_swin(tensors, width, depths):
    tables = [tensors.get(f"layers.{s}.blocks.0.attn.relative_position_bias_table") for s in range(len(depths))]
    if tables[0] is None:  # UM-MAE's, which fits any window
        notes = ["images taken to be of 256 px, in windows of 16 tokens, as UM-MAE fine-tunes (--init_size, --window)"]
        return "swin", (width, depths), 64, {"bias": "continuous", "window": 16}, notes
    windows = [(root(len(table)) + 1) // 2 for table in tables]
    for stage, side in enumerate(windows):
        if 0 < side < windows[0]:  # a smaller window is one over the whole map
            return "swin", (width, depths), side * 2**stage, {"window": windows[0]}, []
    notes = [f"images taken to be of {32 * windows[0]} px: its tables fit any that are not smaller (--init_size)"]
    return "swin", (width, depths), 8 * windows[0], {"window": windows[0]}, notes


def infer_pvt(tensors, width, depths):
    widths = tuple(len(tensors[f"layers.{s}.blocks.0.norm1.weight"]) for s in range(len(depths)))
    notes = ["keys taken to be pooled by 8,4,2,1, as UM-MAE fine-tunes"]
    return "pvt", (widths, depths), root(tensors["pos_embed"].shape[1]), {"reduction": (8, 4, 2, 1)}, notes


def infer_pvt2(tensors, width, depths):
    widths = tuple(len(tensors[f"stages.{s}.blocks.0.norm1.weight"]) for s in range(len(depths)))
    return "pvtv2", (widths, depths), 56, {}, ["images taken to be of 224 px: it fits any (--init_size)"]


def classifier_of(tensors):
    """Move norm and head of a classifier out of `tensors`; what encoder.pt would hold of it, or None. Without a norm of
    its own, a head sits on a ViT's class token or on the mean of a pyramid's tokens."""
    head = {name: tensors.pop(name) for name in list(tensors) if name.startswith(("head.", "fc_norm."))}
    if "head.weight" not in head:
        return None
    has_norm = "fc_norm.weight" in head
    classes = [str(i) for i in range(len(head["head.weight"]))]
    return {"pool": "cls" if "cls_token" in tensors and not has_norm else "mean",
            "head_norm": "layer" if has_norm else "none", "classes": classes, "unnamed": True, "tensors": head}


def is_state_dict(tensors):
    """Is it {name: tensor}, not empty, of dense tensors as large in memory as they claim, not views of one number?"""
    def is_plain(tensor):
        return isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and tensor.device.type == "cpu" \
            and not tensor.is_quantized and tensor.nbytes <= tensor.untyped_storage().nbytes()

    return isinstance(tensors, dict) and len(tensors) > 0 \
        and all(isinstance(name, str) and is_plain(tensor) for name, tensor in tensors.items())


def foreign(content, path, from_arch, sizes, img_size=(0, 0)):
    """What encoder.pt would hold, and "notes", of a file from elsewhere: `content` is its state dict, or has one as
    "model" or "state_dict". ValueError if no encoder of ours fits it tensor by tensor."""
    for key in ("model", "state_dict"):
        content = content.get(key, content) if isinstance(content, dict) else content
    if not is_state_dict(content):
        raise ValueError(f"{path} is not an encoder.pt of this project, nor the plain state dict of another one")
    try:
        tensors, layout, left = translate(content)
        odd = sorted({str(tensor.dtype) for tensor in tensors.values()} - {"torch.float32"})
        tensors = {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}
        head = classifier_of(tensors)
        encoder, notes = infer(tensors, from_arch, sizes, img_size)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except (KeyError, IndexError, RuntimeError, TypeError) as error:  # a tensor is missing or of another rank
        raise ValueError(f"{path} is no whole encoder: {type(error).__name__} {error}") from error
    checkpoint.require_state(expected(encoder, head), {**tensors, **(head["tensors"] if head else {})}, path)

    found = {"arch": encoder.arch, "model": tensors, "method": layout, **({"classifier": head} if head else {})}
    if "mask_token" in left and left["mask_token"].dim() == 4:  # a colour, in place of a token
        found["method"] = "FastMIM"
    if odd:
        notes.append(f"{', '.join(odd)} made torch.float32")
    found["notes"] = [f"names are those of {layout}", *notes, *remarks(found, left),
                      "check the licence of these weights (MAE's, for one, is CC-BY-NC)"]
    return found


def expected(encoder, head=None):
    """{name: tensor} of an encoder and of the "classifier" on it, if any, whose LayerNorm replaces the last one."""
    own, D = encoder.state_dict(), encoder.width
    if not head:
        return own
    parts = nn.ModuleDict({"head": nn.Linear(D, len(head["classes"]), device="meta")})
    if head["head_norm"] == "layer":
        own = {name: tensor for name, tensor in own.items() if not name.startswith("norm.")}
        parts["fc_norm"] = nn.LayerNorm(D)
    if head["head_norm"] == "batch":
        parts["fc_norm"] = nn.BatchNorm1d(D, affine=False)
    return own | parts.state_dict()


def remarks(found, left):
    """What a user should know of weights from elsewhere, as lines."""
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
