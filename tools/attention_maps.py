"""What a network computes on its way, taken from outside: the maps of every attention, the output of every block.

    with Watch(encoder, on_maps=visit):
        encoder(imgs)  # calls visit(layer, maps, layout) for every attention, from layer 0 on

It works on the encoders of models.py and on torchvision's networks, and neither knows of it. A fused attention is
replaced by an explicit one with the same output. One layer's maps are in memory at a time.
"""

import dataclasses
import functools
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torchvision.models.maxvit import PartitionAttentionLayer
from torchvision.models.swin_transformer import ShiftedWindowAttention

import models
from common import backbones, layers

# ---------------------------------------- Where tokens lie

@dataclasses.dataclass
class Layout:
    """Places of the tokens of an attention in W windows: centres (row, column) in pixels of the image. Class tokens and
    padding are no token of the image."""
    queries: torch.Tensor  # (W, n, 2)
    keys: torch.Tensor  # (W, m, 2)
    is_query: torch.Tensor  # bool (W, n): is it a token of the image?
    is_key: torch.Tensor  # bool (W, m)
    cell: int  # pixels, side of what a key stands for


def grid_of(encoder, num_tokens):
    """((h, w), pixels of a token) of the map with so many tokens: a pyramid halves its map, and rounds up."""
    (h, w), stride = encoder.grid, encoder.stride
    while h * w > num_tokens:
        h, w, stride = (h + 1) // 2, (w + 1) // 2, 2 * stride
    return (h, w), stride


def marked_centres(grid, stride):
    """(1, h*w, 3): centre of every token in pixels, and 1, which padding will not have."""
    centres = (layers.raster(grid) + 0.5) * stride  # (1, h*w, 2)
    return F.pad(centres, (0, 1), value=1.0)


def alike(places, cell):
    """A Layout of places (W, n, 3), marked by 1 or 0, which are both queries and keys."""
    centres, is_token = places[..., :2], places[..., 2] > 0
    return Layout(centres, centres, is_token, is_token, cell)


def layout_of_tokens(encoder, module, x, *args):
    """x (B, P + h*w, D), P class tokens first: our ViT and torchvision's."""
    grid, stride = grid_of(encoder, x.shape[1] - encoder.num_prefix)
    places = F.pad(marked_centres(grid, stride), (0, 0, encoder.num_prefix, 0))  # (1, P + h*w, 3)
    return alike(places, stride)


def layout_of_windows(encoder, module, x, both, *args):
    """x (B, h*w, D), and both kinds of Windows: our Swin."""
    grid, stride = grid_of(encoder, x.shape[1])
    places = both[module.shifted].split(marked_centres(grid, stride).to(x.device))  # (1, n, nW, 3)
    return alike(places[0].transpose(0, 1), stride)  # (nW, n, 3)


def layout_of_pooled(encoder, module, x, grid, compact=1):
    """x (B, h*w, D) on a map `grid`, the full one: PVT. A key lies at the centre of the tokens that it was made of."""
    grid, stride = grid_of(encoder, x.shape[1])
    places = marked_centres(grid, stride)  # (1, h*w, 3)
    maps = layers.as_map(places, grid)  # (1, 3, h, w)
    pooled = F.avg_pool2d(maps, module.reduction, ceil_mode=True)  # of a map's end: what there is
    keys = pooled.flatten(2).transpose(1, 2)  # (1, N', 3)
    centres, is_key = keys[..., :2], keys[..., 2] > 0
    return dataclasses.replace(
        alike(places, stride), keys=centres, is_key=is_key, cell=stride * module.reduction)


def layout_of_torchvision_windows(encoder, module, x):
    """x (B, H, W, D): torchvision's Swin, which pads a map to whole windows at its end, and rolls it."""
    H, W = x.shape[1:3]
    (a, b), (down, right) = module.window_size, module.shift_size
    grid, stride = grid_of(encoder, H * W)
    places = marked_centres(grid, stride).unflatten(1, grid)[0]  # (H, W, 3)
    places = F.pad(places, (0, 0, 0, -W % b, 0, -H % a))
    down, right = down if H > a else 0, right if W > b else 0  # one window is not shifted
    places = places.roll((-down, -right), dims=(0, 1))
    places = places.unflatten(1, (-1, b)).unflatten(0, (-1, a))  # (H/a, a, W/b, b, 3)
    return alike(places.transpose(1, 2).flatten(2, 3).flatten(0, 1), stride)  # (nW, n, 3)


