"""Weights that travel: from a run to fine-tuning, to other sizes of images and windows.

`encoder.pt` is {"arch": what models.build needs, "model": the encoder, "method": who made it, "step"}, and "classifier"
after fine-tuning.
"""

import os

import torch
import torch.nn.functional as F

import checkpoint
import models


def read_encoder(path):
    """The content of an encoder.pt. ValueError if it is damaged, hostile or something else, such as a last.pt."""
    saved = checkpoint.read(path)
    arch = saved.get("arch") if isinstance(saved, dict) else None
    fits = isinstance(arch, dict) and isinstance(saved.get("model"), dict) and isinstance(arch.get("model"), str)
    fits = fits and isinstance(arch.get("options"), dict) and isinstance(arch.get("img_size"), list)
    numbers = [*arch["img_size"], arch.get("patch_size"), arch.get("in_chans")] if fits else []
    if len(numbers) != 4 or not all(isinstance(n, int) and 0 < n <= 2**16 for n in numbers) \
            or not all(isinstance(arch.get(name), int | list) for name in ("width", "depth", "num_heads")):
        raise ValueError(f"{path} is not an encoder.pt of this project")
    return saved


def load_encoder(encoder, saved, where):
    """Copy the encoder of an encoder.pt, its positions resized if the grid differs, and say what was done.

    ValueError if heads, depth, width, patch or channels differ (weights of 12 heads fit 6 heads, and are wrong there),
    or if a tensor of the encoder would be left unset.
    """
    arch, tensors = saved["arch"], dict(saved["model"])
    for name in ("model", "patch_size", "in_chans", "width", "depth", "num_heads"):
        if arch[name] != encoder.arch[name]:
            raise ValueError(f"{where} holds an encoder with {name} {arch[name]}, not {encoder.arch[name]}")
    for name in ("bias", "layer_scale"):
        there, here = arch["options"].get(name), encoder.arch["options"].get(name)
        if there != here:
            raise ValueError(f"{where} holds an encoder with {name} {there}, not {here}")
    grid = tuple(n // arch["patch_size"] for n in arch["img_size"])
    notes = adapt_bias_tables(tensors, arch, encoder, where)
    if grid != encoder.grid and "pos_embed" in tensors:
        rows = encoder.num_prefix + grid[0] * grid[1]
        checkpoint.require_like(torch.empty(1, rows, encoder.embed_width, device="meta"), tensors["pos_embed"], where)
        tensors["pos_embed"] = resize_positions(tensors["pos_embed"], grid, encoder.grid, encoder.num_prefix)
        notes.append(f"positions resized from {grid[0]}x{grid[1]} to {encoder.grid[0]}x{encoder.grid[1]}")
    over = [name for name in tensors if name not in encoder.state_dict()]
    if over and all(name.startswith("norm.") for name in over):  # a head with its own norm replaces the last one
        notes.append(f"left over: {', '.join(over)}")
        tensors = {name: tensor for name, tensor in tensors.items() if name not in over}
    checkpoint.load_exactly(encoder, tensors, where)
    if os.environ.get("RANK", "0") == "0":
        notes = [f"loaded {len(tensors)} tensors of {arch['model']} from {where}", *notes]
        print("; ".join(notes), flush=True)


def resize_positions(table, old_grid, new_grid, num_prefix=1):
    """A position table (1, num_prefix + h*w, D) for another grid, by bicubic interpolation of its two dimensions; the
    rows of class tokens in front stay. The grids are given, not guessed: 64 tokens may be 8x8 or 4x16."""
    prefix, grid = table[:, :num_prefix], table[:, num_prefix:]
    grid = grid.reshape(1, *old_grid, -1).permute(0, 3, 1, 2)  # (1, D, h, w)
    grid = F.interpolate(grid, new_grid, mode="bicubic", align_corners=False)  # (1, D, h', w')
    return torch.cat([prefix, grid.flatten(2).transpose(1, 2)], dim=1)  # (1, num_prefix + h'*w', D)


def adapt_bias_tables(tensors, arch, encoder, where):
    """Make the bias tables among `tensors`, of the encoder that `arch` describes, fit `encoder`: one for all blocks
    becomes one per block, and other windows get resized tables. Changes `tensors`; returns what was done, as lines."""
    own, table, sizes = encoder.state_dict(), "relative_position_bias_table", set()
    notes = []
    if f"rel_pos_bias.{table}" in tensors and f"blocks.0.attn.{table}" in own:  # SimMIM's fine-tuning starts like this
        shared = tensors.pop(f"rel_pos_bias.{table}")
        tensors |= {name: shared for name in own if name.endswith(f".attn.{table}")}
        notes.append("one bias table for all blocks copied to every block")
    for name in [name for name in tensors if name.endswith(table) and name in own]:
        stage = int(name.split(".")[1]) if name.startswith("layers.") else None  # None: a ViT, one window over the grid
        old, new = (tuple(n // a["patch_size"] for n in a["img_size"]) if stage is None else
                    models.window_sizes(a["img_size"], a["options"]["window"])[stage] for a in (arch, encoder.arch))
        if old != new:
            rows = (2 * old[0] - 1) * (2 * old[1] - 1) + (3 if stage is None else 0)  # 3: BEiT's, for a class token
            checkpoint.require_like(torch.zeros(rows, own[name].shape[1]), tensors[name], f"{where}, {name}")
            tensors[name] = resize_bias_table(tensors[name], old, new)
            sizes.add(f"{old[0]}x{old[1]} to {new[0]}x{new[1]}")
    return notes + [f"bias tables resized from {', '.join(sorted(sizes))}"] * bool(sizes)


def resize_bias_table(table, old_window, new_window, method="geometric"):
    """A table of relative-position biases (T, heads), T = (2h-1)*(2w-1) and rows of a class token, for other windows.

    "geometric" is SimMIM's way: entries are taken to lie at distances that grow like a geometric series until the old
    table reaches as far as the new one, so that near neighbours, which matter most, keep their resolution; a cubic
    spline runs through them; for a smaller window, the table is cut. "bicubic" interpolates the table like an image
    (FastMIM's paper). ValueError for another method.
    """
    (h, w), new = ((2 * a - 1, 2 * b - 1) for a, b in (old_window, new_window))
    offsets, extra = table[: h * w].view(h, w, -1), table[h * w :]  # (h, w, heads)
    if method == "bicubic":
        offsets = F.interpolate(offsets.permute(2, 0, 1)[None], new, mode="bicubic")[0].permute(1, 2, 0)
    elif method == "geometric":
        rows, columns = (spline_matrix(geometric_places(n // 2, m // 2), m // 2) for n, m in ((h, new[0]), (w, new[1])))
        offsets = torch.einsum("ij,jlc,kl->ikc", rows, offsets.double(), columns).to(table.dtype)  # (h', w', heads)
    else:
        raise ValueError(f"bias tables are resized by geometric or bicubic interpolation, not {method}")
    return torch.cat([offsets.flatten(0, 1), extra])


def geometric_places(count, radius):
    """Where the entries of one side of a table lie: 0 and +-(1 + q + ... + q^(i-1)) for i = 1 to `count`, fp64, with q
    such that the last one lies at `radius`, or q = 1 if `radius` is not larger than `count`."""
    low, high, powers = 1.0, 1.0 + radius, torch.arange(count, dtype=torch.float64)
    for _ in range(60):  # bisection
        q = (low + high) / 2
        low, high = (low, q) if (q**powers).sum() > radius else (q, high)
    places = (low**powers).cumsum(0)
    return torch.cat([-places.flip(0), places.new_zeros(1), places])


def spline_matrix(places, radius):
    """What takes values at `places` (n,) to values at -radius ... radius, (2 * radius + 1, n): the cubic spline whose
    third derivative does not jump next to its ends (a polynomial for n <= 4), constant beyond its ends."""
    scale = max(1, radius)  # keeps the system well-conditioned

    def basis(x):
        powers = [(x / scale) ** k for k in range(min(4, len(places)))]
        return torch.stack(powers + [((x - knot) / scale).clamp(min=0) ** 3 for knot in places[2:-2]], dim=1)

    targets = torch.arange(-radius, radius + 1, dtype=torch.float64).clamp(places[0], places[-1])
    return torch.linalg.solve(basis(places), basis(targets), left=False)
