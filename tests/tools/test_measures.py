"""What analyze.py measures, against closed forms and brute force."""

import math

import pytest
import torch

from common import layers
from tools import measures, snapshots
from tools.attention_maps import Layout


def layout_of(grid, stride=8):
    """Of all tokens of a grid, in one window."""
    places = (layers.raster(grid) + 0.5) * stride
    return Layout(places, places, torch.ones(places.shape[:2]) > 0, torch.ones(places.shape[:2]) > 0, stride)


# Distributions


@pytest.mark.parametrize("grid", [(4, 4), (3, 5)])
def test_uniform_attention(grid):
    """The distance is the mean over all pairs, the entropy ln N."""
    w, N = grid[1], grid[0] * grid[1]
    layout, maps = layout_of(grid), torch.full((2, 1, 3, N, N), 1 / N)
    pairs = [8 * math.hypot(a // w - b // w, a % w - b % w) for a in range(N) for b in range(N)]
    found = measures.distance(maps, layout.queries, layout.keys)  # (2, 1, 3, N)
    total, count = measures.sum_over_queries(found, layout)
    assert count == 2 * N
    torch.testing.assert_close(total / count, torch.full((3,), sum(pairs) / N**2))
    torch.testing.assert_close(measures.entropy(maps), torch.full((2, 1, 3, N), math.log(N)))
    torch.testing.assert_close(measures.divergence(maps, 2), torch.zeros(2, 1, 3, N), atol=1e-6, rtol=0)


def test_attention_to_oneself():
    layout, maps = layout_of((3, 3)), torch.eye(9).expand(1, 1, 2, 9, 9)
    assert measures.distance(maps, layout.queries, layout.keys).abs().max() == 0
    assert measures.entropy(maps).abs().max() == 0


def test_divergence_of_known_distributions():
    """KL(p||q) = ln(4/3) / 2 for (1/2, 1/2) and (1/4, 3/4); of three, the mean over the two others."""
    p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
    p_q, q_p = math.log(4 / 3) / 2, 0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2)
    torch.testing.assert_close(measures.divergence(torch.stack([p, q]), 0), torch.tensor([p_q, q_p]))
    three = measures.divergence(torch.stack([p, q, p]), 0)
    torch.testing.assert_close(three, torch.tensor([p_q / 2, q_p, p_q / 2]))
    alike = torch.rand(1, 1, 1, 5, 7, generator=torch.Generator().manual_seed(0)).softmax(dim=4)
    assert measures.divergence(alike.expand(-1, -1, 3, -1, -1), 2).abs().max() < 1e-6  # heads that look alike
    assert measures.divergence(p[None], 0).isnan().all()  # a head alone


def test_class_token_and_padding_are_left_out():
    """Of the keys; the rest sums up to 1. Queries that are no tokens do not count."""
    layout = layout_of((1, 4))
    layout.is_key = layout.is_query = torch.tensor([[False, True, True, False]])
    maps = torch.tensor([0.5, 0.1, 0.3, 0.1]).expand(1, 1, 1, 4, 4)
    kept = measures.tokens_alone(maps, layout)
    torch.testing.assert_close(kept[0, 0, 0, 0], torch.tensor([0, 0.25, 0.75, 0]))
    values = torch.tensor([100.0, 1.0, 3.0, torch.nan]).view(1, 1, 1, 4)
    total, count = measures.sum_over_queries(values, layout)
    assert total.tolist() == [4.0] and count == 2


# Features


def hsic_by_the_book(x, y):
    """Song et al., 2012, Eq. 5, term by term."""
    n, one = len(x), torch.ones(len(x), dtype=torch.float64)
    K, L = (z.double() @ z.double().T for z in (x, y))
    K, L = K - K.diag().diag(), L - L.diag().diag()
    trace, sums = (K @ L).trace(), (one @ K @ one) * (one @ L @ one) / ((n - 1) * (n - 2))
    return (trace + sums - 2 / (n - 2) * one @ K @ L @ one) / (n * (n - 3))


def test_hsic_and_cka():
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 6, generator=draw) + 3, torch.randn(40, 9, generator=draw)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=draw))[0]
    features = [x, y, 5 * x @ rotation]
    found = measures.hsic(features)
    for i, one in enumerate(features):
        for j, two in enumerate(features):
            torch.testing.assert_close(found[i, j], hsic_by_the_book(one, two), rtol=1e-6, atol=1e-8)
    similarity = measures.cka(found)
    torch.testing.assert_close(similarity.diagonal(), torch.ones(3, dtype=torch.float64))
    assert similarity[0, 2].item() == pytest.approx(1)  # rotated and scaled


def test_cka_of_independent_features_is_near_0():
    """The biased estimator has about D / n. Features that share half of their directions have 1/2."""
    draw = torch.Generator().manual_seed(1)
    x, y = (torch.randn(1500, 40, generator=draw) for _ in range(2))
    similarity = measures.cka(measures.hsic([x, y, torch.cat([x[:, :20], y[:, :20]], dim=1)]))
    assert abs(similarity[0, 1]) < 0.01
    assert similarity[0, 2].item() == pytest.approx(0.5, abs=0.02)


