"""Every figure of the project. matplotlib is imported where a figure is drawn, so that training does not need it."""

import math
from pathlib import Path

import torch

from common.options import user_errors


def new_figure(width, height):
    """A matplotlib figure of so many inches that needs no display, and its `save(path)`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)

    def save(path):
        with user_errors():
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=120)

    return figure, save


def as_picture(img):
    """(C, H, W) in [0, 1] -> what imshow takes: (H, W, 3), or (H, W) grey if there are no three channels to show."""
    return img[:3].permute(1, 2, 0).cpu().numpy() if len(img) >= 3 else img[0].cpu().numpy()


def glyphs(cells, bins=9, size=15):
    """Histograms of oriented gradients (B, C*bins, h, w) as grey images (B, 1, h*size, w*size): in each cell a stroke
    for every orientation, along the edge, as bright as the mean of its channels."""
    angle = (torch.arange(bins, device=cells.device) + 0.5) * math.pi / bins  # of the gradient, from the vertical
    place = torch.linspace(-1, 1, size, device=cells.device)
    x, y = place[None, None], place[None, :, None]
    away = (x * angle.sin()[:, None, None] + y * angle.cos()[:, None, None]).abs()  # (bins, size, size), from the line
    strokes = (1 - away * size / 3).clamp(min=0) * (x * x + y * y <= 1)  # (bins, size, size)
    cells = cells.float().unflatten(1, (-1, bins)).mean(dim=1).clamp(min=0)  # (B, bins, h, w)
    drawn = [torch.kron(part, stroke) for part, stroke in zip(cells.unbind(1), strokes, strict=True)]
    return torch.stack(drawn).amax(dim=0)[:, None].clamp(max=1)  # (B, 1, h*size, w*size)


def grid(path, rows, title):
    """Rows of images, {row title: (B, C, H, W) in [0, 1]}, as a PNG with each row named at its left."""
    rows = {name: imgs.float() for name, imgs in rows.items()}
    count = len(next(iter(rows.values())))
    H, W = next(iter(rows.values())).shape[2:]
    figure, save = new_figure(1.1 + 1.15 * count, 0.4 + 1.15 * len(rows) * H / W)
    axes = figure.subplots(len(rows), count, squeeze=False)
    for line, (name, imgs) in zip(axes, rows.items(), strict=True):
        for axis, img in zip(line, imgs, strict=True):
            axis.imshow(as_picture(img), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
    figure.suptitle(title, fontsize=10)
    save(path)


def confusion(path, counts, classes):
    """A confusion matrix, counts[true][predicted], as shares of each true class."""
    K = len(classes)
    figure, save = new_figure(2 + 0.45 * K, 1.6 + 0.45 * K)
    axis = figure.subplots()
    totals = [max(1, sum(row)) for row in counts]
    shares = [[n / total for n in row] for row, total in zip(counts, totals, strict=True)]
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axis.set_xticks(range(K), classes, rotation=60, ha="right", fontsize=8)
    axis.set_yticks(range(K), classes, fontsize=8)
    axis.set(xlabel="predicted", ylabel="true", title="Confusion: per cent of each true class")
    if K <= 20:
        for i, row in enumerate(shares):
            for j, share in enumerate(row):
                shade = "white" if share > 0.5 else "black"
                axis.text(j, i, f"{100 * share:.0f}", ha="center", va="center", fontsize=7, color=shade)
    save(path)


def demo(path, results, logs):
    """Left the loss of pre-training, right the accuracy of every arm: bars are means over seeds, dots are seeds."""
    figure, save = new_figure(9.6, 3.6)
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.5])
    for seed, lines in logs.items():
        left.plot([line["step"] for line in lines], [line["loss"] for line in lines], lw=1.2, label=f"seed {seed}")
    left.set(title="MAE pre-training", xlabel="step", ylabel="loss on hidden patches", ylim=(0, None))
    left.legend(frameon=False, fontsize=8)
    arms = list(next(iter(next(iter(results.values())).values())))
    arms = ["pre-trained", *[arm for arm in arms if arm != "pre-trained"]]
    shades = dict(zip(arms, ["#d1495b", "#c9d6df", "#93a8b8", "#52687a"], strict=True))
    labels = list(next(iter(results.values())))
    for group, n in enumerate(labels):
        for i, arm in enumerate(arms):
            values = [result[n][arm] for result in results.values()]
            x, mean = group + 0.2 * (i - 1.5), sum(values) / len(values)
            right.bar(x, mean, 0.18, color=shades[arm], label=arm if group == 0 else None)
            right.plot([x] * len(values), values, "k.", ms=3)
            right.annotate(f"{mean:.0f}", (x, max(values)), (0, 3), textcoords="offset points", ha="center", fontsize=8)
    right.set_xticks(range(len(labels)), [f"{n} labels" for n in labels])
    right.set(title="Top-1 on test images after fine-tuning", ylabel="per cent", ylim=(0, 100))
    right.legend(frameon=False, fontsize=8, ncols=2, loc="upper left")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    save(path)


def dense(path, results, scores):
    """One panel a task of {task: {mode: {arm: [score of each seed]}}}, named by {task: its score}: bars are means over
    seeds, dots are seeds."""
    figure, save = new_figure(9.6, 3.4)
    for axis, (task, modes) in zip(figure.subplots(1, len(results)), results.items(), strict=True):
        for group, arms in enumerate(modes.values()):
            for i, (arm, values) in enumerate(arms.items()):
                x, mean = group + 0.25 * (i - 1), sum(values) / len(values)
                axis.bar(x, mean, 0.22, color=["#d1495b", "#52687a", "#c9d6df"][i], label=None if group else arm)
                axis.plot([x] * len(values), values, "k.", ms=3)
                axis.annotate(f"{mean:.3g}", (x, max(values)), (0, 3), textcoords="offset points", ha="center",
                              fontsize=8)
        axis.set_xticks(range(len(modes)), modes)
        axis.set(title=task, ylabel=scores[task])
        axis.margins(y=0.3)
        axis.legend(frameon=False, fontsize=8, ncols=3, loc="upper left")
        axis.spines[["top", "right"]].set_visible(False)
    save(path)


def stability(path, results, title):
    """A panel for every way to change an image: how much of each target changes."""
    ways = list(next(iter(results.values())))
    figure, save = new_figure(3.4 * len(ways), 3.2)
    for axis, way in zip(figure.subplots(1, len(ways), sharey=True), ways, strict=True):
        for target, changes in results.items():
            points = {float(k): 100 * value["share"] for k, value in changes[way].items()}
            axis.plot(list(points), list(points.values()), ".-", label=target)
        axis.set(title=way, xlabel="std, of 255 levels" if way == "noise" else "pixels", yscale="log")
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("change, % of the target's variance")
    figure.axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10)
    save(path)
