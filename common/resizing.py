"""Tables of positions and of relative-position biases for other grids and windows than they were trained for."""

import torch
import torch.nn.functional as F


def resize_positions(table, old_grid, new_grid, num_prefix=1):
    """A position table (1, num_prefix + h*w, D) for another grid, by bicubic interpolation of its two dimensions; the
    rows of class tokens in front stay. The grids are given, not guessed: 64 tokens may be 8x8 or 4x16."""
    prefix, grid = table[:, :num_prefix], table[:, num_prefix:]
    grid = grid.reshape(1, *old_grid, -1).permute(0, 3, 1, 2)  # (1, D, h, w)
    grid = F.interpolate(grid, new_grid, mode="bicubic", align_corners=False)  # (1, D, h', w')
    return torch.cat([prefix, grid.flatten(2).transpose(1, 2)], dim=1)  # (1, num_prefix + h'*w', D)


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
