"""What encoders and decoders are made of: patches, positions, attention, blocks. No masking here.

Parameter names are timm's, so that weights travel.
"""

import math

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint


def check_sizes(img_size, patch_size, in_chans):
    """ValueError unless images of these sizes can be cut into patches."""
    if patch_size < 1 or any(n < 1 or n % patch_size for n in img_size):
        raise ValueError(f"--patch_size {patch_size} does not divide --img_size {img_size[0]}x{img_size[1]}"
                         + (f"; it divides {next_size(img_size, patch_size)}" if patch_size > 0 else ""))
    if in_chans < 1:
        raise ValueError(f"--in_chans must be 1 or more, not {in_chans}")


def next_size(size, step):
    """The smallest (height, width) from `size` on whose sides are multiples of `step`, at least one, as 64x96."""
    return "x".join(str(step * max(1, math.ceil(n / step))) for n in size)


def sincos_positions(grid, width, num_prefix=1):
    """Fixed 2-D sine-cosine table (1, num_prefix + h*w, width); rows of class tokens are zero (MAE, A.1).

    The first half of the channels encodes the column and the second the row, each as sines then cosines of frequencies
    10000^(-i / (width/4)): the order of the published weights, although MAE's code calls the first half "h".
    """
    if width % 4:
        raise ValueError(f"a sine-cosine position table needs a width divisible by 4, not {width}")
    frequencies = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    rows, columns = (torch.arange(n, dtype=torch.float64)[:, None] * frequencies for n in grid)  # (h, D/4), (w, D/4)
    rows, columns = (torch.cat([angle.sin(), angle.cos()], dim=1) for angle in (rows, columns))  # (h, D/2), (w, D/2)
    h, w = grid
    table = torch.cat([columns[None].expand(h, -1, -1), rows[:, None].expand(-1, w, -1)], dim=2)  # (h, w, D)
    table = torch.cat([table.new_zeros(num_prefix, width), table.flatten(0, 1)])  # (num_prefix + h*w, D)
    return table.float()[None]  # (1, num_prefix + h*w, D)


def register_positions(module, table, learn):
    """A table (1, N, D) as `module.pos_embed`, learned or fixed; None if there is none."""
    if learn and table is not None:
        module.pos_embed = nn.Parameter(table)
    else:
        module.register_buffer("pos_embed", table)


def positions_at(table, coords, grid):
    """A table (1, h*w, D), or its rows at coords (B, N, 2) -> (B, N, D)."""
    return table if coords is None else table[0][coords[..., 0] * grid[1] + coords[..., 1]]


def init_weights(module):
    """Xavier-uniform linear layers, zero biases, unit LayerNorms (MAE, A.1); a patch embedding counts as linear."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm) and module.elementwise_affine:
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


def init_normal(module):
    """Linear layers normal with std 0.02, zero biases (Swin's and BEiT's released code; their "truncated" normal
    is cut at an absolute 2, a hundred standard deviations away)."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def drop_path(branch, noise, rate):
    """Stochastic depth (Huang et al., 2016): a sample's branch is dropped where its noise (B,) is below `rate`, and
    scaled up elsewhere. The noise is given, so that a sample's fate does not depend on who computes it."""
    if noise is None or rate == 0.0:
        return branch
    keep = (noise >= rate).to(branch.dtype) / (1.0 - rate)
    return branch * keep.view(-1, *[1] * (branch.dim() - 1))


