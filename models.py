"""Encoders with one interface, and a decoder; no masking here. A method decides which tokens or
pixels an encoder sees, and says where they come from:

    encoder.embed(imgs)     (B, C, H, W) -> tokens (B, N, D): patches, raster order, no position
    encoder.encode(tokens, coords)  -> latent. coords (B, N, 2) are the integer (row, column) of
                            each token on the full grid, None for all tokens in raster order; a
                            pyramid takes grid=(h, w), too, if they lie in a smaller map than that
    encoder(imgs)           encode(embed(imgs))
    encoder.maps(imgs)      the same as maps [(B, D, h, w)], finest first: a pyramid's stages
    encoder.grid, stride, embed_width   of the tokens: rows and columns, pixels, channels
    encoder.out_stride, width           of the latent: pixels, channels
    encoder.num_layers, num_prefix, layer_id(name), checkpointing, arch
    encoder.patchwise       does a token show its own patch alone? Then a method may replace it

`num_prefix` class tokens stand in front of a latent's patches (ViT: 1, pyramids: 0). `arch`, plain
data, makes the same encoder again (`from_arch`). Parameter names are timm's: so weights travel.
"""

import inspect
import itertools
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import backbones, checkpoint, layers

# width, depth, heads. B to H (14-px patches): Dosovitskiy et al., 2021; Ti, S: Touvron et al.,
# 2021; tiny, here and below: ours
VIT = {"vit_tiny": (96, 4, 4), "vit_ti": (192, 12, 3), "vit_s": (384, 12, 6),
       "vit_b": (768, 12, 12), "vit_l": (1024, 24, 16), "vit_h": (1280, 32, 16)}

# width of the first stage, depths, heads, hidden width of the continuous bias' MLP. T to L: Liu et
# al., 2021, and, for the hidden width, UM-MAE's code; tiny takes --window 4 for 64-px images
SWIN = {"swin_tiny": (32, (1, 1, 2, 1), (2, 2, 4, 4), 32),
        "swin_t": (96, (2, 2, 6, 2), (3, 6, 12, 24), 32),
        "swin_s": (96, (2, 2, 18, 2), (3, 6, 12, 24), 32),
        "swin_b": (128, (2, 2, 18, 2), (4, 8, 16, 32), 32),
        "swin_l": (192, (2, 2, 18, 2), (6, 12, 24, 48), 64)}

# widths, depths, heads, MLP ratios. S: Wang et al., 2021, as UM-MAE's code has it; B2, B5: 2022
PVT = {"pvt_tiny": ((32, 64, 128, 256), (1, 1, 2, 1), (1, 2, 4, 8), (4, 4, 4, 4)),
       "pvt_s": ((64, 128, 320, 512), (3, 4, 6, 3), (1, 2, 5, 8), (8, 8, 4, 4))}
PVT2 = {"pvtv2_tiny": ((32, 64, 128, 256), (1, 1, 2, 1), (1, 2, 4, 8), (4, 4, 4, 4)),
        "pvtv2_b2": ((64, 128, 320, 512), (3, 4, 6, 3), (1, 2, 5, 8), (8, 8, 4, 4)),
        "pvtv2_b5": ((64, 128, 320, 512), (3, 6, 40, 3), (1, 2, 5, 8), (4, 4, 4, 4))}

SIZES = {"vit": VIT, "swin": SWIN, "pvt": PVT, "pvtv2": PVT2}


def build(model, img_size, patch_size=0, in_chans=3, **options):
    """The encoder `model` ("vit_b", "torchvision:resnet18": see backbones.py) with random weights.
    `patch_size` 0 is 16 for a ViT and 4, the only one, for a pyramid; `options` as the class takes
    them. ValueError for an unknown name, or sizes that do not fit together."""
    kinds = {"vit": ViT, "swin": Swin, "pvt": PyramidViT, "pvtv2": PyramidViT2}
    family = next((family for family in SIZES if model in SIZES[family]), None)
    if family is not None:
        kind, sizes = kinds[family], SIZES[family][model]
    elif model.startswith("torchvision:vit_"):
        kind, sizes = backbones.TorchvisionViT, ()
    elif model.startswith("torchvision:"):
        kind, sizes = backbones.Torchvision, ()
    else:
        names = ", ".join(itertools.chain(*SIZES.values()))
        raise ValueError(f"unknown --model {model!r}; there are {names}, and torchvision:NAME, as "
                         "torchvision:resnet18")
    unknown = options.keys() - inspect.signature(kind).parameters.keys()
    if unknown:
        raise ValueError(f"{model} takes no --{min(unknown)}")
    if "num_heads" in options:  # MoCo v3's ViT-S, for one, has 12
        if kind is not ViT:
            raise ValueError(f"{model} takes no --num_heads, as a ViT does")
        sizes = (*sizes[:2], options.pop("num_heads"))
    return kind(model, img_size, patch_size or kind.default_patch, in_chans, *sizes, **options)


