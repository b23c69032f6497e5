"""What is taken from a network while it computes: the maps that it used, and tokens where they lie."""

import itertools

import pytest
import torch
from encoders import make_small
from maps import maps_of

import models
from common import layers
from tools import measures
from tools.attention_maps import Watch, attentions_of, blocks_of


@pytest.fixture(autouse=True)
def small(monkeypatch):
    make_small(monkeypatch)


def build(name, size, **options):
    torch.manual_seed(0)
    encoder = models.build(name, size, **options).eval().requires_grad_(False)
    for parameter in encoder.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))  # so that attention is not uniform
    return encoder


ENCODERS = {  # name: (model, size, options, attention layers, their windows)
    "vit": ("vit_tiny", (32, 48), {"patch_size": 8}, 4, [1]),
    "vit, shared bias": ("vit_tiny", (32, 32), {"patch_size": 8, "positions": "shared_bias"}, 4, [1]),
    "vit, block bias": ("vit_tiny", (32, 32), {"patch_size": 8, "positions": "block_bias"}, 4, [1]),
    "swin": ("swin_tiny", (72, 104), {"window": 4}, 5, [35, 12, 4, 4, 1]),
    "swin, continuous": ("swin_tiny", (64, 96), {"window": 4, "bias": "continuous"}, 5, [24, 6, 2, 2, 1]),
    "pvt": ("pvt_tiny", (72, 96), {}, 5, [1]),
    "pvtv2": ("pvtv2_tiny", (72, 96), {}, 5, [1]),
    "torchvision's vit": ("torchvision:vit_b_32", (64, 96), {}, 2, [1]),
    "torchvision's swin": ("torchvision:swin_t", (96, 160), {}, 5, [24, 6, 6, 2, 1]),
    "torchvision's swin v2": ("torchvision:swin_v2_t", (96, 160), {}, 5, [15, 6, 6, 2, 1]),
    "torchvision's maxvit": ("torchvision:maxvit_t", (224, 224), {}, 4, [64, 64, 16, 16])}


@pytest.mark.parametrize("name", ENCODERS)
def test_the_maps_are_those_that_were_used(name):
    """The output of attention with explicit maps is that of the fused one, on every encoder."""
    model, size, options, count, windows = ENCODERS[name]
    encoder, imgs = build(model, size, **options), torch.randn(2, 3, *size)
    explicit, maps, layouts = maps_of(encoder, imgs)
    torch.testing.assert_close(explicit, encoder(imgs), rtol=1e-5, atol=1e-5)
    assert list(maps) == list(range(count)) == list(range(len(attentions_of(encoder))))
    found = [m.shape[1] for m in maps.values()]
    assert found == (windows if len(windows) > 1 else windows * count)
    for layer, layout in layouts.items():
        B, W, _, n, m = maps[layer].shape
        assert layout.queries.shape == (W, n, 2) and layout.keys.shape == (W, m, 2) and B == 2
        torch.testing.assert_close(maps[layer].sum(dim=4), torch.ones(maps[layer].shape[:4]))
        # Every token of the map is a query once, and lies inside the image.
        places = layout.queries[layout.is_query]
        assert len(places) == len(places.unique(dim=0)) and (places > 0).all()
        assert (places < torch.tensor(size) + layout.cell).all()


def test_nothing_is_left_behind():
    encoder, imgs = build("torchvision:vit_b_32", (64, 64)), torch.randn(1, 3, 64, 64)
    plain = encoder(imgs)
    maps_of(encoder, imgs)
    with pytest.raises(ZeroDivisionError), Watch(encoder, on_maps=lambda *_: 1 / 0):
        encoder(imgs)
    assert torch.equal(encoder(imgs), plain)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in encoder.modules())


def test_patches_of_a_vit():
    """In raster order, in pixels, behind a class token that is none."""
    layout = maps_of(build("vit_tiny", (16, 24), patch_size=8), torch.randn(1, 3, 16, 24))[2][0]
    assert layout.queries[0, 1:].tolist() == [[4, 4], [4, 12], [4, 20], [12, 4], [12, 12], [12, 20]]
    assert layout.is_key.tolist() == [[False] + [True] * 6] and layout.cell == 8


# Windows


