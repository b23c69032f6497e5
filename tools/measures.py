"""What analyze.py measures, as functions with a closed form: of attention maps, features, kernels and masks.

Source: Xie et al., Revealing the Dark Secrets of Masked Image Modeling (SECRETS), arXiv 2205.13543. Every definition is
in docs/analysis.md, which says where the paper is silent and the convention is ours.
"""

import torch

# ---------------------------------------- Distributions: attention of a query, weights of a kernel

EPS = 1e-8  # inside the logarithms of a divergence, where a probability may be 0


def distance(p, places, others):
    """Mean distance of places (W, n, 2) to others (W, m, 2), weighted by p (B, W, heads, n, m): (B, W, heads, n)."""
    distances = (places[:, :, None] - others[:, None]).float().norm(dim=3)  # (W, n, m)
    return (p * distances[:, None]).sum(dim=4)


def entropy(p):
    """Entropy in nats of distributions (..., m): (...)."""
    return torch.special.entr(p).sum(dim=-1)


def divergence(p, dim):
    """KL divergence in nats from each distribution p (..., m) to the others along `dim`, their mean over those others:
    (...). Of one alone, NaN."""
    logs = (p + EPS).log()
    count = p.shape[dim]
    own = (p * logs).sum(dim=-1)
    all_others = (p * logs.sum(dim=dim, keepdim=True)).sum(dim=-1)  # itself included, which the next line undoes
    return (count * own - all_others) / (count - 1 if count > 1 else torch.nan)


def tokens_alone(maps, layout):
    """Attention maps (B, W, heads, n, m) without what is no token of the image among the keys; rows sum up to 1."""
    maps = maps.float() * layout.is_key[:, None, None].to(maps.device)
    return maps / maps.sum(dim=4, keepdim=True).clamp(min=1e-30)


def sum_over_queries(values, layout):
    """Values (B, W, heads, n) of queries -> (their sums (heads,), how many queries: tokens of the image alone)."""
    is_query = layout.is_query.to(values.device)
    kept = torch.where(is_query[:, None], values, 0.0)
    return kept.sum(dim=(0, 1, 3)), len(values) * int(is_query.sum())


# ---------------------------------------- Features

def hsic(features):
    """The unbiased HSIC (Song et al., 2012) with linear kernels of all pairs of layers, from features [(n, D_i)] of the
    same n >= 4 images: (layers, layers). Means over mini-batches converge to that of all images, however small the
    batches are (Nguyen et al., 2021, 3)."""
    grams = []
    for x in features:
        x = x.double() - x.double().mean(dim=0)  # changes nothing, but for rounding
        gram = x @ x.T  # (n, n)
        grams.append(gram.fill_diagonal_(0))
    grams = torch.stack(grams)  # (layers, n, n)

    n = grams.shape[1]
    rows = grams.sum(dim=2)  # (layers, n)
    totals = rows.sum(dim=1)  # (layers,)
    traces = grams.flatten(1) @ grams.flatten(1).T  # (layers, layers)
    sums = totals[:, None] * totals / ((n - 1) * (n - 2))
    products = rows @ rows.T * 2 / (n - 2)
    return (traces + sums - products) / (n * (n - 3))


def cka(hsics):
    """Centred kernel alignment (SECRETS, A.2) of HSICs (layers, layers): HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L))."""
    own = hsics.diagonal().clamp(min=1e-30).sqrt()  # (layers,)
    return hsics / own[:, None] / own


class Covariance:
    """Covariance of features (n, D), from sums: memory does not grow with n."""

    def __init__(self):
        self.n, self.total, self.products = 0, 0.0, 0.0

    def add(self, x):
        x = x.double()
        self.n += len(x)
        self.total = self.total + x.sum(dim=0)  # (D,)
        self.products = self.products + x.T @ x  # (D, D)

    def spectrum(self):
        """Its singular values (D,), largest first (LUT, 6.2.3)."""
        mean = self.total / self.n
        covariance = self.products / self.n - mean[:, None] * mean
        return torch.linalg.eigvalsh(covariance).flip(0).clamp(min=0)


def effective_rank(spectrum):
    """exp of the entropy of singular values, as shares of their sum (Roy & Vetterli, 2007): k for k equal ones."""
    shares = spectrum / spectrum.sum().clamp(min=1e-30)
    return entropy(shares).exp().item()


def log_amplitudes(maps):
    """ln |Fourier transform| of feature maps (B, D, h, w), mean over images and channels, along the diagonal of the
    frequencies from 0 to the highest of the shorter side (Park & Kim, 2022): (min(h, w) // 2 + 1,)."""
    h, w = maps.shape[2:]
    amplitudes = torch.fft.fft2(maps.double()).abs()  # (B, D, h, w)
    means = (amplitudes + 1e-12).log().mean(dim=(0, 1))  # (h, w)
    side = min(h, w)
    steps = torch.arange(side // 2 + 1, device=maps.device)
    return means[steps * h // side, steps * w // side]


# ---------------------------------------- Kernels

def shares_of(kernels):
    """Kernels (K, a, b) -> each as a distribution over its a*b places: absolute values, of sum 1 (ours)."""
    size = kernels.double().abs().flatten(1)  # (K, a*b)
    return size / size.sum(dim=1, keepdim=True).clamp(min=1e-30)


def from_centre(side):
    """Distance of every place of a kernel (a, b) from its centre, in places: (a*b,)."""
    rows = torch.arange(side[0]) - (side[0] - 1) / 2
    columns = torch.arange(side[1]) - (side[1] - 1) / 2
    return torch.hypot(rows[:, None], columns).flatten()


# ---------------------------------------- Masks

def masked_distance(mask, unit):
    """AvgDist (SimMIM, 4.1.2; SECRETS, 3.1): mean distance in pixels of masked pixels to the nearest visible one, of a
    mask (h, w) of units, True = masked. NaN if nothing is masked, or all."""
    if mask.all() or not mask.any():
        return torch.nan
    h, w = mask.shape
    rows, columns = squared_distances(h, unit), squared_distances(w, unit)  # (h*unit, h), (w*unit, w)
    # First the best column in every row of units, then the best row.
    in_row = torch.where(mask[None], torch.inf, columns[:, None])  # (w*unit, h, w)
    in_row = in_row.amin(dim=2).T  # (h, w*unit)
    nearest = (rows[:, :, None] + in_row).amin(dim=1).sqrt()  # (h*unit, w*unit)
    is_masked = mask.repeat_interleave(unit, 0).repeat_interleave(unit, 1)  # (h*unit, w*unit)
    return nearest[is_masked].mean().item()


def squared_distances(count, unit):
    """On one axis, from every pixel to the nearest pixel of each of `count` units in a row: (count * unit, count)."""
    pixels = torch.arange(count * unit)[:, None]
    first = torch.arange(count) * unit
    before, behind = first - pixels, pixels - (first + unit - 1)
    return torch.maximum(before, behind).clamp(min=0).square().float()