def from_arch(arch, **changes):
    """The encoder that the "arch" of an encoder.pt describes, with random weights; `changes`: other
    sizes or options. ValueError as of `build`."""
    sizes = {name: arch[name] for name in ("model", "img_size", "patch_size", "in_chans")}
    if "drop_layers" in arch:  # where older files have it
        sizes["drop_layers"] = arch["drop_layers"]
    return build(**{**sizes, **arch["options"], **changes})


def load(path):
    """The encoder in an encoder.pt of ours, in eval mode. ValueError if the file holds no such, or
    is damaged; FileNotFoundError."""
    saved = checkpoint.read(path)
    if not checkpoint.has_encoder(saved):
        hint = ", but a last.pt; encoder.pt lies beside it" if checkpoint.is_run(saved) else ""
        raise ValueError(f"{path} is not an encoder.pt of this project{hint}")
    has_norm = "norm.weight" in saved["model"]  # of what was fine-tuned, a head has it
    encoder = from_arch(saved["arch"], final_norm=has_norm)
    checkpoint.load_exactly(encoder, saved["model"], path)
    return encoder.eval()


class Encoder(nn.Module):
    """What our own encoders share. `final_norm` False: without the last norm, for a head that has
    its own; `drop_layers`: without so many of the last blocks."""

    checkpointing = False

    def __init__(self, model, img_size, patch_size, in_chans, width, depth, num_heads, options,
                 drop_layers):
        super().__init__()
        layers.check_sizes(img_size, patch_size, in_chans)
        blocks = depth if isinstance(depth, int) else depth[2]
        if not isinstance(drop_layers, int) or not 0 <= drop_layers < blocks:
            raise ValueError(f"--drop_layers {drop_layers}: {model} has {blocks} blocks to drop "
                             "from, and keeps at least one")
        if drop_layers:
            options = {**options, "drop_layers": drop_layers}
        self.arch = {"model": model, "img_size": list(img_size), "patch_size": patch_size,
                     "in_chans": in_chans, "width": width, "depth": depth, "num_heads": num_heads,
                     "options": options}
        self.grid = (img_size[0] // patch_size, img_size[1] // patch_size)
        self.register_buffer("pos_embed", None)

    def embed(self, imgs):
        """(B, C, H, W), or a part of it, -> tokens (B, N, D). ValueError for other channels, or
        sides that do not fit."""
        return self.patch_embed(imgs)

    def forward(self, imgs):
        return self.encode(self.embed(imgs))

    def check_drop(self, noise, coords):
        """Stochastic depth takes samples out of a batch, but not what `coords` become."""
        if noise is not None and coords is not None and len(coords) > 1:
            raise ValueError("stochastic depth needs coords (1, N, 2) that all images share, or "
                             "none")

    def layer_id(self, name):
        """Depth of the parameter of this name for layer-wise lr decay (BEiT): 0 ahead of the
        blocks, i + 1 in block i, counted over all stages, num_layers + 1 behind them."""
        if name.startswith(self.list_name + "."):
            return self.block_id(name)
        before = name.startswith(("cls_token", "pos_embed", "patch_embed"))
        return 0 if before else self.num_layers + 1


# ---------------------------------------- ViT

class ViT(Encoder):
    """Vision Transformer (Dosovitskiy et al., 2021) with a class token, as MAE uses it: positions
    are a sine-cosine table, fixed unless `learn_positions`. SimMIM's, after BEiT's, has
    `layer_scale` and, as `positions`, a learned attention bias per offset: "shared_bias" by all
    blocks, or "block_bias", each its own. `drop_path` grows linearly from 0 at the first block."""

    num_prefix, patchwise, default_patch, list_name = 1, True, 16, "blocks"

    def __init__(self, model, img_size, patch_size, in_chans, width, depth, num_heads,
                 learn_positions=False, drop_path=0.0, positions="absolute", layer_scale=0.0,
                 final_norm=True, drop_layers=0):
        if positions not in ("absolute", "shared_bias", "block_bias"):
            raise ValueError(f"--positions is absolute, shared_bias or block_bias, not {positions}")
        if num_heads < 1 or width % num_heads:
            raise ValueError(f"--num_heads {num_heads} does not divide the {width} channels of "
                             f"{model}")
        options = {"positions": positions, "layer_scale": layer_scale}
        if model in VIT and num_heads != VIT[model][2]:
            options["num_heads"] = num_heads
        super().__init__(model, img_size, patch_size, in_chans, width, depth, num_heads, options,
                         drop_layers)
        self.stride = self.out_stride = patch_size
        self.embed_width = self.width = width
        self.num_layers, self.positions = depth - drop_layers, positions
        self.patch_embed = layers.PatchEmbed(patch_size, in_chans, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.num_offsets = layers.num_offsets(self.grid)
        rows = self.num_offsets + 3  # of a bias table: three are for the class token (BEiT)
        if positions == "absolute":
            table = layers.sincos_positions(self.grid, width)
            self.pos_embed = nn.Parameter(table) if learn_positions else nn.Buffer(table)
        elif positions == "shared_bias":
            table = torch.zeros(rows, num_heads)
            self.rel_pos_bias = nn.ParameterDict({"relative_position_bias_table": table})
        self.blocks = nn.ModuleList()
        for i in range(self.num_layers):
            attn = layers.Attention(width, num_heads, rows if positions == "block_bias" else 0)
            rate = drop_path * i / max(1, depth - 1)
            self.blocks.append(layers.Block(width, attn, 4.0, rate, layer_scale))
        self.norm = nn.LayerNorm(width, eps=1e-6) if final_norm else nn.Identity()

        self.apply(layers.init_weights)
        nn.init.normal_(self.cls_token, std=0.02)
        if positions != "absolute":
            self.init_like_simmim()

    @torch.no_grad()
    def init_like_simmim(self):
        """Matrices and class token normal with std 0.02, cut in pre-training alone (released code);
        what ends a branch is smaller the later it comes (BEiT, 2.5)."""
        matrices = [m.weight for m in self.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
        for parameter in (self.cls_token, *matrices):
            if self.positions == "shared_bias":
                layers.init_cut(parameter)
            else:
                nn.init.normal_(parameter, std=0.02)
        for i, block in enumerate(self.blocks):
            for last in (block.attn.proj, block.mlp.fc2):
                last.weight /= math.sqrt(2 * (i + 1))

    def encode(self, tokens, coords=None, grid=None, noise=None):
        """tokens (B, N, D), of the whole grid or at `coords` (B, N, 2) -> latent (B, 1 + N, D),
        class token first; `grid` means nothing here. `noise` (B, 2 * num_layers), uniform in
        [0, 1), is for stochastic depth; None: none. On the CPU it saves work: see
        layers.add_branch. ValueError if tokens without coords do not fill the grid, or if there is
        noise and images differ in their coords."""
        self.check_drop(noise, coords)
        if coords is None and tokens.shape[1] != self.grid[0] * self.grid[1]:
            raise ValueError(f"{tokens.shape[1]} tokens do not fill the grid {self.grid}, and "
                             "there are no coords")
        cls_token, context = self.cls_token, ()
        if self.positions == "absolute":
            cls_token = cls_token + self.pos_embed[:, :1]  # (1, 1, D)
            tokens = tokens + layers.positions_at(self.pos_embed[:, 1:], coords, self.grid)
        else:
            context = (self.bias(coords, tokens.device),)
        x = torch.cat([cls_token.expand(len(tokens), -1, -1), tokens], dim=1)  # (B, 1 + N, D)
        x = layers.run_blocks(self.blocks, x, noise, self.checkpointing, context)
        return self.norm(x)

    def bias(self, coords, device):
        """For all pairs of tokens: rows of each block's own table, (B, 1 + N, 1 + N), or the biases
        that all blocks share, (B, heads, 1 + N, 1 + N)."""
        if coords is None:
            coords = layers.raster(self.grid, device)  # (1, N, 2)
        index = F.pad(layers.offset_index(coords, self.grid), (1, 0, 1, 0))  # (B, 1 + N, 1 + N)
        index[:, 0] = self.num_offsets  # class token to patch
        index[:, :, 0] = self.num_offsets + 1  # patch to class token
        index[:, 0, 0] = self.num_offsets + 2  # class token to itself
        if self.positions == "block_bias":
            return index
        return layers.bias_of(self.rel_pos_bias["relative_position_bias_table"], index)

    def maps(self, imgs, noise=None):
        latent = self.encode(self.embed(imgs), noise=noise)  # (B, 1 + h*w, D)
        return [layers.as_map(latent[:, 1:], self.grid)]  # (B, D, h, w)

    def block_id(self, name):
        """layer_id in a block: 4 of blocks.3.attn.qkv.weight."""
        return int(name.split(".")[1]) + 1


# ---------------------------------------- Pyramids

class Merging(nn.Module):
    """2x2 neighbours become a token, (B, h*w, D) -> (B, h/2 * w/2, D'): norm, projection. Of four
    the left two come first, each from the top (Swin's released code)."""

    def __init__(self, width, out_width):
        super().__init__()
        self.norm = nn.LayerNorm(4 * width, eps=1e-5)
        self.reduction = nn.Linear(4 * width, out_width, bias=False)

    def forward(self, x, grid):
        x = layers.padded_map(x, grid, (2, 2))  # (B, h, w, D)
        x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # (B, h/2, 2, w/2, 2, D)
        x = x.permute(0, 1, 3, 4, 2, 5).flatten(3).flatten(1, 2)  # (B, h/2 * w/2, 4*D)
        return self.reduction(self.norm(x))


class ConvMerging(layers.PatchEmbed):
    """The same with a norm of each token, or none, before a 2x2 convolution (UM-MAE's code)."""

    def __init__(self, width, out_width, norm=None):
        super().__init__(2, width, out_width, norm)

    def forward(self, x, grid):
        x = layers.padded_map(self.norm(x), grid, (2, 2)).permute(0, 3, 1, 2)  # (B, D, h, w)
        return self.project(x)  # (B, h/2 * w/2, D')


class Pyramid(Encoder):
    """What Swin, PVT and PVTv2 share: four stages of blocks, and mergings between them, which halve
    the map; an odd side gets zeros. `drop_layers` takes the last blocks of the third stage, and the
    fourth, which builds on them. A subclass makes its `patch_embed`, then its stages."""

    num_prefix, stride, patchwise, default_patch = 0, 4, True, 4
    list_name = "layers"  # timm's name for the list of stages
    merging_in = 0  # a stage has the merging behind it (0) or the one in front of it (1)
    merging_ahead = 0  # for layer decay, a merging is part of the block before (0) or behind it (1)
    compact = 1  # a map that is not the full one has its sides divided by this (UM-MAE)

    def __init__(self, model, img_size, patch_size, in_chans, widths, depths, num_heads, options,
                 drop_layers):
        if patch_size != 4:
            raise ValueError(f"--patch_size of {model} must be 4, or 0 for its default, not "
                             f"{patch_size}")
        super().__init__(model, img_size, patch_size, in_chans, list(widths), list(depths),
                         list(num_heads), options, drop_layers)
        self.depths = (*depths[:2], depths[2] - drop_layers) if drop_layers else depths
        self.num_layers, self.widths = sum(self.depths), widths[: len(self.depths)]
        self.embed_width, self.width = self.widths[0], self.widths[-1]
        self.out_stride = 2 ** (1 + len(self.depths))

    def make_stages(self, attention, mergings, drop_path, final_norm, eps=1e-6,
                    mlp_ratios=(4, 4, 4, 4), mlp=layers.Mlp):
        """`attention(stage, i)` makes that of block i; `mergings`: the modules between stages."""
        stages, last = nn.ModuleList(), sum(self.arch["depth"]) - 1
        for stage, width in enumerate(self.widths):
            blocks = nn.ModuleList()
            for i in range(self.depths[stage]):
                rate = drop_path * (sum(self.depths[:stage]) + i) / max(1, last)
                attn, ratio = attention(stage, i), mlp_ratios[stage]
                blocks.append(layers.Block(width, attn, ratio, rate, eps=eps, mlp=mlp))
            stages.append(nn.ModuleDict({"blocks": blocks}))
        for stage in range(len(stages) - 1):
            stages[stage + self.merging_in]["downsample"] = mergings[stage]
        self.add_module(self.list_name, stages)
        self.norm = nn.LayerNorm(self.width, eps=eps) if final_norm else nn.Identity()

    def init_like_um_mae(self):
        """As MAE, but convolutions (and linear layers that stand for 1x1 convolutions) normal with
        std sqrt(2 / fan_out): UM-MAE's released code."""
        self.apply(layers.init_weights)
        for name, module in self.named_modules():
            if name.endswith(("downsample.proj", "attn.sr", "posmlp.0", "posmlp.2")):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def encode(self, tokens, coords=None, grid=None, noise=None):
        """tokens (B, h*w, D) of a map `grid`, None for the full one -> latent (B, N', width).
        coords (B, h*w, 2): places on the full grid, None if they are the map's own; `noise` as of
        a ViT. ValueError if tokens and map do not match, or as there."""
        return self.run_stages(tokens, coords, grid, noise)[-1][0]

    def maps(self, imgs, noise=None):
        stages = self.run_stages(self.embed(imgs), noise=noise)
        return [layers.as_map(x, grid) for x, grid in stages]  # (B, D, h, w)

    def run_stages(self, tokens, coords=None, grid=None, noise=None):
        """What each stage gives, the last one normalised: [(x (B, h*w, D), its map (h, w))]."""
        self.check_drop(noise, coords)
        h, w = grid = self.grid if grid is None else tuple(grid)
        if tokens.shape[1] != h * w or h > self.grid[0] or w > self.grid[1]:
            raise ValueError(f"{tokens.shape[1]} tokens do not fill a map of {h}x{w} within the "
                             f"encoder's {self.grid[0]}x{self.grid[1]}")
        if coords is None and grid != self.grid:
            coords = layers.raster(grid, tokens.device)  # (1, h*w, 2)
        x = tokens
        if self.pos_embed is not None:
            x = x + layers.positions_at(self.pos_embed, coords, self.grid)
        draws = [None] * 4
        if noise is not None:
            draws = noise.split([2 * depth for depth in self.depths], dim=1)  # each (B, 2 * depth)

        compact = self.compact if grid != self.grid else 1
        stages, outputs = self.get_submodule(self.list_name), []
        for stage, modules in enumerate(stages):
            context = self.context(stage, grid, coords, compact, x.device)
            x = layers.run_blocks(modules["blocks"], x, draws[stage], self.checkpointing, context)
            if "norm" in modules:
                x = modules["norm"](x)
            outputs.append((x, grid))
            if stage + 1 < len(stages):
                x = stages[stage + self.merging_in]["downsample"](x, grid)  # (B, h/2 * w/2, D')
                if coords is not None:  # a merged token lies where its top-left one lay
                    coords = coords.unflatten(1, grid)[:, ::2, ::2].flatten(1, 2)  # (B, N/4, 2)
                grid = ((grid[0] + 1) // 2, (grid[1] + 1) // 2)
        outputs[-1] = (self.norm(x), grid)
        return outputs

    def context(self, stage, grid, coords, compact, device):
        """What the blocks of a stage need beside tokens in a map `grid`, whose sides are those of
        the full one divided by `compact`."""
        return (grid,)

    def block_id(self, name):
        stage, part, block = name.split(".")[1:4]
        before, behind = sum(self.depths[: int(stage)]), sum(self.depths[: int(stage) + 1])
        if part == "blocks":
            return before + int(block) + 1
        if part == "downsample":
            return (before if self.merging_in else behind) + self.merging_ahead
        return behind  # a stage's norm


# ---------------------------------------- Swin

class Windows:
    """How a map (h, w) is cut into windows. A side no longer than `window` is one window and not
    shifted (Swin's released code); others are padded to a multiple of it. `mask` (nW, n, n), or
    None: True where a token must not look, at padding and at what came round from the other side.
    `index` (B or 1, nW or 1, n, n): each pair's offset, of `coords` (B, h*w, 2) or of places in a
    window, in a table of those in a map `reach`."""

    def __init__(self, grid, window, shifted, reach, coords, device):
        self.grid = grid
        self.size = tuple(min(n, window) for n in grid)
        self.shift = tuple(window // 2 if shifted and n > window else 0 for n in grid)
        places = layers.raster(self.size, device)[None]  # (1, 1, n, 2)
        if coords is not None:
            places = self.split(coords).transpose(1, 2)  # (B, nW, n, 2)
        self.index = layers.offset_index(places, reach)

        self.mask = None
        if any(self.shift) or grid[0] % self.size[0] or grid[1] % self.size[1]:
            row, column = layers.raster(grid, device).unbind(dim=2)  # each (1, h*w)
            part = 1 + (row < self.shift[0]) + 2 * (column < self.shift[1])  # 0 is for padding
            part = self.split(part[..., None])[0, :, :, 0].T  # (nW, n)
            self.mask = part[:, :, None] != part[:, None, :]  # (nW, n, n)

    def split(self, x):
        """(B, h*w, D) -> (B, n, nW, D): n places in each of nW windows."""
        a, b = self.size
        x = layers.padded_map(x, self.grid, self.size)  # (B, H, W, D)
        if any(self.shift):
            x = x.roll((-self.shift[0], -self.shift[1]), dims=(1, 2))
        x = x.unflatten(2, (-1, b)).unflatten(1, (-1, a))  # (B, H/a, a, W/b, b, D)
        return x.permute(0, 2, 4, 1, 3, 5).flatten(3, 4).flatten(1, 2)  # (B, n, nW, D)

    def join(self, x):
        """The inverse of `split`."""
        (h, w), (a, b) = self.grid, self.size
        x = x.unflatten(2, (math.ceil(h / a), -1)).unflatten(1, (a, b))  # (B, a, b, H/a, W/b, D)
        x = x.permute(0, 3, 1, 4, 2, 5).flatten(3, 4).flatten(1, 2)  # (B, H, W, D)
        if any(self.shift):
            x = x.roll(self.shift, dims=(1, 2))
        return x[:, :h, :w].flatten(1, 2)  # (B, h*w, D)


class WindowAttention(layers.Attention):
    """Attention inside the windows of a map, with a bias for every offset: from a learned table
    that covers a window (Liu et al., 2021), or from an MLP of `hidden` channels on the logarithm of
    the offset, which fits any distance (UM-MAE, after Swin V2)."""

    def __init__(self, width, num_heads, window, shifted, hidden=0):
        super().__init__(width, num_heads, 0 if hidden else layers.num_offsets(window))
        self.shifted = shifted
        if hidden:
            first, last = nn.Linear(2, hidden), nn.Linear(hidden, num_heads)
            self.posmlp = nn.Sequential(first, nn.ReLU(), last)
        else:
            nn.init.normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x, both, offsets):
        """x (B, h*w, D); `both`: Windows, and shifted ones; offsets (T, 2) for the MLP, or None."""
        windows = both[self.shifted]
        x = windows.split(x)  # (B, n, nW, D)
        B, n, nW, D = x.shape

        # The MLP sees every offset once; there are far more pairs of tokens.
        table = self.relative_position_bias_table if offsets is None else self.posmlp(offsets)
        bias = layers.bias_of(table, windows.index)  # (B or 1, nW or 1, heads, n, n)
        if windows.mask is not None:
            bias = bias.masked_fill(windows.mask[:, None], -math.inf)
        bias = bias.expand(-1, nW, -1, -1, -1).flatten(1, 2)  # (B or 1, nW*heads, n, n)

        # Windows stand beside heads, not beside images: so one bias serves all images. Three
        # products instead of one, because only then are these views.
        qkv = []
        for weight, shift in zip(self.qkv.weight.chunk(3), self.qkv.bias.chunk(3), strict=True):
            part = F.linear(x, weight, shift).view(B, n, nW * self.num_heads, -1)
            qkv.append(part.transpose(1, 2))  # (B, nW*heads, n, d)
        x = self.attend(*qkv, bias).transpose(1, 2).reshape(B, n, nW, D)
        return windows.join(self.proj(x))  # (B, h*w, D)


class Swin(Pyramid):
    """Swin Transformer (Liu et al., 2021), `bias` "table", or as UM-MAE changed it, "continuous":
    see WindowAttention and ConvMerging. `window` tokens a side, divided by `compact` where a map's
    sides are. `learn_positions` finds none to learn. With a table, tokens have the positions of the
    map in which they lie, whatever `coords` says."""

    def __init__(self, model, img_size, patch_size, in_chans, width, depths, num_heads, hidden,
                 window=7, bias="table", learn_positions=False, drop_path=0.0, final_norm=True,
                 drop_layers=0, compact=1):
        if window < 1 or bias not in ("table", "continuous"):
            raise ValueError("--window must be 1 or more and --bias table or continuous, not "
                             f"{window} and {bias}")
        widths = [width * 2**stage for stage in range(4)]
        super().__init__(model, img_size, patch_size, in_chans, widths, depths, num_heads,
                         {"window": window, "bias": bias}, drop_layers)
        self.window, self.compact = window, compact
        self.reach = layers.window_sizes(img_size, window)
        self.continuous = bias == "continuous"
        if self.continuous:
            # DIFF: UM-MAE's released code has an eps of 1e-5 in some norms; here it is 1e-6 in all.
            eps, self.merging_ahead = 1e-6, 1
            mergings = [ConvMerging(w, 2 * w, nn.LayerNorm(w, eps)) for w in widths[:3]]
        else:
            eps, hidden = 1e-5, 0  # Swin's released code
            mergings = [Merging(w, 2 * w) for w in widths[:3]]
        self.patch_embed = layers.PatchEmbed(4, in_chans, width, nn.LayerNorm(width, eps))
        self.make_stages(
            lambda stage, i: WindowAttention(
                widths[stage], num_heads[stage], self.reach[stage], i % 2, hidden),
            mergings, drop_path, final_norm, eps)
        if self.continuous:
            self.init_like_um_mae()
        else:
            self.apply(layers.init_normal)

    def context(self, stage, grid, coords, compact, device):
        """([Windows, shifted ones], offsets for a continuous bias: at coords, differences on the
        full grid, in tokens of this stage)."""
        if self.continuous and coords is not None:
            reach, side = self.grid, 2**stage
        else:
            reach, side, coords = self.reach[stage], 1, None
        window = max(1, self.window // compact)
        both = [Windows(grid, window, shifted, reach, coords, device) for shifted in (0, 1)]
        return both, log_offsets(reach, side, device) if self.continuous else None


def log_offsets(grid, side, device):
    """All offsets (row, column) in a map as sign * ln(1 + distance / side), (T, 2), in the order of
    `offset_index`, but from the query to the key: UM-MAE's released code."""
    rows = torch.arange(grid[0] - 1, -grid[0], -1, device=device)
    columns = torch.arange(grid[1] - 1, -grid[1], -1, device=device)
    offsets = torch.cartesian_prod(rows, columns)  # (T, 2)
    return offsets.sign() * (offsets.abs() / side).log1p()


# ---------------------------------------- PVT

class PyramidViT(Pyramid):
    """PVT (Wang et al., 2021) as UM-MAE has it. Keys and values are pooled by each stage's
    `reduction`, divided by `compact` where a map's sides are. Positions, a sine-cosine table, are
    added once, to the tokens; learned in fine-tuning (`learn_positions`)."""

    merging_ahead = 1

    def __init__(self, model, img_size, patch_size, in_chans, widths, depths, num_heads, mlp_ratios,
                 reduction=(8, 4, 2, 1), learn_positions=False, drop_path=0.0, final_norm=True,
                 drop_layers=0, compact=1):
        if len(reduction) != 4 or min(reduction) < 1:
            raise ValueError(f"--reduction must be four numbers of 1 or more, not {reduction}")
        super().__init__(model, img_size, patch_size, in_chans, widths, depths, num_heads,
                         {"reduction": list(reduction)}, drop_layers)
        table = layers.sincos_positions(self.grid, widths[0], num_prefix=0)
        self.pos_embed = nn.Parameter(table) if learn_positions else nn.Buffer(table)
        mergings = [ConvMerging(*pair) for pair in itertools.pairwise(widths)]
        self.patch_embed = layers.PatchEmbed(4, in_chans, widths[0])
        self.compact = compact
        self.make_stages(
            lambda stage, i: layers.PooledAttention(
                widths[stage], num_heads[stage], reduction[stage]),
            mergings, drop_path, final_norm, mlp_ratios=mlp_ratios)
        self.init_like_um_mae()

    def context(self, stage, grid, coords, compact, device):
        return grid, compact


class PyramidViT2(Pyramid):
    """PVTv2 (Wang et al., 2022) as FastMIM has it: patches overlap, keys and values are convolved,
    and so is the MLP. `learn_positions` finds none to learn. The last stage's norm is `norm`, as in
    all encoders (timm: stages.3.norm)."""

    list_name, merging_in, patchwise = "stages", 1, False

    def __init__(self, model, img_size, patch_size, in_chans, widths, depths, num_heads, mlp_ratios,
                 learn_positions=False, drop_path=0.0, final_norm=True, drop_layers=0):
        super().__init__(model, img_size, patch_size, in_chans, widths, depths, num_heads, {},
                         drop_layers)
        mergings = [layers.OverlapEmbed(*pair, 3, 2) for pair in itertools.pairwise(widths)]
        self.patch_embed = layers.OverlapEmbed(in_chans, widths[0], 7, 4)
        self.make_stages(
            lambda stage, i: layers.ConvAttention(widths[stage], num_heads[stage], 8 // 2**stage),
            mergings, drop_path, final_norm, mlp_ratios=mlp_ratios, mlp=layers.ConvMlp)
        for stage, width in zip(self.stages[:3], widths[:3], strict=True):
            stage["norm"] = nn.LayerNorm(width, eps=1e-6)
        self.apply(layers.init_normal)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.weight[:, 0].numel() / module.groups
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
                nn.init.zeros_(module.bias)


# ---------------------------------------- Decoder

class Decoder(nn.Module):
    """The small Transformer that MAE-like methods paint with (MAE, 3 and A.1): `embed` projects
    what the encoder saw (a token to up x up), the method adds mask tokens, `out_width` values are
    predicted for each patch. `num_prefix` class tokens are in front; `grid` None: no positions."""

    checkpointing = False

    def __init__(self, in_width, out_width, grid, width, depth, num_heads, num_prefix=1, up=1,
                 eps=1e-6):
        super().__init__()
        if depth < 1 or num_heads < 1 or width < 1 or width % num_heads:
            raise ValueError("--decoder_heads must divide --decoder_width, and both and "
                             f"--decoder_depth be 1 or more, not {num_heads}, {width} and {depth}")
        self.num_prefix = num_prefix
        self.embed = nn.Linear(in_width, up * up * width)
        table = None if grid is None else layers.sincos_positions(grid, width, num_prefix)
        self.register_buffer("pos_embed", table)
        self.blocks = nn.ModuleList(
            layers.Block(width, layers.Attention(width, num_heads), eps=eps) for _ in range(depth))
        self.norm, self.pred = nn.LayerNorm(width, eps=eps), nn.Linear(width, out_width)
        self.apply(layers.init_weights)

    def forward(self, x):
        """Embedded tokens of the whole grid (B, num_prefix + N, width) -> (B, N, out_width)."""
        return self.pred(self.decode(x))

    def decode(self, x):
        """The same without the last layer, (B, N, width)."""
        if self.pos_embed is not None:
            x = x + self.pos_embed
        x = layers.run_blocks(self.blocks, x, checkpointing=self.checkpointing)
        return self.norm(x)[:, self.num_prefix :]  # (B, N, width)


if __name__ == "__main__":
    raise SystemExit("models.py is a part of the scripts; they start as python mae.py --help")