def patchify(imgs, p):
    """(B, C, H, W) -> patches (B, N, p*p*C) in raster order; a vector runs over rows, then columns, then channels."""
    B, C, H, W = imgs.shape
    patches = imgs.view(B, C, H // p, p, W // p, p).permute(0, 2, 4, 3, 5, 1)  # (B, h, w, p, p, C)
    return patches.reshape(B, -1, p * p * C)  # (B, N, p*p*C)


def unpatchify(patches, p, grid):
    """The inverse of `patchify`; grid (h, w) is given, since N patches may lie in any rectangle."""
    B, (h, w) = len(patches), grid
    imgs = patches.view(B, h, w, p, p, -1).permute(0, 5, 1, 3, 2, 4)  # (B, C, h, p, w, p)
    return imgs.reshape(B, -1, h * p, w * p)  # (B, C, H, W)


def patch_statistics(patches):
    """Mean and std of every patch over all its values, each (B, N, 1); variance unbiased, as in MAE's released code.
    ValueError if a patch has but one value."""
    if patches.shape[2] < 2:
        raise ValueError("--target norm_pixels: a patch of one value has no spread; pixels takes any")
    return patches.mean(dim=2, keepdim=True), (patches.var(dim=2, keepdim=True) + 1e-6).sqrt()


def as_map(x, grid):
    """Tokens (B, h*w, D) in raster order -> map (B, D, h, w)."""
    return x.transpose(1, 2).unflatten(2, tuple(grid))  # (B, D, h, w)


def gather(tokens, ids):
    """The tokens (B, N, D) at ids (B, T): (B, T, D)."""
    return tokens.gather(1, ids[..., None].expand(-1, -1, tokens.shape[2]))


class PatchEmbed(nn.Module):
    """Non-overlapping patches, linearly projected, then normalised if there is a `norm`: (B, C, H, W) -> (B, h*w, D),
    raster order."""

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
            raise ValueError(f"expected {self.proj.in_channels} channels, sides divisible by {p}; got {C} x {H} x {W}")
        patches = imgs.view(B, C, H // p, p, W // p, p).permute(0, 2, 4, 1, 3, 5)  # (B, h, w, C, p, p)
        patches = patches.reshape(B, -1, C * p * p)  # (B, N, C*p*p)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)  # (B, N, D)


class OverlapEmbed(nn.Module):
    """Overlapping patches, convolved and normalised (PVTv2): images (B, C, H, W), or with `grid` the tokens (B, h*w, C)
    of a map, -> (B, N, D), sides divided by `stride` and rounded up. ValueError if the channels are others."""

    def __init__(self, in_chans, width, size, stride):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, width, size, stride, padding=size // 2)
        self.norm = nn.LayerNorm(width, eps=1e-5)

    def forward(self, x, grid=None):
        x = x if grid is None else as_map(x, grid)  # (B, C, h, w)
        if x.shape[1] != self.proj.in_channels:
            raise ValueError(f"expected {self.proj.in_channels} channels, not {x.shape[1]}")
        return self.norm(self.proj(x).flatten(2).transpose(1, 2))  # (B, N, D)


def raster(grid, device=None):
    """The integer (row, column) of every place of a grid, (1, h*w, 2)."""
    return torch.cartesian_prod(*(torch.arange(n, device=device) for n in grid)).view(1, -1, 2)


def offset_index(coords, grid):
    """coords (..., n, 2) within grid (h, w) -> (..., n, n): for every pair, query first, the index of its offset in a
    table of all (2h - 1) * (2w - 1) offsets, in raster order from (-(h - 1), -(w - 1))."""
    h, w = grid
    place = coords[..., 0] * (2 * w - 1) + coords[..., 1]  # (..., n), such that differences tell offsets apart
    return place[..., :, None] - place[..., None, :] + (2 * h - 1) * (2 * w - 1) // 2


def bias_of(table, index):
    """Biases of all pairs, fp32: table (T, heads), index (..., n, n) -> (..., heads, n, n)."""
    heads = table.shape[1]  # gathered head by head, as attention wants them; in fp32 for the many gradients to add up
    flat = table.float().T.gather(1, index.reshape(1, -1).expand(heads, -1))  # (heads, ... * n * n)
    return flat.view(heads, *index.shape).movedim(0, -3)


class Attention(nn.Module):
    """Multi-head self-attention. With `keep_maps` set it takes the explicit path and leaves its softmax in `maps`.

    With a table of `bias_rows`, `bias` is for each pair of tokens a row of it, else a number to add to the logit. (A
    bias on keys, which BEiT's blocks lack, means nothing: softmax does not see it, and its gradient is zero.)
    """

    def __init__(self, width, num_heads, bias_rows=0):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.keep_maps, self.maps = False, None
        table = nn.Parameter(torch.zeros(bias_rows, num_heads)) if bias_rows else None
        self.register_parameter("relative_position_bias_table", table)

    def forward(self, x, bias=None):
        B, N, D = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, N, D/heads)
        if self.relative_position_bias_table is not None:
            bias = bias_of(self.relative_position_bias_table, bias)  # (B or 1, heads, N, N)
        return self.proj(self.attend(q, k, v, bias).transpose(1, 2).reshape(B, N, D))  # (B, N, D)

    def attend(self, q, k, v, bias=None):
        """Each (B, heads, N, D/heads) -> the same; `bias` broadcastable to (B, heads, N, N)."""
        # In bf16 on a CPU the fused kernel takes 2 to 4 times as long. (A plan's fake tensors take the GPU's way.)
        slow = q.device.type == "cpu" and q.dtype == torch.bfloat16 and type(q) is torch.Tensor
        if not self.keep_maps and not slow:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias if bias is None else bias.to(q.dtype))
        logits = (q / math.sqrt(q.shape[3]) @ k.transpose(2, 3)).float()  # (B, heads, N, N)
        maps = (logits if bias is None else logits + bias).softmax(dim=3).to(v.dtype)
        self.maps = maps if self.keep_maps else None
        return maps @ v