def uniform_distance(grid, stride, window, shift):
    """Mean distance if every token looks alike at all that share its window, by brute force. Windows are cut from
    the padded map, rolled by the shift; what came round from the other side is not seen."""
    padded = [-(-n // window) * window for n in grid]

    def part(place):
        found = []
        for n, side in zip(place, padded, strict=True):
            found += [(n - shift) % side // window, n < shift]
        return found

    tokens, distances = list(itertools.product(range(grid[0]), range(grid[1]))), []
    for a in tokens:
        seen = [b for b in tokens if part(b) == part(a)]
        away = [stride * ((a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2) ** 0.5 for b in seen]
        distances.append(sum(away) / len(away))
    return sum(distances) / len(distances)


def found_distance(maps, layout):
    maps = measures.tokens_alone(maps, layout)
    total, count = measures.sum_over_queries(measures.distance(maps, layout.queries, layout.keys), layout)
    torch.testing.assert_close(total, total[:1].expand_as(total))  # all heads alike
    return total[0].item() / count


def look_alike(encoder):
    """Every token attends alike to all that it sees."""
    for name, parameter in encoder.named_parameters():
        if "qkv" in name or ".q." in name or "relative_position" in name or "cpb_mlp" in name:
            parameter.zero_()


def test_distance_in_a_shifted_window_by_brute_force():
    """The map of stage 3 has 5x7 tokens of 16 px: windows of 4 need padding, and its second block is shifted."""
    encoder = build("swin_tiny", (72, 104), window=4)
    look_alike(encoder)
    _, maps, layouts = maps_of(encoder, torch.randn(2, 3, 72, 104))
    assert found_distance(maps[0], layouts[0]) == pytest.approx(uniform_distance((18, 26), 4, 4, 0), rel=1e-5)
    assert found_distance(maps[2], layouts[2]) == pytest.approx(uniform_distance((5, 7), 16, 4, 0), rel=1e-5)
    assert found_distance(maps[3], layouts[3]) == pytest.approx(uniform_distance((5, 7), 16, 4, 2), rel=1e-5)
    assert layouts[3].is_query.sum() == 35 and layouts[3].is_query.numel() == 64


def test_partitions_of_maxvit_are_windows_and_grids():
    """56x56 tokens of 4 px: 7x7 neighbours, then 7x7 tokens that are 8 tokens apart."""
    _, _, layouts = maps_of(build("torchvision:maxvit_t", (224, 224)), torch.randn(1, 3, 224, 224))
    places = layers.raster((7, 7))[0]  # (49, 2)
    for window in (0, 9, 63):
        corner = torch.tensor(divmod(window, 8))  # of a window in windows, or of a grid in tokens
        torch.testing.assert_close(layouts[0].queries[window], 4 * (7 * corner + places + 0.5))
        torch.testing.assert_close(layouts[1].queries[window], 4 * (corner + 8 * places + 0.5))


def test_distance_in_torchvisions_shifted_windows():
    """12x20 tokens of 8 px in windows of 7; torchvision's attention sees padding, our measure leaves it out."""
    encoder = build("torchvision:swin_t", (96, 160))
    look_alike(encoder)
    _, maps, layouts = maps_of(encoder, torch.randn(1, 3, 96, 160))
    assert found_distance(maps[1], layouts[1]) == pytest.approx(uniform_distance((12, 20), 8, 7, 0), rel=1e-5)
    assert found_distance(maps[2], layouts[2]) == pytest.approx(uniform_distance((12, 20), 8, 7, 3), rel=1e-5)


@pytest.mark.parametrize("name", ["pvt_tiny", "pvtv2_tiny"])
def test_reduced_keys_lie_at_their_centres(name):
    """18x24 tokens of 4 px are reduced by 8: the last row of keys is made of two rows of tokens."""
    _, maps, layouts = maps_of(build(name, (72, 96)), torch.randn(1, 3, 72, 96))
    keys = layouts[0].keys[0]
    assert keys[:, 0].view(3, 3)[:, 0].tolist() == [16, 48, 68] and keys[:3, 1].tolist() == [16, 48, 80]
    assert layouts[0].cell == 32 and maps[0].shape[3:] == (432, 9)
    assert torch.equal(layouts[4].queries, layouts[4].keys)  # of the last stage, which reduces nothing


# Features


@pytest.mark.parametrize("name,size,shapes", [
    ("vit_tiny", (32, 48), [(96, 2, 3)] * 4),
    ("swin_tiny", (72, 104), [(32, 18, 26), (64, 9, 13), (128, 5, 7), (128, 5, 7), (256, 3, 4)]),
    ("pvtv2_tiny", (64, 96), [(32, 16, 24), (64, 8, 12), (128, 4, 6), (128, 4, 6), (256, 2, 3)]),
    ("torchvision:vit_b_32", (64, 96), [(48, 2, 3)] * 2),
    ("torchvision:resnet18", (64, 96), [(64, 16, 24), (64, 16, 24), (128, 8, 12), (128, 8, 12), (256, 4, 6),
                                        (256, 4, 6), (512, 2, 3), (512, 2, 3)])])
def test_features_are_maps(name, size, shapes):
    encoder, found = build(name, size), {}
    imgs = torch.randn(1, 3, *size)
    with Watch(encoder, on_features=lambda layer, x: found.update({layer: x})):
        encoder(imgs)
    assert [tuple(found[layer].shape[1:]) for layer in range(len(found))] == shapes
    assert len(blocks_of(encoder)) == len(shapes)
    if name == "vit_tiny":  # the last norm is all that follows
        last = encoder.norm(found[3].flatten(2).transpose(1, 2))
        torch.testing.assert_close(layers.as_map(last, encoder.grid), encoder.maps(imgs)[0])
