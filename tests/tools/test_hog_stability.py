"""Stability of targets: measures by hand, and the same part of an image in a cell at every size."""

import math

import pytest
import torch

import fastmim
from common import transforms
from tools import hog_stability


def pictures(n=3, side=64, seed=0):
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


def test_change_by_hand():
    """It depends neither on units nor on the mean of a target."""
    target = torch.tensor([0.0, 2.0, 4.0, 6.0]).view(1, 1, 2, 2)  # variance 5
    found = target + torch.tensor([1.0, -1.0, 1.0, -1.0]).view(1, 1, 2, 2)
    assert hog_stability.change(found, target) == pytest.approx(20)
    assert hog_stability.change(3 * found + 7, 3 * target + 7) == pytest.approx(20)
    assert hog_stability.change(target, target) == 0


def ssim_of_a_window(one, two):
    """Wang et al., 2004, Eq. 13, at the one window of two 11x11 pictures, place by place."""
    weights = torch.tensor([[math.exp(-((i - 5) ** 2 + (j - 5) ** 2) / 4.5) for j in range(11)] for i in range(11)])
    w = weights.double() / weights.double().sum()
    a, b = (w * one).sum(), (w * two).sum()
    var_a, var_b = (w * (one - a) ** 2).sum(), (w * (two - b) ** 2).sum()
    covariance = (w * (one - a) * (two - b)).sum()
    return ((2 * a * b + 1e-4) * (2 * covariance + 9e-4) / ((a**2 + b**2 + 1e-4) * (var_a + var_b + 9e-4))).item()


def test_ssim_by_hand():
    one, two = (pictures(1, 11, seed)[:, :1] for seed in (1, 2))
    assert hog_stability.ssim(one, two).item() == pytest.approx(ssim_of_a_window(one[0, 0], two[0, 0]), abs=1e-6)
    assert hog_stability.ssim(one, one).item() == pytest.approx(1)
    flat = torch.full((1, 1, 20, 20), 0.25), torch.full((1, 1, 20, 20), 0.75)
    assert hog_stability.ssim(*flat).item() == pytest.approx((2 * 0.1875 + 1e-4) / (0.625 + 1e-4))


def test_psnr_by_hand():
    one = torch.zeros(2, 1, 4, 4)
    two = torch.tensor([0.1, 1.0]).view(2, 1, 1, 1).expand_as(one)
    assert hog_stability.psnr(one, two).tolist() == pytest.approx([20, 0], abs=1e-5)


def test_a_cell_covers_the_same_part_at_every_size():
    """16x16 cells: 4 px of 64, 2 px of 32. They are those that FastMIM trains on."""
    imgs = pictures()
    assert hog_stability.hog(imgs).shape == hog_stability.hog(imgs[:, :, :32, :32]).shape == (3, 27, 16, 16)
    imgs_in = transforms.normalize((imgs * 255).round().to(torch.uint8))
    expected = fastmim.hog(imgs_in, 4)
    torch.testing.assert_close(hog_stability.hog((imgs * 255).round() / 255), expected, atol=1e-4, rtol=1e-4)
    patch = hog_stability.norm_pixels(imgs)[0, :, 8:16, 56:64]
    assert patch.mean().abs() < 1e-5 and patch.std().item() == pytest.approx(1, abs=1e-4)


def test_ways_to_resize():
    """Nearest repeats pixels, area averages them; where a picture is constant in blocks, both ways lose nothing."""
    blocks = pictures(2, 32).repeat_interleave(2, 2).repeat_interleave(2, 3)  # (2, 3, 64, 64)
    for method in ("nearest", "area"):
        small = hog_stability.resize(blocks, 32, method)
        torch.testing.assert_close(hog_stability.resize(small, 64, method), blocks)
    tables = hog_stability.at_another_size(blocks, 32)
    row = tables["SSIM of pictures, 32 px"]["down area, up nearest"]
    assert row["pixels"] == pytest.approx(1) and row["images on which HOG is more alike"] == 0
    assert len(tables["PSNR of pictures, dB, 32 px"]) == 16
    changes = tables["change, per cent of the variance, 32 px"]
    assert changes["down nearest, up area"]["pixels"] == pytest.approx(0, abs=1e-6)
    assert changes["down bicubic antialiased, up nearest"]["pixels"] > 1


def test_noise_changes_pixels_by_its_variance():
    imgs = pictures(8)
    [rows] = hog_stability.with_noise(imgs, 0).values()
    variance = imgs.var(dim=(0, 2, 3), correction=0).mean().item()
    assert rows["pixels"]["8"] == pytest.approx(100 * (8 / 255) ** 2 / variance, rel=0.02)
    assert all(list(cells.values()) == sorted(cells.values()) for cells in rows.values())


def test_sizes():
    assert hog_stability.sizes_below(224) == [96, 128, 160, 192]
    assert hog_stability.sizes_below(64) == [32, 48] and hog_stability.sizes_below(48) == [32]