class PooledAttention(Attention):
    """Attention whose keys and values are `reduction` x `reduction` averages of the map, normalised after a linear
    layer; that layer is there for a reduction of 1, too (UM-MAE's PVT, in its released code)."""

    def __init__(self, width, num_heads, reduction):
        super().__init__(width, num_heads)
        del self.qkv  # of Attention: here, queries come from other tokens than keys and values
        self.reduction = reduction
        self.q, self.kv = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.sr = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def reduce(self, x, grid):
        """(B, h*w, D) -> (B, N', D), N' = h*w / reduction^2."""
        if self.reduction > 1:
            x = F.avg_pool2d(as_map(x, grid), self.reduction, ceil_mode=True).flatten(2).transpose(1, 2)  # (B, N', D)
        return self.norm(self.sr(x))

    def forward(self, x, grid):
        B, N, D = x.shape
        q = self.q(x).view(B, N, self.num_heads, -1).transpose(1, 2)  # (B, heads, N, D/heads)
        kv = self.kv(self.reduce(x, grid)).view(B, -1, 2, self.num_heads, D // self.num_heads)
        k, v = kv.permute(2, 0, 3, 1, 4)  # each (B, heads, N', D/heads)
        return self.proj(self.attend(q, k, v).transpose(1, 2).reshape(B, N, D))  # (B, N, D)


class ConvAttention(PooledAttention):
    """The same with a convolution of that stride for the average and the linear layer; for a reduction of 1, keys and
    values are the tokens themselves (PVTv2)."""

    def __init__(self, width, num_heads, reduction):
        super().__init__(width, num_heads, reduction)
        self.sr = nn.Conv2d(width, width, reduction, reduction) if reduction > 1 else None
        self.norm = nn.LayerNorm(width, eps=1e-5) if reduction > 1 else None

    def reduce(self, x, grid):
        if self.reduction == 1:
            return x
        # DIFF: where its stride does not divide a map, PVTv2's released code cuts the rest off; here zeros complete it.
        bottom, right = (-n % self.reduction for n in grid)
        x = self.sr(F.pad(as_map(x, grid), (0, right, 0, bottom)))  # (B, D, h / reduction, w / reduction)
        return self.norm(x.flatten(2).transpose(1, 2))  # (B, N', D)


class Mlp(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

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


class Block(nn.Module):
    """Pre-norm Transformer block. `noise` (B, 2): one draw per sample and branch for stochastic depth. `context` goes
    to both branches. `layer_scale`: start of a learned factor on each branch (Touvron et al., 2021), 0 for none."""

    def __init__(self, width, attn, mlp_ratio=4.0, drop_path_rate=0.0, layer_scale=0.0, eps=1e-6, mlp=Mlp):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = attn
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = mlp(width, int(width * mlp_ratio))
        self.drop_path_rate = drop_path_rate
        for name in ("gamma_1", "gamma_2"):
            self.register_parameter(name, nn.Parameter(torch.full((width,), layer_scale)) if layer_scale else None)

    def forward(self, x, noise=None, *context):
        noise = (None, None) if noise is None else noise.unbind(dim=1)  # 2 x (B,)
        branch = self.attn(self.norm1(x), *context)
        x = x + drop_path(branch if self.gamma_1 is None else self.gamma_1 * branch, noise[0], self.drop_path_rate)
        branch = self.mlp(self.norm2(x), *context)
        return x + drop_path(branch if self.gamma_2 is None else self.gamma_2 * branch, noise[1], self.drop_path_rate)


def run_blocks(blocks, x, noise=None, checkpointing=False, context=()):
    """x through all blocks; `noise` (B, 2 * len(blocks)) for stochastic depth; activations recomputed if asked for;
    `context`: what the blocks' attention needs beside x."""
    for i, block in enumerate(blocks):
        draw = None if noise is None else noise[:, 2 * i : 2 * i + 2]  # (B, 2)
        if checkpointing and torch.is_grad_enabled():
            x = checkpoint(block, x, draw, *context, use_reentrant=False, preserve_rng_state=False)  # no draws
        else:
            x = block(x, draw, *context)
    return x


@torch.no_grad()
def blend(average, model, decay):
    """average = decay * average + (1 - decay) * model, for the parameters and BatchNorm's statistics of `average`, by
    their names. (torch's own AveragedModel would copy the model in its first update, and forget what it started from.)
    """
    own = model.state_dict()
    pairs = [(value, own[name]) for name, value in average.state_dict().items() if value.is_floating_point()]
    get_ema_multi_avg_fn(decay)(*map(list, zip(*pairs, strict=True)), None)


class Gather(torch.autograd.Function):
    """Rows (B, ...) of all processes, by rank: (world * B, ...); gradients go back to where a row is from."""

    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)  # (world * B, ...)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]  # (B, ...)


def everyones(x):
    """(x of all processes as one batch, by rank; the slice of it that is this process's own). x (B, ...), of the same B
    everywhere; gradients flow back to the process that a row came from."""
    if not dist.is_initialized():
        return x, slice(len(x))
    first = dist.get_rank() * len(x)
    return Gather.apply(x), slice(first, first + len(x))  # (world * B, ...)


class BatchNorm(nn.BatchNorm1d):
    """BatchNorm of (B, D) over what all processes hold at once: what nn.SyncBatchNorm does on GPUs alone. Each of them
    normalises the whole batch and goes on with its part, so that the running averages are the same everywhere."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        x, own = everyones(x)  # (world * B, D)
        return super().forward(x)[own]  # (B, D)


def mlp_head(width, hidden):
    """Projector or predictor of a method that compares vectors, (B, D) -> (B, D): no biases, BatchNorm between the two
    layers only (LUT's released code)."""
    return nn.Sequential(nn.Linear(width, hidden, bias=False), BatchNorm(hidden), nn.ReLU(),
                         nn.Linear(hidden, width, bias=False)).apply(init_weights)


class Decoder(nn.Module):
    """The small Transformer that MAE-like methods paint with (MAE, 3 and A.1): `embed` projects what the encoder saw,
    the method puts mask tokens in between, and calling the decoder on the whole grid predicts a vector per patch.

    in_width: channels of the latent; out_width: values per patch; grid (h, w), None for a decoder without positions;
    `num_prefix` class tokens in front; with `up`, a latent token is projected to up x up tokens, which the method
    unfolds. ValueError if depth, width and heads do not fit together.
    """

    def __init__(self, in_width, out_width, grid, width, depth, num_heads, num_prefix=1, up=1, eps=1e-6):
        super().__init__()
        if depth < 1 or num_heads < 1 or width < 1 or width % num_heads:
            raise ValueError("--decoder_heads must divide --decoder_width, and both and --decoder_depth be 1 or more, "
                             f"not {num_heads}, {width} and {depth}")
        self.num_prefix, self.checkpointing = num_prefix, False
        self.embed = nn.Linear(in_width, up * up * width)
        self.register_buffer("pos_embed", None if grid is None else sincos_positions(grid, width, num_prefix))
        self.blocks = nn.ModuleList(Block(width, Attention(width, num_heads), eps=eps) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=eps)
        self.pred = nn.Linear(width, out_width)
        self.apply(init_weights)

    def forward(self, x):
        """Embedded tokens of the whole grid (B, num_prefix + N, width), raster order -> (B, N, out_width)."""
        return self.pred(self.decode(x))

    def decode(self, x):
        """The same without the last layer, (B, N, width)."""
        x = x if self.pos_embed is None else x + self.pos_embed
        x = run_blocks(self.blocks, x, checkpointing=self.checkpointing)
        return self.norm(x)[:, self.num_prefix :]  # (B, N, width)
