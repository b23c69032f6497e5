"""Encoders with one interface; no masking here. A method decides which tokens or pixels an encoder sees, and says
where they come from:

    encoder.embed(imgs)                (B, C, H, W) -> tokens (B, N, D): patch embedding, raster order, no position
    encoder.encode(tokens, coords)     -> latent; coords (B, N, 2) are the integer (row, column) of each token on the
                                       full grid, None for all tokens in raster order; a pyramid takes grid=(h, w), too,
                                       if the tokens lie in a smaller map than the full one
    encoder(imgs)                      encode(embed(imgs)): plain features
    encoder.maps(imgs)                 the same as a list of maps (B, D, h, w), finest first: of a pyramid's four
                                       stages, of which encode normalises the last; one of any other encoder
    encoder.grid, stride, embed_width  of the tokens: rows and columns, pixels, channels
    encoder.out_stride, width          of the latent: pixels, channels
    encoder.num_layers, num_prefix, layer_id(name), checkpointing, arch
    encoder.patchwise                  does a token show its own patch and nothing else? Then a method may replace it

`num_prefix` class tokens stand in front of a latent's patches (ViT: 1, pyramids: 0). `arch` is plain data: the first
arguments of `build` and its `options`, which make the same encoder again, and sizes to compare. Parameter names are
timm's, so that weights travel.
"""

import functools
import inspect
import itertools
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import backbones
from common.layers import (  # Decoder, patchify, unpatchify, ...: method files use them as models.*
    Attention,
    Block,
    ConvAttention,
    ConvMlp,
    Decoder,  # noqa: F401
    Mlp,
    OverlapEmbed,
    PatchEmbed,
    PooledAttention,
    as_map,
    bias_of,
    blend,  # noqa: F401
    check_sizes,
    everyones,  # noqa: F401
    gather,  # noqa: F401
    init_normal,
    init_weights,
    mlp_head,  # noqa: F401
    next_size,  # noqa: F401
    offset_index,
    patch_statistics,  # noqa: F401
    patchify,  # noqa: F401
    positions_at,
    raster,
    register_positions,
    run_blocks,
    sincos_positions,
    unpatchify,  # noqa: F401
)

# width, depth, heads. S to H (14-px patches): Dosovitskiy et al., 2021; Ti: Touvron et al., 2021; tiny: ours
VIT = {"vit_tiny": (96, 4, 4), "vit_ti": (192, 12, 3), "vit_s": (384, 12, 6), "vit_b": (768, 12, 12),
       "vit_l": (1024, 24, 16), "vit_h": (1280, 32, 16)}

# width of the first stage, depths, heads, hidden width of the continuous bias' MLP. T to L: Liu et al., 2021, and, for
# the hidden width, UM-MAE's released code; tiny: ours, with --window 4 for 64-px images
SWIN = {"swin_tiny": (32, (1, 1, 2, 1), (2, 2, 4, 4), 32), "swin_t": (96, (2, 2, 6, 2), (3, 6, 12, 24), 32),
        "swin_s": (96, (2, 2, 18, 2), (3, 6, 12, 24), 32),
        "swin_b": (128, (2, 2, 18, 2), (4, 8, 16, 32), 32), "swin_l": (192, (2, 2, 18, 2), (6, 12, 24, 48), 64)}

# widths, depths, heads, MLP ratios. S: Wang et al., 2021, as UM-MAE's released code has it; tiny: ours
PVT = {"pvt_tiny": ((32, 64, 128, 256), (1, 1, 2, 1), (1, 2, 4, 8), (4, 4, 4, 4)),
       "pvt_s": ((64, 128, 320, 512), (3, 4, 6, 3), (1, 2, 5, 8), (8, 8, 4, 4))}

# the same of PVTv2. B2, B5: Wang et al., 2022; tiny: ours
PVT2 = {"pvtv2_tiny": ((32, 64, 128, 256), (1, 1, 2, 1), (1, 2, 4, 8), (4, 4, 4, 4)),
        "pvtv2_b2": ((64, 128, 320, 512), (3, 4, 6, 3), (1, 2, 5, 8), (8, 8, 4, 4)),
        "pvtv2_b5": ((64, 128, 320, 512), (3, 6, 40, 3), (1, 2, 5, 8), (4, 4, 4, 4))}