def test_mini_batches_estimate_the_hsic_of_all():
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(2000, 5, generator=draw)
    features = [x, x + torch.randn(2000, 5, generator=draw)]
    whole = measures.hsic(features)
    parts = torch.stack([measures.hsic([z[i : i + 20] for z in features]) for i in range(0, 2000, 20)])
    torch.testing.assert_close(parts.mean(dim=0), whole, rtol=0.05, atol=0)


def test_spectrum_from_sums():
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) @ torch.diag(torch.arange(6.0)) + 7
    covariance = measures.Covariance()
    for part in x.split(20):
        covariance.add(part)
    expected = torch.linalg.svdvals(torch.cov(x.double().T, correction=0))
    torch.testing.assert_close(covariance.spectrum(), expected, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("spectrum,rank", [([3, 3, 3, 3], 4), ([5, 0, 0], 1), ([2, 1, 1], 2**1.5), ([0, 0], 1)])
def test_effective_rank_of_known_spectra(spectrum, rank):
    assert measures.effective_rank(torch.tensor(spectrum).double()) == pytest.approx(rank)


def test_frequencies():
    """A checkerboard has the highest one alone, also on a map that is no square; a constant has 0 alone."""
    rows, columns = torch.meshgrid(torch.arange(6), torch.arange(8), indexing="ij")
    board = (1.0 - 2 * ((rows + columns) % 2)).expand(2, 3, 6, 8)
    found = measures.log_amplitudes(board)
    assert found.shape == (4,) and found.argmax() == 3 and found[3].item() == pytest.approx(math.log(48))
    assert measures.log_amplitudes(torch.ones(1, 1, 6, 8)).argmax() == 0
    assert measures.log_amplitudes(torch.ones(1, 2, 1, 5)).shape == (1,)


# Kernels


def test_kernels():
    uniform, middle = torch.full((5, 5), -2.0), torch.zeros(5, 5)
    middle[2, 2] = 3
    p = measures.shares_of(torch.stack([uniform, middle]))  # signs do not matter
    distances = measures.from_centre((5, 5)).double()
    places = [math.hypot(i - 2, j - 2) for i in range(5) for j in range(5)]
    assert (p @ distances).tolist() == pytest.approx([sum(places) / 25, 0])
    assert measures.entropy(p).tolist() == pytest.approx([math.log(25), 0])
    assert snapshots.profile(p[1:], distances).tolist() == [1, 0, 0]
    assert snapshots.profile(p[:1], distances).tolist() == pytest.approx([1 / 25] * 3)


# Masks


def brute_force(mask, unit):
    big = mask.repeat_interleave(unit, 0).repeat_interleave(unit, 1)
    masked, visible = big.nonzero().double(), (~big).nonzero().double()
    return torch.cdist(masked, visible).amin(dim=1).mean().item()


@pytest.mark.parametrize("grid,unit", [((4, 4), 3), ((3, 5), 4), ((2, 2), 1)])
def test_masked_distance_by_brute_force(grid, unit):
    mask = torch.rand(grid, generator=torch.Generator().manual_seed(unit)) < 0.7
    mask[0, 0], mask[1, 1] = False, True
    assert measures.masked_distance(mask, unit) == pytest.approx(brute_force(mask, unit), abs=1e-4)


def test_masked_distance_of_nothing():
    assert math.isnan(measures.masked_distance(torch.ones(2, 2) > 0, 4))
    assert math.isnan(measures.masked_distance(torch.zeros(2, 2) > 0, 4))


def test_avgdist_of_the_grid_strategy():
    """Of 2x2 units of 1 px, with the top-left one visible: (1 + 1 + sqrt 2) / 3. It has no chance in it."""
    rows = snapshots.avgdist((2, 2), 1, 3, seed=0)["results"]["AvgDist, pixels, of 2x2 px in units of 1 px"]
    [values] = rows["grid"].values()
    assert values == pytest.approx([(2 + math.sqrt(2)) / 3] * 3, abs=1e-4)


def test_avgdist_of_umae():
    """Known values (means of many masks): random 10.1, uniform 7.4, and 10.3 after secondary masking."""
    [rows] = snapshots.avgdist((256, 256), 16, 60, seed=0)["results"].values()
    means = {name: sum(values) / 60 for name, cells in rows.items() for values in cells.values()}
    assert list(means) == ["random", "grid", "uniform", "uniform, then a quarter hidden"]
    assert means["random"] == pytest.approx(10.1, abs=0.2) and means["uniform"] == pytest.approx(7.4, abs=0.1)
    assert means["uniform, then a quarter hidden"] == pytest.approx(10.3, abs=0.2)


@pytest.mark.parametrize("size,unit,count", [((250, 256), 16, 1), ((48, 48), 16, 1), ((64, 64), 16, 0)])
def test_sizes_that_make_no_mask(size, unit, count):
    with pytest.raises(ValueError, match="divisible"):
        snapshots.avgdist(size, unit, count, 0)
