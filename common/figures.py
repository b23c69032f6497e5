"""Pictures of reconstructions. matplotlib is imported where something is drawn: training does not need it."""

import functools
import importlib.util
import math
from pathlib import Path

import torch

from common.config import print_once, printable, user_errors
from common.folder import replacing

DPI = 120  # pixels of a picture in an inch


@functools.cache
def can_draw():
    """Is matplotlib installed? If not, this says so, once."""
    if importlib.util.find_spec("matplotlib"):
        return True
    print_once("no pictures are drawn: that needs matplotlib (pip install matplotlib)")
    return False


def new_figure(width, height):
    """A matplotlib figure of so many inches that needs no display, and its `save(path)`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")

    def save(path):
        with user_errors():
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as part:
                figure.savefig(part, dpi=DPI, format=Path(path).suffix[1:] or "png")

    return figure, save


def as_label(name):
    """A name as matplotlib is to show it: a $ begins no formula, and a legend does not leave out what begins with _."""
    return " " * name.startswith("_") + printable(name).replace("$", r"\$")


def as_picture(img):
    """(C, H, W) in [0, 1] -> what imshow takes: (H, W, 3), or (H, W) grey if there are no three channels to show."""
    shown = img[:3].permute(1, 2, 0) if len(img) >= 3 else img[0]  # (H, W, 3) or (H, W)
    return shown.cpu().numpy()


def dimmed(pred, hidden, share=0.3):
    """A prediction with less contrast where it is not `hidden`, a mask that broadcasts to it: no loss applies there,
    and what is predicted may be anything."""
    return torch.where(hidden, pred, share * pred)


def glyphs(cells, bins=9, size=15):
    """Histograms of oriented gradients (B, C*bins, h, w) as grey images (B, 1, h*size, w*size): in each cell a stroke
    for every orientation, along the edge, as bright as the mean of its channels."""
    angle = (torch.arange(bins, device=cells.device) + 0.5) * math.pi / bins  # of the gradient, from the vertical
    place = torch.linspace(-1, 1, size, device=cells.device)
    x, y = place[None, None], place[None, :, None]
    distance = x * angle.sin()[:, None, None] + y * angle.cos()[:, None, None]  # (bins, size, size), from the line
    inside = x * x + y * y <= 1  # (1, size, size)
    strokes = (1 - distance.abs() * size / 3).clamp(min=0) * inside  # (bins, size, size)

    cells = cells.float().unflatten(1, (-1, bins)).mean(dim=1).clamp(min=0)  # (B, bins, h, w)
    drawn = [torch.kron(cells[:, bin], strokes[bin]) for bin in range(bins)]  # each (B, h*size, w*size)
    return torch.stack(drawn).amax(dim=0)[:, None].clamp(max=1)  # (B, 1, h*size, w*size)


def bright_glyphs(cells):
    """`glyphs` for the eye, which would not see the weak ones."""
    return glyphs(cells).sqrt()


def grid(path, rows, title="", columns=(), side=0.0, legend=None, bar=None):
    """Rows of images, {row title: (B, C, H, W) in [0, 1]}, as a PNG with each row named at its left, each of `columns`
    above it, and images `side` inches wide; by default 1.15 to 2.5, so that their pixels show. `legend` says what
    colours mean, {name: (red, green, blue) in [0, 1]}, `bar` what greys do: (value of black, of white, unit)."""
    if not can_draw():
        return
    first = next(iter(rows.values()))
    count, (H, W) = len(first), first.shape[2:]
    side = side or min(2.5, max(1.15, *(imgs.shape[3] / DPI for imgs in rows.values())))
    scale = side / 1.15
    figure, save = new_figure(1.1 * scale + side * count, 0.4 * scale + side * len(rows) * H / W)
    axes = figure.subplots(len(rows), count, squeeze=False)
    for line, (name, imgs) in zip(axes, rows.items(), strict=True):
        for axis, img in zip(line, imgs.float(), strict=True):
            axis.imshow(as_picture(img), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9 * scale)
    for axis, name in zip(axes[0], columns, strict=False):
        axis.set_title(name, fontsize=9 * scale, parse_math=False)  # a $ is a $
    if legend:
        from matplotlib.patches import Patch

        marks = [Patch(facecolor=colour, edgecolor="0.6", label=as_label(name)) for name, colour in legend.items()]
        figure.legend(handles=marks, loc="outside lower center", ncols=6, frameon=False, fontsize=9 * scale)
    if bar:
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize

        greys = ScalarMappable(Normalize(bar[0], bar[1]), "gray")
        figure.colorbar(greys, ax=axes, label=bar[2], shrink=0.8, aspect=30, pad=0.01)
    figure.suptitle(title, fontsize=10 * scale)
    save(path)