def build(model, img_size, patch_size=0, in_chans=3, **options):
    """The encoder called `model` (such as "vit_b", or "torchvision:resnet18": see backbones.py). `patch_size` 0 is 16
    for a ViT and 4, which is all there is, for a pyramid. `options` as the class takes them. ValueError for an unknown
    name or option, or sizes that do not fit together."""
    sizes = {ViT: VIT, Swin: SWIN, PyramidViT: PVT, PyramidViT2: PVT2}
    kind = next((kind for kind in sizes if model in sizes[kind]), None)
    if kind is None and not model.startswith("torchvision:"):
        names = ", ".join(itertools.chain(*sizes.values()))
        raise ValueError(f"unknown --model {model!r}; there are {names}, and torchvision:NAME, as torchvision:resnet18")
    kind = kind or backbones.kind_of(model)
    if unknown := options.keys() - inspect.signature(kind).parameters.keys():
        raise ValueError(f"{model} takes no --{min(unknown)}")
    if kind in sizes:
        patch_size = patch_size or (16 if kind is ViT else 4)
    return kind(model, img_size, patch_size, in_chans, *sizes.get(kind, {}).get(model, ()), **options)


def one_map(encoder, imgs, noise=None):
    """`maps` of an encoder that has but one: its latent, without class tokens, as [(B, D, h, w)]."""
    latent = encoder.encode(encoder.embed(imgs), noise=noise)  # (B, num_prefix + h*w, D)
    grid = (math.ceil(n / encoder.out_stride) for n in imgs.shape[2:])
    return [as_map(latent[:, encoder.num_prefix :], grid)]


