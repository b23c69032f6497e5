"""The page that gathers what analyze.py has written into a folder: OUT/index.html, which needs no network."""

import html

from tools import runner

# name: (heading, what is shown, what the paper found). No sentence says that our networks show the same.
TEXTS = {
    "distance": (
        "Attention distance",
        "How far each head looks, in pixels: the distance between a patch and those it attends to, weighted by "
        "attention (a dot for each head, a line through the means).",
        "SECRETS (3.1.1) found that supervised models look locally in lower layers and more globally in higher ones, "
        "and that models trained by masked image modeling have heads of both kinds in every layer."),
    "entropy": (
        "Attention entropy",
        "How broadly each head looks: the entropy of its attention, which is ln N for one that looks everywhere "
        "alike.",
        "SECRETS (3.1.2) found broad attention in most heads of the higher layers of supervised models, and both "
        "focused and broad heads in every layer after masked image modeling."),
    "kl": (
        "Divergence between heads",
        "How differently the heads of a layer look: the mean KL divergence of a head's attention from that of the "
        "others.",
        "SECRETS (3.1.3) found that it almost disappears in the last three layers of supervised models, and stays "
        "large in all layers after masked image modeling."),
    "cka": (
        "Similarity of layers",
        "Centred kernel alignment between the features of every two layers, of one network on the diagonal and of "
        "two networks beside it; 1 is alike but for rotation and scale.",
        "SECRETS (3.2) found values of 0.9 to 1.0 between the layers of a model trained by masked image modeling, "
        "and of 0.5 to 1.0 in supervised ones."),
    "kernels": (
        "Large kernels",
        "Convolution kernels as if they were attention: how far from the centre their weights lie, how broad they "
        "are, how different channels are, and how weights fall off from the centre.",
        "SECRETS (B) found in RepLKNet that kernels become more local by masked image modeling than by plain "
        "supervision, and that every layer has both local and global ones."),
    "attention": (
        "Where a patch looks",
        "Attention of the patch at the cross to all others, head by head; blank is what a head cannot see.",
        "LUT (Figure 1) found that the last layer of MAE looks near the chosen patch, be that on the object or on "
        "the ground."),
    "spectrum": (
        "Spectrum of features",
        "Singular values of the covariance of features over images, and the effective rank of all layers: how many "
        "directions the features use.",
        "LUT (6.2.3) found larger singular values than MAE's in its last layers, and similar ones in earlier layers."),
    "frequency": (
        "Frequency of features",
        "Fourier amplitude of feature maps, relative to that of frequency 0: lower means smoother maps.",
        "This figure is not in the five papers; Park & Kim (2022) found that self-attention lowers high frequencies "
        "and that convolutions raise them."),
    "avgdist": (
        "Distance to what is visible",
        "How far masked pixels lie from the nearest visible one, for the four ways in which UM-MAE chooses a quarter "
        "of an image (dots are masks).",
        "SECRETS (Figure 2) found the best fine-tuning of SimMIM, and a small attention distance, where this is 10 "
        "to 20 pixels. UM-MAE (3.2) hides a quarter of what uniform sampling keeps, because that alone makes too "
        "easy a task."),
    "hog": (
        "Stability of targets",
        "How alike a target is to that of a smaller copy of the image, by pictures of both, for every way to resize; "
        "and how much of it changes with noise.",
        "FastMIM (Figures 3, 8, 9) shows images on which histograms of gradients are the more alike, by SSIM and "
        "PSNR, and does not say how images were resized."),
    "drop": (
        "Fewer layers",
        "Scores after fine-tuning an encoder without its last layers; hollow marks are encoders whose layers were "
        "drawn at random from all, too.",
        "SECRETS (3.1.3) found that a supervised model without two to eight of its last layers is better on pose and "
        "as good on depth, which was not so after masked image modeling, and (3.2) that shuffled layers cost the "
        "supervised model more."),
    "curves": (
        "Curves of runs",
        "What the logs of runs hold; losses of different methods have different units.",
        "This figure compares runs of this project and has no counterpart in the papers."),
}

STYLE = """body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 72rem; padding: 1rem; color: #222;
  background: #fff; overflow-wrap: break-word; }
h1 { line-height: 1.2; } section { border-top: 1px solid #ddd; margin-top: 2rem; }
nav a { margin-right: .8rem; white-space: nowrap; } p { max-width: 46rem; }
.figure { display: block; overflow-x: auto; } /* on a phone a figure is wider than the page, and scrolls */
img { max-width: max(100%, 44rem); height: auto; display: block; margin: 1rem 0; }
.about { color: #555; font-size: .875rem; }
"""


def section(name, record):
    heading, shown, found = (html.escape(text) for text in TEXTS[name])
    figures = "\n".join(
        f'<a class="figure" href="{figure}"><img src="{figure}" alt="{heading}: {shown}" loading="lazy"></a>'
        for figure in map(html.escape, record.get("figures", [])))
    return f"""<section id="{name}">
<h2>{heading}</h2>
<p>{shown}</p>
<p>In the papers: {found}</p>
{figures}
<p class="about"><a href="{name}.json">numbers, and the command</a>; commit {html.escape(record["commit"])},
{html.escape(record["date"])}</p>
</section>"""


def about(record):
    """One line on what the networks of a record saw, or nothing."""
    return html.escape("; ".join(f"{name}: {value}" for name, value in record.get("about", {}).items()))


def write(out, notes=()):
    """OUT/index.html of every OUT/NAME.json; `notes`: lines on what was left out. Returns its path. ValueError or
    OSError if one of them is damaged."""
    paths = {name: out / f"{name}.json" for name in TEXTS}
    records = {name: runner.read_json(path) for name, path in paths.items() if path.exists()}
    for name, record in records.items():
        if not isinstance(record, dict) or not {"commit", "date"} <= record.keys():
            raise ValueError(f"{paths[name]} is none of analyze.py: remove it, or make it anew")
    links = " ".join(f'<a href="#{name}">{html.escape(TEXTS[name][0])}</a>' for name in records)
    lines = list(dict.fromkeys(line for line in map(about, records.values()) if line))
    lines += [html.escape(f"left out: {note}") for note in notes]
    intro = "\n".join(f'<p class="about">{line}</p>' for line in lines)
    sections = "\n".join(section(name, record) for name, record in records.items())
    path = out / "index.html"
    path.write_text(f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>What networks see</title>
<style>
{STYLE}</style>
</head>
<body>
<h1>What networks see</h1>
<p>Every figure names what it shows and what the papers found. Whether these networks show the same is for you to
see; one of random weights is the control.</p>
<nav>{links}</nav>
{intro}
{sections}
</body>
</html>
""", encoding="utf-8", errors="xmlcharrefreplace")
    return path
