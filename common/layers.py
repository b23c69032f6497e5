"""What encoders and decoders are made of: patches, positions, attention, blocks. No masking here.
Parameter names are timm's, so that weights travel."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# ---------------------------------------- Tokens, maps and their places

def check_sizes(img_size, patch_size, in_chans):
    """ValueError unless images of these sizes can be cut into patches."""
    if patch_size < 1 or any(n < 1 or n % patch_size for n in img_size):
        fits = f"; it divides {next_size(img_size, patch_size)}" if patch_size > 0 else ""
        raise ValueError(f"--patch_size {patch_size} does not divide --img_size "
                         f"{img_size[0]}x{img_size[1]}{fits}")
    if in_chans < 1:
        raise ValueError(f"--in_chans must be 1 or more, not {in_chans}")


def next_size(size, step):
    """The smallest (height, width) from `size` on with sides that `step` divides, as in 64x96."""
    return "x".join(str(step * max(1, math.ceil(n / step))) for n in size)


def patchify(imgs, p):
    """(B, C, H, W) -> patches (B, N, p*p*C), raster order; in a patch: rows, columns, channels."""
    B, C, H, W = imgs.shape
    patches = imgs.view(B, C, H // p, p, W // p, p).permute(0, 2, 4, 3, 5, 1)  # (B, h, w, p, p, C)
    return patches.reshape(B, -1, p * p * C)  # (B, N, p*p*C)


def unpatchify(patches, p, grid):
    """The inverse of `patchify`; the grid (h, w) is given, since N patches fit many rectangles."""
    B, (h, w) = len(patches), grid
    imgs = patches.view(B, h, w, p, p, -1).permute(0, 5, 1, 3, 2, 4)  # (B, C, h, p, w, p)
    return imgs.reshape(B, -1, h * p, w * p)  # (B, C, H, W)


def patch_statistics(patches):
    """Mean and std of every patch, each (B, N, 1); the std is the root of the unbiased variance +
    1e-6 (MAE's released code). ValueError if a patch has but one value."""
    if patches.shape[2] < 2:
        raise ValueError("--target norm_pixels: a patch of one value has no spread; "
                         "pixels takes any")
    mean, var = patches.mean(dim=2, keepdim=True), patches.var(dim=2, keepdim=True)
    return mean, (var + 1e-6).sqrt()


def gather(tokens, ids):
    """The tokens (B, N, D) at ids (B, T): (B, T, D)."""
    return tokens.gather(1, ids[..., None].expand(-1, -1, tokens.shape[2]))


def mean_colours(patches, in_chans):
    """Patches (B, N, p*p*C) with each pixel of its patch's mean colour: a trivial prediction."""
    pixels = patches.unflatten(2, (-1, in_chans))  # (B, N, p*p, C)
    return pixels.mean(dim=2, keepdim=True).expand_as(pixels).flatten(2)  # (B, N, p*p*C)


def expand_mask(mask, grid, size):
    """A mask of units (B, h*w), each of which becomes size x size places: (B, h*size, w*size)."""
    mask = mask.unflatten(1, grid)  # (B, h, w)
    return mask.repeat_interleave(size, 1).repeat_interleave(size, 2)  # (B, h*size, w*size)


def as_map(x, grid):
    """Tokens (B, h*w, D) in raster order -> map (B, D, h, w)."""
    return x.transpose(1, 2).unflatten(2, tuple(grid))  # (B, D, h, w)


def padded_map(x, grid, size):
    """(B, h*w, D) -> (B, H, W, D): zeros at the end make sides divisible by `size` (a, b)."""
    bottom, right = -grid[0] % size[0], -grid[1] % size[1]
    x = x.unflatten(1, grid)  # (B, h, w, D)
    return F.pad(x, (0, 0, 0, right, 0, bottom)) if bottom or right else x


def raster(grid, device=None):
    """The integer (row, column) of every place of a grid, (1, h*w, 2)."""
    rows, columns = torch.arange(grid[0], device=device), torch.arange(grid[1], device=device)
    return torch.cartesian_prod(rows, columns)[None]


def places(ids, grid):
    """ids (B, T) of places of a grid in raster order -> their (row, column), (B, T, 2)."""
    # torch.unravel_index would copy the grid to the GPU, and wait until the GPU has taken it.
    return torch.stack([ids // grid[1], ids % grid[1]], dim=2)  # (B, T, 2)


def sincos_positions(grid, width, num_prefix=1):
    """Fixed 2-D sine-cosine table (1, num_prefix + h*w, D); rows of class tokens are 0 (MAE, A.1).
    A quarter of the channels each: sines of the column, its cosines, sines of the row, its cosines,
    of frequencies 10000^(-i / (D/4)), i from 0 on. (So in the published weights; MAE's code calls
    the column "h".) ValueError unless 4 divides D."""
    if width % 4:
        raise ValueError(f"a sine-cosine position table needs a width divisible by 4, not {width}")
    exponents = -torch.arange(width // 4, dtype=torch.float64) / (width // 4)  # (D/4,)
    row, column = raster(grid)[0].double().unbind(dim=1)  # each (h*w,)
    parts = []
    for place in (column, row):
        angles = place[:, None] * 10000.0**exponents  # (h*w, D/4)
        parts += [angles.sin(), angles.cos()]
    table = torch.cat(parts, dim=1)  # (h*w, D)
    return F.pad(table, (0, 0, num_prefix, 0)).float()[None]  # (1, num_prefix + h*w, D)


def positions_at(table, coords, grid):
    """A table (1, h*w, D), or its rows at coords (B, N, 2) -> (B, N, D)."""
    return table if coords is None else table[0][coords[..., 0] * grid[1] + coords[..., 1]]


def window_sizes(img_size, window):
    """(rows, columns) of Swin's windows in each of four stages: never more than the map has."""
    return [tuple(min(window, math.ceil(n / 4 / 2**stage)) for n in img_size) for stage in range(4)]


def num_offsets(grid):
    """How many offsets there are between places of a grid (h, w), and rows in a bias table."""
    return (2 * grid[0] - 1) * (2 * grid[1] - 1)


def offset_index(coords, grid):
    """coords (..., n, 2) within grid (h, w) -> (..., n, n): for every pair, query first, the index
    of its offset in a table of all, in raster order from (-(h - 1), -(w - 1))."""
    row, column = coords.unbind(dim=-1)
    place = row * (2 * grid[1] - 1) + column  # (..., n), such that differences tell offsets apart
    return place[..., :, None] - place[..., None, :] + num_offsets(grid) // 2


def bias_of(table, index):
    """Biases of all pairs, fp32: table (T, heads), index (..., n, n) -> (..., heads, n, n)."""
    # Gathered head by head, as attention wants them; in fp32, for the many gradients to add up.
    heads = table.shape[1]
    bias = table.float().T.gather(1, index.reshape(1, -1).expand(heads, -1))  # (heads, ... * n * n)
    return bias.view(heads, *index.shape).movedim(0, -3)


# ---------------------------------------- Patch embedding, initial weights

class PatchEmbed(nn.Module):
    """Patches, linearly projected, then normalised if there is a `norm`: (B, C, H, W) ->
    (B, h*w, D), raster order. ValueError for other channels or sides."""

    def __init__(self, patch_size, in_chans, width, norm=None):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, width, patch_size, patch_size)
        self.norm = norm or nn.Identity()

    def forward(self, imgs):
        return self.norm(self.project(imgs))

    def project(self, imgs):
        B, C, H, W = imgs.shape
        p = self.proj.kernel_size[0]
        if C != self.proj.in_channels or H % p or W % p:
            raise ValueError(f"expected {self.proj.in_channels} channels, sides divisible by {p}; "
                             f"got {C} x {H} x {W}")
        patches = imgs.view(B, C, H // p, p, W // p, p)
        patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(B, -1, C * p * p)  # (B, N, C*p*p)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)  # (B, N, D)


class OverlapEmbed(nn.Module):
    """Overlapping patches, convolved and normalised (PVTv2): images (B, C, H, W), or with `grid`
    tokens (B, h*w, C), -> (B, N, D). ValueError for other channels or sides."""

    def __init__(self, in_chans, width, size, stride):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, width, size, stride, padding=size // 2)
        self.norm = nn.LayerNorm(width, eps=1e-5)

    def forward(self, x, grid=None):
        if grid is not None:
            x = as_map(x, grid)  # (B, C, h, w)
        C, H, W = x.shape[1:]
        stride = self.proj.stride[0] if grid is None else 1  # of a map, a side may be odd
        if C != self.proj.in_channels or H % stride or W % stride:
            raise ValueError(f"expected {self.proj.in_channels} channels, sides divisible by "
                             f"{stride}; got {C} x {H} x {W}")
        return self.norm(self.proj(x).flatten(2).transpose(1, 2))  # (B, N, D)


def init_weights(module):
    """Xavier-uniform weights, zero biases (MAE, A.1); a patch embedding counts as linear."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1))
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def init_normal(module):
    """Linear layers normal with std 0.02, zero biases (Swin's released code, which cuts them at an
    absolute 2, a hundred standard deviations away)."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


@torch.no_grad()
def init_cut(tensor):
    """Normal with std 0.02, cut at 0.02 (BEiT's and SimMIM's released pre-training of a ViT). What
    is left has a std of 0.011. (torch's trunc_normal_ cannot do it to a plan's fake tensors.)"""
    inside = math.erf(math.sqrt(0.5))  # probability of one standard deviation
    tensor.uniform_(-inside, inside).erfinv_().mul_(0.02 * math.sqrt(2))


# ---------------------------------------- Attention

class Attention(nn.Module):
    """Multi-head self-attention. `bias` is added to the logits; with a table of `bias_rows`, it
    names its row for each pair of tokens. (BEiT's keys have no bias; softmax does not see it.)"""

    def __init__(self, width, num_heads, bias_rows=0):
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        table = nn.Parameter(torch.zeros(bias_rows, num_heads)) if bias_rows else None
        self.register_parameter("relative_position_bias_table", table)

    def forward(self, x, bias=None):
        B, N, D = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, N, D/heads)
        if self.relative_position_bias_table is not None:
            bias = bias_of(self.relative_position_bias_table, bias)  # (B or 1, heads, N, N)
        return self.proj(self.attend(q, k, v, bias).transpose(1, 2).reshape(B, N, D))

    def attend(self, q, k, v, bias=None):
        """Each (B, heads, N, D/heads) -> the same; `bias`, fp32 and broadcastable to (B, heads, N,
        N), is added to the logits."""
        # In bf16 on a CPU the fused kernel is slow. (A plan's fake tensors take the GPU's way.)
        slow = q.device.type == "cpu" and q.dtype == torch.bfloat16 and type(q) is torch.Tensor
        if not slow:
            mask = None if bias is None else bias.to(q.dtype)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

        logits = (q / math.sqrt(q.shape[3]) @ k.transpose(2, 3)).float()  # (B, heads, N, N)
        maps = (logits if bias is None else logits + bias).softmax(dim=3)
        return maps.to(v.dtype) @ v


class PooledAttention(Attention):
    """Attention whose keys and values are `reduction` x `reduction` averages of the map, followed by
    a linear layer and a norm, which are there for a reduction of 1, too (UM-MAE's released PVT)."""

    def __init__(self, width, num_heads, reduction):
        super().__init__(width, num_heads)
        del self.qkv  # queries come from other tokens than keys and values
        self.reduction = reduction
        self.q, self.kv = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.sr, self.norm = nn.Linear(width, width), nn.LayerNorm(width, eps=1e-6)

    def reduce(self, x, grid, compact=1):
        """(B, h*w, D) -> (B, N', D), N' = h/reduction * w/reduction, rounded up; at the end of a
        map the average is that of the places that there are."""
        reduction = max(1, self.reduction // compact)
        if reduction > 1:
            pooled = F.avg_pool2d(as_map(x, grid), reduction, ceil_mode=True)
            x = pooled.flatten(2).transpose(1, 2)  # (B, N', D)
        return self.norm(self.sr(x))

    def forward(self, x, grid, compact=1):
        """`compact`: how much smaller a map is than the full one, and so what is averaged."""
        B, N, D = x.shape
        q = self.q(x).view(B, N, self.num_heads, -1).transpose(1, 2)  # (B, heads, N, D/heads)
        kv = self.kv(self.reduce(x, grid, compact)).view(B, -1, 2, self.num_heads, D // self.num_heads)
        k, v = kv.permute(2, 0, 3, 1, 4)  # each (B, heads, N', D/heads)
        return self.proj(self.attend(q, k, v).transpose(1, 2).reshape(B, N, D))


class ConvAttention(PooledAttention):
    """The same with a convolution of that stride for the average and the linear layer, and no layer
    for a reduction of 1 (PVTv2)."""

    def __init__(self, width, num_heads, reduction):
        super().__init__(width, num_heads, reduction)
        self.sr = nn.Conv2d(width, width, reduction, reduction) if reduction > 1 else None
        self.norm = nn.LayerNorm(width, eps=1e-5) if reduction > 1 else None

    def reduce(self, x, grid, compact=1):
        if self.reduction == 1:
            return x
        # DIFF: where its stride does not divide a map, PVTv2's released code cuts the rest off;
        # here zeros complete it.
        bottom, right = -grid[0] % self.reduction, -grid[1] % self.reduction
        x = F.pad(as_map(x, grid), (0, right, 0, bottom))  # (B, D, h', w')
        return self.norm(self.sr(x).flatten(2).transpose(1, 2))  # (B, N', D)


# ---------------------------------------- Blocks

class Mlp(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x, *context):
        return self.fc2(F.gelu(self.fc1(x)))


class ConvMlp(Mlp):
    """The same with a depthwise 3x3 convolution over the map before the activation (PVTv2)."""

    def __init__(self, width, hidden):
        super().__init__(width, hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)

    def forward(self, x, grid):
        x = self.dwconv(as_map(self.fc1(x), grid)).flatten(2).transpose(1, 2)  # (B, h*w, hidden)
        return self.fc2(F.gelu(x))


def drop_path(branch, noise, rate):
    """Stochastic depth (Huang et al., 2016): a sample's branch is dropped where its noise (B,) is
    below `rate`, and scaled up elsewhere. Given noise: it does not matter who computes it."""
    if noise is None or rate == 0.0:
        return branch
    keep = (noise >= rate).to(branch.dtype) / (1.0 - rate)
    return branch * keep.view(-1, *[1] * (branch.dim() - 1))


def can_skip(noise):
    """Can one know how many branches noise (B,) drops? On a GPU one would wait for it, and a graph
    has one batch size."""
    is_real = type(noise) is torch.Tensor  # a plan has fake ones, without values
    return noise.device.type == "cpu" and not torch.compiler.is_compiling() and is_real


def add_branch(x, branch, noise, rate, context):
    """x (B, N, D) + branch(x, *context) with stochastic depth. Where possible, the branch sees only
    the samples that keep it: the same sum, and less work."""
    if noise is None or rate == 0.0 or not can_skip(noise):
        return x + drop_path(branch(x, *context), noise, rate)

    ids = (noise >= rate).nonzero()[:, 0]  # (B_keep,)
    scale = 1.0 / (1.0 - rate)
    if len(ids) == 0:  # still a gradient for every parameter: other processes wait for it
        ids, scale = ids.new_zeros(1), 0.0
    ids = ids.to(x.device, non_blocking=True)
    kept = branch(x.index_select(0, ids), *context)  # (B_keep, N, D)
    return x.index_add(0, ids, kept.to(x.dtype), alpha=scale)  # (B, N, D)


class Block(nn.Module):
    """Pre-norm Transformer block. `noise` (B, 2) is for stochastic depth, `context` for both
    branches; `layer_scale`: start of a learned factor on each (Touvron et al., 2021), 0: none."""

    def __init__(self, width, attn, mlp_ratio=4.0, drop_path_rate=0.0, layer_scale=0.0, eps=1e-6,
                 mlp=Mlp):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width, eps=eps), attn
        self.norm2, self.mlp = nn.LayerNorm(width, eps=eps), mlp(width, int(width * mlp_ratio))
        self.drop_path_rate = drop_path_rate
        for name in ("gamma_1", "gamma_2"):
            gamma = nn.Parameter(torch.full((width,), layer_scale)) if layer_scale else None
            self.register_parameter(name, gamma)

    def forward(self, x, noise=None, *context):
        noise = (None, None) if noise is None else noise.unbind(dim=1)  # 2 x (B,)
        x = add_branch(x, self.attention_branch, noise[0], self.drop_path_rate, context)
        return add_branch(x, self.mlp_branch, noise[1], self.drop_path_rate, context)

    def attention_branch(self, x, *context):
        branch = self.attn(self.norm1(x), *context)
        return branch if self.gamma_1 is None else self.gamma_1 * branch

    def mlp_branch(self, x, *context):
        branch = self.mlp(self.norm2(x), *context)
        return branch if self.gamma_2 is None else self.gamma_2 * branch


def run_blocks(blocks, x, noise=None, checkpointing=False, context=()):
    """x through all blocks, activations recomputed in the backward pass if `checkpointing`; `noise`
    (B, 2 * len(blocks)) for stochastic depth; `context`: what blocks need beside x."""
    if noise is not None and not can_skip(noise):
        noise = noise.to(x.device, non_blocking=True)
    for i, block in enumerate(blocks):
        draws = None if noise is None else noise[:, 2 * i : 2 * i + 2]  # (B, 2)
        if checkpointing and torch.is_grad_enabled():
            # No RNG state to keep: blocks draw nothing.
            x = checkpoint(block, x, draws, *context, use_reentrant=False, preserve_rng_state=False)
        else:
            x = block(x, draws, *context)
    return x