def layout_of_partitions(encoder, module, x):
    """x (B, D, H, W): MaxViT, whose partitions are windows, or grids of places far apart."""
    grid, stride = x.shape[2:], encoder.arch["img_size"][0] // x.shape[2]
    places = layers.as_map(marked_centres(grid, stride), grid)  # (1, 3, H, W)
    places = module.partition_swap(module.partition_op(places, module.p))  # (1, W, n, 3)
    return alike(places[0], stride)


LAYOUTS = {  # kind of attention: its layout; a subclass stands ahead of its base
    models.WindowAttention: layout_of_windows, layers.PooledAttention: layout_of_pooled,
    layers.Attention: layout_of_tokens, nn.MultiheadAttention: layout_of_tokens,
    ShiftedWindowAttention: layout_of_torchvision_windows, PartitionAttentionLayer: layout_of_partitions}


def attentions_of(encoder):
    """[(module, its function in LAYOUTS)] in the order in which a network calls them."""
    found = []
    for module in encoder.modules():
        kind = next((kind for kind in LAYOUTS if isinstance(module, kind)), None)
        if kind:
            found.append((module, LAYOUTS[kind]))
    return found


# ---------------------------------------- Outputs of blocks

def blocks_of(encoder):
    """The modules whose outputs are the layers of a network: Transformer blocks, or steps of torchvision's with weights
    (a residual block, a merging) behind the stem."""
    if isinstance(encoder, backbones.Torchvision):
        steps = [step for step, is_heavy in zip(encoder.steps, encoder.heavy, strict=True) if is_heavy]
        return steps[1:]
    return [module for module in encoder.modules() if isinstance(module, layers.Block)]


def feature_map(encoder, x):
    """The output of a block as a map (B, D, h, w), without class tokens."""
    if x.dim() == 4:  # torchvision: channels last in a Swin
        return x.permute(0, 3, 1, 2) if encoder.patchwise else x
    x = x[:, encoder.num_prefix :]  # (B, h*w, D)
    return layers.as_map(x, grid_of(encoder, x.shape[1])[0])


# ---------------------------------------- Watching

def explicit_attention(q, k, v, attn_mask=None):
    """(what F.scaled_dot_product_attention returns, its maps (..., n, m))."""
    logits = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    maps = (logits if attn_mask is None else logits + attn_mask).softmax(dim=-1)
    return maps @ v, maps


class Watch(TorchFunctionMode):
    """While it is entered, an encoder in eval mode calls `on_maps(layer, maps (B, W, heads, n, m), layout)` for each
    attention and `on_features(layer, map (B, D, h, w))` for each block. Layers count from 0."""

    def __init__(self, encoder, on_maps=None, on_features=None):
        super().__init__()
        self.encoder, self.on_maps, self.on_features = encoder, on_maps, on_features
        self.layouts = {}  # {layer: Layout}, made once: all images have the size of the encoder
        self.current = None  # (layer, images in the batch) of the attention that computes now
        self.hooks = []

    def __enter__(self):
        if self.on_maps:
            for layer, (module, layout) in enumerate(attentions_of(self.encoder)):
                self.hooks.append(module.register_forward_pre_hook(functools.partial(self.begin, layer, layout)))
                self.hooks.append(module.register_forward_hook(self.end))
        if self.on_features:
            for layer, block in enumerate(blocks_of(self.encoder)):
                self.hooks.append(block.register_forward_hook(functools.partial(self.take_features, layer)))
        return super().__enter__()

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()
        return super().__exit__(*error)

    def begin(self, layer, layout, module, args):
        if layer not in self.layouts:
            self.layouts[layer] = layout(self.encoder, module, *args)
        self.current = layer, len(args[0])

    def end(self, module, args, output):
        self.current = None

    def take_features(self, layer, module, args, output):
        self.on_features(layer, feature_map(self.encoder, output))

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Every function of torch comes by here; inside an attention, three of them know its maps."""
        kwargs = kwargs or {}
        if self.current is None:
            return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            output, maps = explicit_attention(*args, **kwargs)
        elif func is F.multi_head_attention_forward:  # of nn.MultiheadAttention
            output = func(*args, **{**kwargs, "need_weights": True, "average_attn_weights": False})
            maps = output[1]
        elif func is F.softmax:  # of torchvision's windows
            output = maps = func(*args, **kwargs)
        else:
            return func(*args, **kwargs)
        self.take_maps(maps)
        return output

    def take_maps(self, maps):
        layer, B = self.current
        layout = self.layouts[layer]
        W, n, m = *layout.queries.shape[:2], layout.keys.shape[1]
        # Windows stand behind images or ahead of heads; the order is the same.
        self.on_maps(layer, maps.reshape(B, W, -1, n, m), layout)