class ViT(nn.Module):
    """Vision Transformer (Dosovitskiy et al., 2021) with a class token, as MAE uses it.

    `img_size` (H, W) pixels, any `patch_size` that divides both, any `in_chans`. Positions are the sine-cosine table,
    fixed unless `learn_positions` (MAE's released code fixes them in pre-training and learns them in fine-tuning).
    SimMIM's ViT, after BEiT's, has none: `positions` is then "shared_bias", one learned attention bias per offset for
    all blocks, or, for fine-tuning, "block_bias", one table per block; and `layer_scale` is 0.1.
    `drop_path` grows linearly from 0 at the first block. ValueError if the sizes do not fit together.
    """

    num_prefix, patchwise = 1, True
    maps = one_map

    def __init__(self, model, img_size, patch_size, in_chans, width, depth, num_heads,
                 learn_positions=False, drop_path=0.0, positions="absolute", layer_scale=0.0):
        super().__init__()
        check_sizes(img_size, patch_size, in_chans)
        if positions not in ("absolute", "shared_bias", "block_bias"):
            raise ValueError(f"--positions is absolute, shared_bias or block_bias, not {positions}")
        self.arch = {"model": model, "img_size": list(img_size), "patch_size": patch_size, "in_chans": in_chans,
                     "width": width, "depth": depth, "num_heads": num_heads,
                     "options": {"positions": positions, "layer_scale": layer_scale}}
        self.grid = (img_size[0] // patch_size, img_size[1] // patch_size)
        self.stride = self.out_stride = patch_size
        self.embed_width, self.width, self.num_layers = width, width, depth
        self.positions, self.checkpointing = positions, False
        self.patch_embed = PatchEmbed(patch_size, in_chans, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        rows = (2 * self.grid[0] - 1) * (2 * self.grid[1] - 1) + 3  # offsets, and three for the class token
        if positions == "shared_bias":
            self.rel_pos_bias = nn.ParameterDict({"relative_position_bias_table": torch.zeros(rows, num_heads)})
        table = sincos_positions(self.grid, width) if positions == "absolute" else None
        register_positions(self, table, learn_positions)
        rates = [drop_path * i / max(1, depth - 1) for i in range(depth)]
        table_rows = rows if positions == "block_bias" else 0
        self.blocks = nn.ModuleList(Block(width, Attention(width, num_heads, table_rows), 4.0, rate, layer_scale)
                                    for rate in rates)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.apply(init_weights if positions == "absolute" else init_normal)
        for i, block in enumerate(self.blocks if positions != "absolute" else []):  # BEiT, 2.5
            for layer in (block.attn.proj, block.mlp.fc2):
                nn.init.normal_(layer.weight, std=0.02 / math.sqrt(2 * (i + 1)))
        nn.init.normal_(self.cls_token, std=0.02)

    def embed(self, imgs):
        """(B, C, H, W) -> tokens (B, N, D), raster order, no position; a part of an image will do, if `encode` is told
        where it comes from. ValueError if the channels are others or patches do not divide the sides."""
        return self.patch_embed(imgs)

    def encode(self, tokens, coords=None, grid=None, noise=None):
        """tokens (B, N, D), of the whole grid or of the places `coords` (B, N, 2) -> latent (B, 1 + N, D), class token
        first. `grid` is what a pyramid needs to know; to a ViT, tokens are a set, and it does not look at it. `noise`
        (B, 2 * depth) uniform in [0, 1) for stochastic depth, None for none."""
        if coords is None and tokens.shape[1] != self.grid[0] * self.grid[1]:
            raise ValueError(f"{tokens.shape[1]} tokens do not fill the grid {self.grid}, and there are no coords")
        cls, context = self.cls_token, ()
        if self.positions == "absolute":
            cls = cls + self.pos_embed[:, :1]  # (1, 1, D)
            tokens = tokens + positions_at(self.pos_embed[:, 1:], coords, self.grid)
        else:
            context = (self.offset_index(raster(self.grid, tokens.device) if coords is None else coords),)
            if self.positions == "shared_bias":
                context = (bias_of(self.rel_pos_bias["relative_position_bias_table"], context[0]),)
        x = torch.cat([cls.expand(len(tokens), -1, -1), tokens], dim=1)  # (B, 1 + N, D)
        return self.norm(run_blocks(self.blocks, x, noise, self.checkpointing, context))

    def offset_index(self, coords):
        """coords (B, N, 2) -> rows of the bias table (B, 1 + N, 1 + N), of which the last three are for pairs of the
        class token with a patch, of a patch with the class token, and of the class token with itself (BEiT)."""
        index = F.pad(offset_index(coords, self.grid), (1, 0, 1, 0))  # (B, 1 + N, 1 + N)
        last = (2 * self.grid[0] - 1) * (2 * self.grid[1] - 1)
        index[:, 0], index[:, :, 0], index[:, 0, 0] = last, last + 1, last + 2
        return index

    def forward(self, imgs):
        return self.encode(self.embed(imgs))

    def layer_id(self, name):
        """Depth of a parameter for layer-wise lr decay: 0 for what comes before the blocks, i + 1 in block i, then
        num_layers + 1 (BEiT's rule, as MAE uses it)."""
        if name.startswith("blocks."):
            return int(name.split(".")[1]) + 1
        return 0 if name.startswith(("cls_token", "pos_embed", "patch_embed")) else self.num_layers + 1


@functools.lru_cache(maxsize=256)
class Windows:
    """How a map (h, w) is cut into windows; made once for each size, device and `kind` of tensor (a plan's are fake).

    A side that is no longer than `window` is one window and not shifted (Swin's released code). Other sides are padded
    at the end to a multiple of it. `mask` (nW, n, n), or None, is True where a token must not look: at padding, and in
    a shifted map at what came round from the other side. `index` (1, 1, n, n) points into a table of the offsets in a
    map of the size `reach`.
    """

    @torch.inference_mode(False)  # what is kept must serve training, too
    def __init__(self, grid, window, shifted, reach, device, kind):
        self.grid, self.size = grid, tuple(min(n, window) for n in grid)
        self.padded = tuple(math.ceil(n / s) * s for n, s in zip(grid, self.size, strict=True))
        self.shift = tuple(window // 2 if shifted and n > window else 0 for n in grid)
        self.index = offset_index(raster(self.size, device), reach)[None]  # (1, 1, n, n)
        came_round = raster(grid, device) < torch.tensor(self.shift, device=device)  # (1, h*w, 2)
        parts = 1 + came_round[..., :1] + 2 * came_round[..., 1:]  # (1, h*w, 1), and 0 for padding
        parts = self.split(parts)[0, ..., 0].T  # (nW, n)
        mask = parts[:, :, None] != parts[:, None, :]  # (nW, n, n)
        self.mask = mask if any(self.shift) or self.padded != grid else None

    def split(self, x):
        """(B, h*w, D) -> (B, n, nW, D): n places in each of nW windows."""
        (h, w), (H, W), (a, b) = self.grid, self.padded, self.size
        x = x.view(len(x), h, w, -1)  # (B, h, w, D)
        if (H, W) != (h, w):
            x = F.pad(x, (0, 0, 0, W - w, 0, H - h))  # (B, H, W, D)
        if any(self.shift):
            x = x.roll([-s for s in self.shift], dims=(1, 2))
        x = x.view(len(x), H // a, a, W // b, b, -1).permute(0, 2, 4, 1, 3, 5)  # (B, a, b, H/a, W/b, D)
        return x.reshape(len(x), a * b, H // a * (W // b), -1)  # (B, n, nW, D)

    def join(self, x):
        """The inverse of `split`."""
        (h, w), (H, W), (a, b) = self.grid, self.padded, self.size
        x = x.view(len(x), a, b, H // a, W // b, -1).permute(0, 3, 1, 4, 2, 5)  # (B, H/a, a, W/b, b, D)
        x = x.reshape(len(x), H, W, -1)  # (B, H, W, D)
        if any(self.shift):
            x = x.roll(self.shift, dims=(1, 2))
        return x[:, :h, :w].reshape(len(x), h * w, -1)  # (B, h*w, D)


class WindowAttention(Attention):
    """Attention inside the windows of a map, with a bias for every offset: out of a learned table that covers a window
    (Liu et al., 2021), or, with `hidden` channels, out of a small MLP on the logarithm of the offset, which fits any
    window and any distance (UM-MAE, after Swin V2). Odd blocks are `shifted`."""

    def __init__(self, width, num_heads, window, shifted, hidden=0):
        super().__init__(width, num_heads, 0 if hidden else (2 * window[0] - 1) * (2 * window[1] - 1))
        self.shifted = shifted
        if hidden:
            self.posmlp = nn.Sequential(nn.Linear(2, hidden), nn.ReLU(), nn.Linear(hidden, num_heads))
        else:
            nn.init.normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x, places, offsets):
        """x (B, h*w, D); places: (Windows, index) for plain and for shifted blocks; offsets (T, 2) for the MLP."""
        windows, index = places[self.shifted]
        x = windows.split(x)  # (B, n, nW, D)
        B, n, nW, D = x.shape
        # The MLP sees every offset once, not every pair of tokens, of which there are far more.
        table = self.relative_position_bias_table if offsets is None else self.posmlp(offsets)  # (T, heads)
        bias = bias_of(table, index)  # (B or 1, nW or 1, heads, n, n)
        if windows.mask is not None:
            bias = bias.masked_fill(windows.mask[:, None], -math.inf)  # (B or 1, nW, heads, n, n)
        bias = bias.expand(-1, nW, -1, -1, -1).flatten(1, 2)  # (B or 1, nW*heads, n, n)
        # Windows stand beside heads, not beside images: so one bias serves all images and is never copied for each.
        # Three products instead of one, because only then is (B, n, nW*heads, d) a view.
        q, k, v = (F.linear(x, weight, shift).view(B, n, nW * self.num_heads, -1).transpose(1, 2)
                   for weight, shift in zip(self.qkv.weight.chunk(3), self.qkv.bias.chunk(3), strict=True))
        x = self.attend(q, k, v, bias).transpose(1, 2).reshape(B, n, nW, D)
        return windows.join(self.proj(x))  # (B, h*w, D)


def even_map(x, grid):
    """(B, h*w, D) -> (B, h, w, D), with a row or column of zeros at the end if that makes the side even."""
    h, w = grid
    x = x.view(len(x), h, w, -1)  # (B, h, w, D)
    return F.pad(x, (0, 0, 0, w % 2, 0, h % 2)) if h % 2 or w % 2 else x


class Merging(nn.Module):
    """2x2 neighbours become one token: norm, then projection (Swin). (B, h*w, D) -> (B, h/2 * w/2, D')."""

    def __init__(self, width, out_width):
        super().__init__()
        self.norm = nn.LayerNorm(4 * width, eps=1e-5)
        self.reduction = nn.Linear(4 * width, out_width, bias=False)

    def forward(self, x, grid):
        x = even_map(x, grid)  # (B, h, w, D)
        B, h, w, D = x.shape
        x = x.view(B, h // 2, 2, w // 2, 2, D).permute(0, 1, 3, 4, 2, 5)  # (B, h/2, w/2, 2, 2, D), a column first
        return self.reduction(self.norm(x.reshape(B, -1, 4 * D)))  # (B, h/2 * w/2, D')


class ConvMerging(PatchEmbed):
    """The same as UM-MAE's released code has it: a norm of each token, or none, before a 2x2 convolution."""

    def __init__(self, width, out_width, norm=None):
        super().__init__(2, width, out_width, norm)

    def forward(self, x, grid):
        return self.project(even_map(self.norm(x), grid).permute(0, 3, 1, 2))  # (B, h/2 * w/2, D')


class Pyramid(nn.Module):
    """What Swin, PVT and PVTv2 share: a token for 4 px; four stages of blocks; between them, a merging that halves the
    map.

    `attention(stage, block)` makes the attention of a block; `mergings` are the three modules between stages. Images
    need sides divisible by 4; where a map's side is odd, zeros make it even. ValueError if sizes do not fit together.
    """

    num_prefix, stride, out_stride, patchwise = 0, 4, 32, True
    merging_ahead = 0  # for layer decay, a merging counts as part of the block behind it (0) or ahead of it (1)
    list_name, merging_in = "layers", 0  # timm's name for the list of stages; has a stage the merging behind it (0), or
    # the one in front of it (1)

    def __init__(self, model, img_size, patch_size, in_chans, widths, depths, num_heads, options, *,
                 attention, mergings, patch_norm=None, patch_embed=None, mlp_ratios=(4, 4, 4, 4), mlp=Mlp,
                 learn_positions=None, drop_path=0.0, eps=1e-6):
        super().__init__()
        if patch_size != 4:
            raise ValueError(f"--patch_size of {model} must be 4, or 0 for its default, not {patch_size}")
        check_sizes(img_size, patch_size, in_chans)
        self.arch = {"model": model, "img_size": list(img_size), "patch_size": patch_size, "in_chans": in_chans,
                     "width": list(widths), "depth": list(depths), "num_heads": list(num_heads), "options": options}
        self.grid, self.depths, self.num_layers = (img_size[0] // 4, img_size[1] // 4), depths, sum(depths)
        self.embed_width, self.width, self.checkpointing = widths[0], widths[-1], False
        self.patch_embed = patch_embed or PatchEmbed(4, in_chans, widths[0], patch_norm)
        table = None if learn_positions is None else sincos_positions(self.grid, widths[0], num_prefix=0)
        register_positions(self, table, learn_positions)
        rates = iter([drop_path * i / max(1, self.num_layers - 1) for i in range(self.num_layers)])
        stages = nn.ModuleList(nn.ModuleDict({"blocks": nn.ModuleList(
            Block(widths[s], attention(s, i), mlp_ratios[s], next(rates), eps=eps, mlp=mlp) for i in range(depths[s]))})
            for s in range(4))
        for stage, merging in zip(stages[self.merging_in :][:3], mergings, strict=True):
            stage["downsample"] = merging
        self.add_module(self.list_name, stages)
        self.norm = nn.LayerNorm(widths[-1], eps=eps)

    def init_like_um_mae(self):
        """As MAE, but convolutions (and linear layers that stand for 1x1 convolutions) normal with std
        sqrt(2 / fan_out): UM-MAE's released code."""
        self.apply(init_weights)
        for name, module in self.named_modules():
            if name.endswith(("downsample.proj", "attn.sr", "posmlp.0", "posmlp.2")):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def embed(self, imgs):
        """(B, C, H, W) -> tokens (B, N, D), raster order, no position; UM-MAE embeds what is left of an image.
        ValueError if the channels are others or patches do not divide the sides."""
        return self.patch_embed(imgs)

    def encode(self, tokens, coords=None, grid=None, noise=None):
        """tokens (B, h*w, D) of a map `grid` (h, w), None for the full one -> latent (B, h/8 * w/8, width).

        coords (B, h*w, 2): integer (row, column) of each token on the full grid, None if they are the map's own.
        `noise` (B, 2 * num_layers) uniform in [0, 1) for stochastic depth. ValueError if tokens and map do not match.
        """
        return self.norm(self.run_stages(tokens, coords, grid, noise)[-1][0])

    def maps(self, imgs, noise=None):
        """(B, C, H, W) -> maps of the four stages, (B, D, h, w) to (B, D', h/8, w/8), the last one normalised."""
        *first, (x, grid) = self.run_stages(self.embed(imgs), noise=noise)
        return [as_map(*stage) for stage in [*first, (self.norm(x), grid)]]

    def run_stages(self, tokens, coords=None, grid=None, noise=None):
        """Arguments as of `encode` -> what comes out of the blocks of each stage: [(x (B, h*w, D), its map (h, w))]."""
        grid = self.grid if grid is None else tuple(grid)
        if tokens.shape[1] != grid[0] * grid[1] or grid[0] > self.grid[0] or grid[1] > self.grid[1]:
            raise ValueError(f"{tokens.shape[1]} tokens do not fill a map of {grid[0]}x{grid[1]} within the encoder's "
                             f"{self.grid[0]}x{self.grid[1]}")
        if coords is None and grid != self.grid:
            coords = raster(grid, tokens.device)  # (1, h*w, 2)
        x, first, out = tokens, 0, []
        if self.pos_embed is not None:
            x = x + positions_at(self.pos_embed, coords, self.grid)
        stages = self.get_submodule(self.list_name)
        mergings = [layer["downsample"] for layer in stages if "downsample" in layer]
        for stage, layer in enumerate(stages):
            draws = None if noise is None else noise[:, 2 * first : 2 * (first + self.depths[stage])]
            x = run_blocks(layer["blocks"], x, draws, self.checkpointing, self.context(stage, grid, coords, x))
            x = layer["norm"](x) if "norm" in layer else x
            out.append((x, grid))
            if stage < len(mergings):
                x = mergings[stage](x, grid)  # (B, h/2 * w/2, D')
                if coords is not None:  # a merged token lies where its top-left one lay
                    coords = coords.view(len(coords), *grid, 2)[:, ::2, ::2].flatten(1, 2)  # (B, h/2 * w/2, 2)
                grid = tuple((n + 1) // 2 for n in grid)
            first += self.depths[stage]
        return out

    def context(self, stage, grid, coords, x):
        """What the attention of a stage needs beside x."""
        return (grid,)

    def forward(self, imgs):
        return self.encode(self.embed(imgs))

    def layer_id(self, name):
        """Depth of a parameter for layer-wise lr decay: 0 for what comes before the blocks, i + 1 in block i of all
        blocks, then num_layers + 1."""
        if not name.startswith(self.list_name + "."):
            return 0 if name.startswith(("pos_embed", "patch_embed")) else self.num_layers + 1
        stage, part, block = name.split(".")[1:4]
        before = sum(self.depths[: int(stage)])
        return before + int(block) + 1 if part == "blocks" else before + self.depths[int(stage)] + self.merging_ahead


def window_sizes(img_size, window):
    """(rows, columns) of the windows of each of four stages."""
    return [tuple(min(window, math.ceil(n / 4 / 2**s)) for n in img_size) for s in range(4)]


class Swin(Pyramid):
    """Swin Transformer (Liu et al., 2021), `bias` "table", or as UM-MAE changed it, "continuous": see WindowAttention
    and ConvMerging. `window` tokens a side. It has no absolute positions that `learn_positions` could make learnable.

    With a table, tokens have the positions of the map in which they lie, whatever `coords` says.
    """

    def __init__(self, model, img_size, patch_size, in_chans, width, depths, num_heads, hidden,
                 window=7, bias="table", learn_positions=False, drop_path=0.0):
        if window < 1 or bias not in ("table", "continuous"):
            raise ValueError(f"--window must be 1 or more and --bias table or continuous, not {window} and {bias}")
        widths, table = [width * 2**s for s in range(4)], bias == "table"
        reach = window_sizes(img_size, window)
        eps = 1e-5 if table else 1e-6  # Swin's released code; UM-MAE's mixes both
        super().__init__(
            model, img_size, patch_size, in_chans, widths, depths, num_heads, {"window": window, "bias": bias},
            attention=lambda s, i: WindowAttention(widths[s], num_heads[s], reach[s], i % 2, 0 if table else hidden),
            mergings=[Merging(w, 2 * w) if table else ConvMerging(w, 2 * w, nn.LayerNorm(w, eps)) for w in widths[:3]],
            patch_norm=nn.LayerNorm(width, eps), drop_path=drop_path, eps=eps)
        self.window, self.reach, self.continuous = window, reach, not table
        self.merging_ahead = 0 if table else 1
        if table:
            self.apply(init_normal)
        else:
            self.init_like_um_mae()

    def context(self, stage, grid, coords, x):
        at_coords = self.continuous and coords is not None
        reach = self.grid if at_coords else self.reach[stage]
        places = []
        for shifted in (False, True):
            windows = Windows(grid, self.window, shifted, reach, x.device, type(x))
            index = offset_index(windows.split(coords).transpose(1, 2), reach) if at_coords else windows.index
            places.append((windows, index))  # (B, nW, n, n), or (1, 1, n, n)
        return places, log_offsets(reach, 2**stage if at_coords else 1, x.device, type(x)) if self.continuous else None


@functools.lru_cache(maxsize=256)
@torch.inference_mode(False)
def log_offsets(grid, side, device, kind):
    """All offsets (row, column) in a map, in the order of `offset_index`, as sign * ln(1 + distance / side), (T, 2).
    They count from the query to the key, other than in the table: UM-MAE's released code."""
    h, w = grid
    offsets = torch.tensor([h - 1, w - 1], device=device) - raster((2 * h - 1, 2 * w - 1), device)[0]  # (T, 2)
    return offsets.sign() * (offsets.abs() / side).log1p()


class PyramidViT(Pyramid):
    """PVT (Wang et al., 2021) as UM-MAE has it. `reduction`: by how much keys and values of each stage are pooled.
    Positions, the sine-cosine table, are added once, to the tokens; learned in fine-tuning (`learn_positions`)."""

    def __init__(self, model, img_size, patch_size, in_chans, widths, depths, num_heads, mlp_ratios,
                 reduction=(8, 4, 2, 1), learn_positions=False, drop_path=0.0):
        if len(reduction) != 4 or min(reduction) < 1:
            raise ValueError(f"--reduction must be four numbers of 1 or more, not {reduction}")
        super().__init__(
            model, img_size, patch_size, in_chans, widths, depths, num_heads, {"reduction": list(reduction)},
            attention=lambda s, i: PooledAttention(widths[s], num_heads[s], reduction[s]),
            mergings=[ConvMerging(*pair) for pair in itertools.pairwise(widths)],
            mlp_ratios=mlp_ratios, learn_positions=learn_positions, drop_path=drop_path)
        self.merging_ahead = 1
        self.init_like_um_mae()


class PyramidViT2(Pyramid):
    """PVTv2 (Wang et al., 2022) as FastMIM has it: patches overlap, keys and values are convolved, and so is the MLP.
    It has no positions, which `learn_positions` could make learnable. Any sides divisible by 4. The norm behind the
    last stage is `norm`, as in all encoders (timm: stages.3.norm)."""

    list_name, merging_in = "stages", 1
    patchwise = False

    def __init__(self, model, img_size, patch_size, in_chans, widths, depths, num_heads, mlp_ratios,
                 learn_positions=False, drop_path=0.0):
        super().__init__(
            model, img_size, patch_size, in_chans, widths, depths, num_heads, {},
            attention=lambda s, i: ConvAttention(widths[s], num_heads[s], 8 >> s),
            mergings=[OverlapEmbed(*pair, 3, 2) for pair in itertools.pairwise(widths)],
            patch_embed=OverlapEmbed(in_chans, widths[0], 7, 4), mlp_ratios=mlp_ratios, mlp=ConvMlp,
            drop_path=drop_path)
        for stage, width in zip(self.stages[:3], widths[:3], strict=True):
            stage["norm"] = nn.LayerNorm(width, eps=1e-6)
        self.apply(init_normal)
        for conv in (module for module in self.modules() if isinstance(module, nn.Conv2d)):
            fan_out = conv.weight[:, 0].numel() / conv.groups
            nn.init.normal_(conv.weight, std=math.sqrt(2 / fan_out))
            nn.init.zeros_(conv.bias)

    def layer_id(self, name):
        """As of other pyramids, but a merging counts as part of the last block of the stage before (FastMIM)."""
        if ".downsample." in name:
            return sum(self.depths[: int(name.split(".")[1])])
        return super().layer_id(name)
