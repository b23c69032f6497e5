"""The figures of analyze.py: each is drawn from the record in the JSON beside it, and from nothing else."""

import statistics

import torch

from common import figures
from common.figures import as_label

# Okabe & Ito, 2008: these, and the colour map, look different to all eyes.
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000"]
MAP = "cividis"


def colour(i):
    return COLOURS[i % len(COLOURS)]


def tidy(axis, title="", **labels):
    axis.set_title(title, fontsize=10)
    axis.set(**labels)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25, lw=0.5)


def panels(count, width=2.9, height=2.9, **options):
    """(save, axes) of so many panels, up to four in a row, as many in each as they can be."""
    rows = -(-count // 4)
    columns = -(-count // rows)
    figure, save = figures.new_figure(max(3.6, width * columns), height * rows)
    axes = figure.subplots(rows, columns, squeeze=False, **options).flatten()
    for axis in axes[count:]:
        axis.axis("off")
    return save, axes[:count]


def layer_axis(axis, rows):
    """Whole numbers below an axis of layers."""
    last = max(int(layer) for layer in rows)
    axis.set_xticks(range(1, last + 1, 1 + last // 9))


def means_by_layer(rows):
    """(layers, means over all numbers in a cell) of {layer: [numbers or lists of each seed]}."""
    flat = {int(layer): torch.tensor(values).flatten().nanmean().item() for layer, values in rows.items()}
    return list(flat), list(flat.values())


def dots(axis, rows, shade):
    """A small dot for every head or kernel of every seed, a line through their means."""
    values = {int(layer): [value for seed in seeds for value in seed] for layer, seeds in rows.items()}
    size = 5 if max(map(len, values.values())) < 100 else 1.5
    for layer, of_layer in values.items():
        axis.plot([layer] * len(of_layer), of_layer, "o", ms=size, color=shade, alpha=0.5, mec="none")
    axis.plot(*means_by_layer(rows), "-", lw=1.2, color="black", label="mean")
    layer_axis(axis, rows)


def heads(path, record):
    """SECRETS, Figures 1, 3, 4: a dot for each head, over the layers."""
    save, axes = panels(len(record["heads"]), sharey=True)
    for i, (axis, (name, rows)) in enumerate(zip(axes, record["heads"].items(), strict=True)):
        dots(axis, rows, colour(i))
        tidy(axis, title=as_label(name), xlabel="layer")
    axes[0].set(ylabel=record["title"], ylim=(0, None))  # of all panels
    axes[0].legend(frameon=False, fontsize=8)
    save(path)


def cka(path, record):
    """SECRETS, Figure 6: layers of one network on the diagonal, of two networks beside it."""
    matrices = record["matrices"]
    names = list(matrices)
    figure, save = figures.new_figure(1.2 + 2.5 * len(names), 0.6 + 2.4 * len(names))
    axes = figure.subplots(len(names), len(names), squeeze=False)
    for i, name in enumerate(names):
        for j, other in enumerate(names):
            axis = axes[i][j]
            if j < i:  # the same as the other way round
                axis.axis("off")
                continue
            matrix = matrices[name][other]
            extent = (0.5, len(matrix[0]) + 0.5, 0.5, len(matrix) + 0.5)
            drawn = axis.imshow(matrix, cmap=MAP, vmin=0, vmax=1, origin="lower", extent=extent, aspect="auto")
            for ticks, count in ((axis.set_xticks, len(matrix[0])), (axis.set_yticks, len(matrix))):
                ticks(range(1, count + 1, 1 + count // 13))
            if len(matrix) * len(matrix[0]) <= 36:  # there is room for numbers
                for y, line in enumerate(matrix):
                    for x, value in enumerate(line):
                        shade = "white" if value < 0.5 else "black"
                        axis.text(x + 1, y + 1, f"{value:.2f}", ha="center", va="center", color=shade, fontsize=7)
            axis.set_xlabel(f"layer of {as_label(other)}", fontsize=8)
            axis.set_ylabel(f"layer of {as_label(name)}", fontsize=8)
            axis.tick_params(labelsize=7)
    figure.colorbar(drawn, ax=axes, label="CKA", shrink=0.6)
    save(path)


def lines_by_layer(axis, tables, **labels):
    """A line for each network over its layers, and a dot for each seed."""
    for i, (name, rows) in enumerate(tables.items()):
        axis.plot(*means_by_layer(rows), "-", color=colour(i), lw=1.4, label=as_label(name))
        for layer, values in rows.items():
            axis.plot([int(layer)] * len(values), values, "o", ms=3, color=colour(i), mec="none")
    layer_axis(axis, max(tables.values(), key=len))
    tidy(axis, xlabel="layer", **labels)


def last_layer(rows):
    """Numbers of the first seed in the last layer that has several."""
    return [seeds[0] for seeds in rows.values() if len(seeds[0]) > 1][-1]


def legend_beside(axis):
    """The names of an axis's lines, right of all axes: inside there is no place that stays empty."""
    axis.figure.legend(*axis.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)


def spectrum(path, record):
    """LUT, Figure 4, but for that the networks' own spectra are drawn, not their difference."""
    save, (left, right) = panels(2, 4.4, 3.4)
    for i, (name, rows) in enumerate(record["spectra"].items()):
        values = last_layer(rows)
        values = [value for value in values if value > 1e-10 * values[0]]  # not 0 but for rounding
        left.plot(range(1, len(values) + 1), values, color=colour(i), lw=1.4, label=as_label(name))
    tidy(left, title="last layer", xlabel="rank", ylabel="singular value of the covariance", yscale="log")
    [rows] = record["results"].values()
    lines_by_layer(right, rows, title="all layers", ylabel="effective rank")
    legend_beside(right)
    save(path)


def frequency(path, record):
    save, (left, right) = panels(2, 4.4, 3.4)
    for i, (name, rows) in enumerate(record["curves"].items()):
        several = [seeds[0] for seeds in rows.values() if len(seeds[0]) > 1]
        if several:
            steps = [step / (len(several[-1]) - 1) for step in range(len(several[-1]))]
            left.plot(steps, several[-1], ".-", color=colour(i), lw=1.4, label=as_label(name))
    label = "ln amplitude, relative to 0"
    tidy(left, title="last layer with a map", xlabel="frequency, of the highest", ylabel=label)
    [rows] = record["results"].values()
    lines_by_layer(right, rows, title="highest frequency", ylabel=label)
    legend_beside(right)
    save(path)


def kernels(path, record):
    """SECRETS, Figures 12 to 14, and how the weights fall off from the centre."""
    names = list(record["profiles"])
    figure, save = figures.new_figure(1 + 3 * len(names), 10.5)
    axes = figure.subplots(4, len(names), squeeze=False, sharey="row")
    for column, name in enumerate(names):
        for row, (title, tables) in enumerate(record["kernels"].items()):
            axis = axes[row][column]
            dots(axis, tables[name], colour(column))
            tidy(axis, title=as_label(name) if row == 0 else "", xlabel="layer")
            axis.set_ylabel("" if column else title, fontsize=8)
        last = max(int(layer) for layer in record["profiles"][name])
        for layer, seeds in record["profiles"][name].items():
            shade = int(layer) / (last + 1)
            axes[3][column].plot(seeds[0], ".-", color=(shade, 0.45, 1 - shade), lw=1, label=f"layer {layer}")
        handles = axes[3][column].lines
        axes[3][column].legend(handles=[handles[0], handles[-1]], frameon=False, fontsize=8)
        tidy(axes[3][column], xlabel="distance from the centre, places", ylabel="" if column else "share of a place")
    save(path)


def attention(path, record, name, imgs):
    """LUT, Figure 1: rows are an image and a query, columns the heads."""
    maps, queries = record["maps"][name], record["queries"]
    H, W = imgs.shape[2:]
    num_heads = min(12, len(maps[0][0]))  # more would be too small to see
    figure, save = figures.new_figure(1.1 * (1 + num_heads) + 0.4, 0.5 + 1.15 * len(maps) * len(queries) * H / W)
    axes = figure.subplots(len(maps) * len(queries), 1 + num_heads, squeeze=False)
    cell = record["cells"][name]
    for i, of_image in enumerate(maps):
        for q, of_query in enumerate(of_image):
            line = axes[i * len(queries) + q]
            line[0].imshow(figures.as_picture(imgs[i]), cmap="gray", vmin=0, vmax=1, extent=(0, W, H, 0))
            for head, values in enumerate(of_query[:num_heads]):
                raster = torch.tensor([[torch.nan if value is None else value for value in row] for row in values])
                rows, columns = raster.shape
                extent = (0, columns * cell, rows * cell, 0)  # pixels; the last places may reach beyond the image
                line[1 + head].imshow(raster.numpy(), cmap=MAP, extent=extent, interpolation="nearest")
            for axis in line:
                axis.plot(queries[q][1], queries[q][0], "+", color="#d55e00", ms=8, mew=2)
                axis.set(xticks=[], yticks=[], xlim=(0, W), ylim=(H, 0))
    for head in range(num_heads):
        axes[0][1 + head].set_title(f"head {head + 1}", fontsize=8)
    figure.suptitle(f"{as_label(name)}, layer: {record['layer']}; attention of the patch at the cross", fontsize=9)
    save(path)


def avgdist(path, record):
    save, (axis,) = panels(1, 5.6, 3.2)
    [(title, rows)] = record["results"].items()
    axis.axvspan(10, 20, color="#dddddd", label="best in SimMIM's paper")
    for i, cells in enumerate(rows.values()):
        [values] = cells.values()
        axis.barh(i, statistics.mean(values), color=colour(i), height=0.6)
        axis.plot(values, [i] * len(values), "k.", ms=2)
    axis.set_yticks(range(len(rows)), list(rows))
    axis.invert_yaxis()
    tidy(axis, xlabel=title)
    axis.legend(frameon=False, fontsize=8)
    save(path)


def drop(path, record):
    """A panel for each task; a hollow mark is an encoder whose layers were shuffled, too."""
    save, axes = panels(len(record["results"]), 3.6, 3.4)
    for axis, (title, rows) in zip(axes, record["results"].items(), strict=True):
        for i, (name, cells) in enumerate(rows.items()):
            known = {column: [value for value in values if value is not None] for column, values in cells.items()}
            plain = {int(column.split()[0]): values for column, values in known.items() if "shuffled" not in column}
            means = [statistics.mean(values) for values in plain.values()]
            axis.plot(list(plain), means, "-", color=colour(i), label=as_label(name))
            for column, values in known.items():
                fill = "none" if "shuffled" in column else colour(i)
                x = int(column.split()[0]) + (0.1 if "shuffled" in column else 0)
                axis.plot([x] * len(values), values, "o", ms=4, mec=colour(i), mfc=fill)
        axis.set_xticks(list(plain))
        task, _, score = title.partition(": ")
        tidy(axis, title=task, xlabel="last layers dropped", ylabel=score)
    axes[0].legend(frameon=False, fontsize=8)
    save(path)


def curves(path, record):
    tables = {title: rows for title, rows in record["curves"].items() if any(rows.values())}
    save, axes = panels(len(tables), 3.8, 3.2)
    for axis, (title, rows) in zip(axes, tables.items(), strict=True):
        for i, (name, points) in enumerate(rows.items()):
            if points:
                axis.plot(*zip(*points, strict=True), "-" if len(points) > 1 else "o", lw=1.2, color=colour(i),
                          label=as_label(name))
        tidy(axis, title=title, xlabel="step")
        axis.legend(frameon=False, fontsize=8)
    save(path)


DRAW = {"distance": heads, "entropy": heads, "kl": heads, "cka": cka, "kernels": kernels, "spectrum": spectrum,
        "frequency": frequency, "avgdist": avgdist, "drop": drop, "curves": curves}
