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

# What other code wraps around an encoder, in any order: DistributedDataParallel, Lightning, MoCo v3, ...; and what
# torch puts into names at any depth.
WRAPPERS = re.compile(r"((module|model|backbone|base_encoder)\.)+")
INSERTED = re.compile(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")

# What an encoder does without: decoders, tokens and heads of pre-training, and what is computed from sizes.
LEFT_OVER = re.compile(r"(encoder\.|vit\.|embeddings\.)*(decoder|(vis_)?mask_token|pooler\.|predictor\.|head\.\d|"
                       r"head\.mlp|head\.last_layer|momentum_encoder\.)|.*(relative_position_index|attn_mask)$")
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


def unwrapped(name):
    """A name without the wrappers around its encoder."""
    name = INSERTED.sub("", name)
    return name[match.end() :] if (match := WRAPPERS.match(name)) else name


def layout_of(names):
    """(layout, table) that the unwrapped names belong to; None if none does."""
    known = [(layout, table) for layout, start, table in LAYOUTS if any(re.match(start, name) for name in names)]
    return known[0] if known else None


def translate(tensors):
    """{their name: tensor} -> ({our name: tensor}, layout, {their name: tensor} left over). ValueError if none is."""
    count = len(tensors)
    tensors = {unwrapped(name): tensor for name, tensor in tensors.items()}
    layout, table = layout_of(tensors)
    if table is None:
        table = flat_blocks(tensors)
    left = {name: tensor for name, tensor in tensors.items() if LEFT_OVER.match(name)}
    ours = {rename(name, table): tensor for name, tensor in tensors.items() if name not in left}
    if len(ours) + len(left) != count:
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


def infer(tensors, from_arch, sizes, img_size=(0, 0), num_heads=0):
    """(encoder of these tensors, under our names, without storage; what was assumed, as lines). `img_size`: of the
    images that the weights were made for, `num_heads`: of a ViT; zeros to infer them. ValueError if no encoder of ours
    has these sizes."""
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
        if family == "vit" and "pos_embed" in tensors:
            require_one_token(tensors)
        raise ValueError("its positions make no square: --init_size HxW says which images these weights were made for")
    if family == "vit":
        require_rows(tensors, img_size, patch_size)
        notes += choose_heads(tensors, sizes[family][model], options, num_heads)
    elif num_heads:
        raise ValueError(f"--num_heads is of a ViT, and this is {model}")
    elif family != "swin":  # whose tables have a column for each
        notes.append(f"attention heads taken to be {sizes[family][model][2]}: names and shapes do not tell")
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


def require_one_token(tensors):
    """ValueError if positions (1, rows, D) are no square beside a class token because there are other tokens."""
    rows = tensors["pos_embed"].shape[1]
    if "cls_token" not in tensors:
        raise ValueError(f"its {rows} rows of positions have no class token beside them, and our ViT needs one")
    if side := root(rows):
        raise ValueError(f"its {rows} rows of positions are those of {side}x{side} patches without one for the class "
                         "token, which our ViT has, or else of images that are no square (--init_size HxW)")
    known = {"cls_token", "pos_embed"}
    extra = [name for name, tensor in tensors.items() if "token" in name and tensor.dim() == 3 and name not in known]
    if extra:
        raise ValueError(f"it has {', '.join(extra)} beside the class token, which our ViT does not know")


def require_rows(tensors, img_size, patch_size):
    """ValueError unless the positions of a ViT are as many as its images have patches, and one."""
    if "pos_embed" in tensors:
        rows, patches = tensors["pos_embed"].shape[1], math.prod(n // patch_size for n in img_size)
        if rows != patches + 1:
            raise ValueError(f"its {rows} rows of positions do not fit images of {img_size[0]}x{img_size[1]}, which "
                             f"have {patches} patches of {patch_size} px and a class token (--init_size)")


def choose_heads(tensors, usual, options, num_heads):
    """Put the number of attention heads of a ViT into its options, if it is not that of its size, `usual` (width,
    depth, heads). Returns what was assumed, as lines."""
    table = next((tensor for name, tensor in tensors.items() if name.endswith("relative_position_bias_table")), None)
    told = 0 if table is None else table.shape[1]
    heads = num_heads or told or usual[2]
    if heads != usual[2]:
        options["num_heads"] = heads
    if num_heads or told:
        return []
    return [f"attention heads taken to be {heads}, as is usual for {usual[0]} channels: names and shapes do not tell "
            "(--num_heads)"]


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


def state_dicts(content):
    """{keys that lead there, joined by dots: state dict} of all in a nest of dicts that name an encoder known here."""
    found, visited = {}, set()

    def search(value, place, depth):
        if not isinstance(value, dict) or id(value) in visited:
            return
        visited.add(id(value))
        names = [name for name in value if isinstance(name, str)]
        has_tensors = any(isinstance(value[name], torch.Tensor) for name in names)
        if has_tensors and layout_of([unwrapped(name) for name in names]):
            found[".".join(place)] = value
        elif depth:
            for name in names:
                search(value[name], [*place, name], depth - 1)

    search(content, [], 4)
    return found


def choose(content, path, which=""):
    """(a state dict in the content of a file, what else there is, as lines): the only one, or the one that `which`
    names, or else "model" or "state_dict" rather than an average (ema). ValueError if that is none, or several."""
    found = state_dicts(content)
    if not found:
        held = list(content) if isinstance(content, dict) else [type(content).__name__]
        held = ", ".join(str(name)[:40] for name in held[:5])
        raise ValueError(f"{path} is not an encoder.pt of this project, nor holds it the names of an encoder that is "
                         f"known here, but {held or 'nothing'}")
    parts = {place: re.split(r"[._]", place) for place in found}
    if which:
        fitting = [place for place in found if place == which] or [place for place in found if which in parts[place]]
    else:
        fitting = [place for place in found if "ema" not in parts[place]] or list(found)
        fitting = [place for place in fitting if parts[place][0] in ("model", "state")][:1] or fitting
    there = ", ".join(place or "its only weights" for place in found)
    if len(fitting) != 1:
        raise ValueError(f"{path} holds {there}: --weights takes the name of one" + f", not {which!r}" * bool(which))
    [place] = fitting
    others = [other for other in found if other != place]
    return found[place], [f"taken: {place}; there is {', '.join(others)}, too (--weights)"] if others else []


def foreign(content, path, from_arch, sizes, img_size=(0, 0), num_heads=0, which=""):
    """What encoder.pt would hold, and "notes", of a file from elsewhere, in which a state dict may lie at any depth.
    `img_size`, `num_heads`: see infer; `which`: see choose. ValueError if no encoder of ours fits it tensor by
    tensor."""
    content, chosen = choose(content, path, which)
    if not is_state_dict(content):
        raise ValueError(f"{path} is not an encoder.pt of this project, nor the plain state dict of another one")
    try:
        tensors, layout, left = translate(content)
        if empty := next((name for name, tensor in tensors.items() if not tensor.numel()), None):
            raise ValueError(f"no encoder of ours has a {empty} of shape {tuple(tensors[empty].shape)}")
        odd = sorted({str(tensor.dtype) for tensor in tensors.values()} - {"torch.float32"})
        tensors = {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}
        head = classifier_of(tensors)
        encoder, notes = infer(tensors, from_arch, sizes, img_size, num_heads)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except KeyError as error:
        raise ValueError(f"{path} is no whole encoder: it lacks {error.args[0]}") from error
    except (IndexError, RuntimeError, TypeError) as error:  # a tensor is of another rank
        raise ValueError(f"{path} is no whole encoder: {type(error).__name__} {error}") from error
    checkpoint.require_state(expected(encoder, head), {**tensors, **(head["tensors"] if head else {})}, path)

    found = {"arch": encoder.arch, "model": tensors, "method": layout, **({"classifier": head} if head else {})}
    if "mask_token" in left and left["mask_token"].dim() == 4:  # a colour, in place of a token
        found["method"] = "FastMIM"
    if odd:
        notes.append(f"{', '.join(odd)} made torch.float32")
    found["notes"] = [f"names are those of {layout}", *chosen, *notes, *remarks(found, left),
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
    if found["method"] == "FastMIM" and found["arch"]["model"] == "vit_b" and found["arch"]["num_heads"] != 6:
        notes.append("FastMIM's released code pre-trains ViT-B with 6 heads; here it has 12 (--num_heads 6)")
    if left:
        parts = collections.Counter(part[1] or part[2] for part in map(LEFT_PART.match, left))
        notes.append("left over: " + ", ".join(f"{part} ({count})" for part, count in parts.items()))
    return notes
