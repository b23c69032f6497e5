"""Swin, PVT and SimMIM's ViT against an independent Swin, published parameter counts, and their own definitions."""

import re

import pytest
import torch
from encoders import read_encoder
from maps import maps_of
from torchvision.models.swin_transformer import SwinTransformer

import models
from common import checkpoint, layers, weights

# -------------------- An independent Swin, and definitions --------------------


def torchvision_names(name):
    name = re.sub(r"^patch_embed\.proj", "features.0.0", re.sub(r"^patch_embed\.norm", "features.0.2", name))
    name = re.sub(r"^layers\.(\d)\.blocks", lambda m: f"features.{2 * int(m[1]) + 1}", name)
    name = re.sub(r"^layers\.(\d)\.downsample", lambda m: f"features.{2 * int(m[1]) + 2}", name)
    return name.replace("mlp.fc1", "mlp.0").replace("mlp.fc2", "mlp.3")


@pytest.mark.parametrize("img_size", [(224, 224), (224, 448)])
def test_swin_is_torchvision_s(img_size):
    torch.manual_seed(0)
    other = SwinTransformer([4, 4], 32, [2, 2, 2, 2], [1, 2, 4, 8], [7, 7], stochastic_depth_prob=0.0).eval()
    ours = models.Swin("swin", img_size, 4, 3, 32, (2, 2, 2, 2), (1, 2, 4, 8), 32, window=7)
    theirs = other.state_dict()
    tensors = {name: theirs[torchvision_names(name)] for name in ours.state_dict()}
    checkpoint.load_exactly(ours, tensors, "torchvision")
    imgs = torch.randn(1, 3, *img_size)
    with torch.no_grad():
        expected = other.norm(other.features(imgs)).flatten(1, 2)
        torch.testing.assert_close(ours(imgs), expected, rtol=1e-5, atol=1e-5)


def random_units(B, h, w, seed=0):
    """The true coordinates (B, h/2 * w/2 * 16, 2) of tokens, stride 4, when one 16-px unit of every 2x2 is kept."""
    draw = torch.Generator().manual_seed(seed)
    cell = torch.stack(torch.meshgrid(torch.arange(h // 2), torch.arange(w // 2), indexing="ij"), dim=2)
    unit = 2 * cell + torch.randint(2, (B, h // 2, w // 2, 2), generator=draw)  # (B, h/2, w/2, 2)
    within = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij"), dim=2)  # (4, 4, 2)
    coords = 4 * unit[:, :, None, :, None] + within[:, None]  # (B, h/2, 4, w/2, 4, 2)
    return coords.reshape(B, -1, 2)


def test_window_attention_by_definition():
    """Every pair of tokens by itself: shifted windows with padding, true coordinates of a compact map."""
    h, w, window = 6, 8, 4
    encoder = models.Swin("swin", (64, 64), 4, 3, 8, (2, 1, 1, 1), (2, 2, 2, 2), 8, window=window, bias="continuous")
    attention = encoder.layers[0]["blocks"][1].attn
    nn_init(attention)
    coords = random_units(2, 4, 4)[:, torch.arange(64).view(8, 8)[:h].flatten()]
    x = torch.randn(2, h * w, 8)
    found = attention(x, *encoder.context(0, (h, w), coords, 1, x.device))
    q, k, v = attention.qkv(x).view(2, h * w, 3, 2, 4).unbind(2)  # each (B, N, heads, d)
    row, column = torch.arange(h * w) // w, torch.arange(h * w) % w
    padded = 8  # rows
    part = torch.stack([(row - 2) % padded // window, (column - 2) % w // window, row < 2, column < 2], dim=1)
    allowed = (part[:, None] == part[None]).all(dim=2)  # same window after the roll, and not brought there by it
    offset = (coords[:, None] - coords[:, :, None]).float()  # (B, query, key, 2)
    bias = attention.posmlp(offset.sign() * offset.abs().log1p())  # (B, N, N, heads)
    logits = torch.einsum("bihd,bjhd->bijh", q, k) / 2 + bias
    weight = logits.masked_fill(~allowed[None, ..., None], -torch.inf).softmax(dim=2)
    expected = attention.proj(torch.einsum("bijh,bjhd->bihd", weight, v).flatten(2))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grid,reduction,pooled", [((12, 12), 8, (2, 2)), ((3, 5), 2, (2, 3)), ((4, 6), 2, (2, 3))])
def test_pooled_keys_are_means_of_their_part_of_the_map(grid, reduction, pooled):
    """What is left at the right and at the bottom of a map is a part, too."""
    attention = layers.PooledAttention(8, 2, reduction)
    nn_init(attention)
    x = torch.randn(2, grid[0] * grid[1], 8)
    image, means = x.view(2, *grid, 8), []
    for i in range(pooled[0]):
        for j in range(pooled[1]):
            rows, columns = slice(i * reduction, (i + 1) * reduction), slice(j * reduction, (j + 1) * reduction)
            means.append(image[:, rows, columns].mean(dim=(1, 2)))
    expected = attention.norm(attention.sr(torch.stack(means, dim=1)))
    torch.testing.assert_close(attention.reduce(x, grid), expected, rtol=1e-4, atol=1e-5)


def nn_init(module):
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)


def make(name, img_size=(64, 64), in_chans=3, **options):
    """A small encoder of every kind."""
    torch.manual_seed(0)
    kinds = {"table": ("swin_tiny", {"window": 4}), "continuous": ("swin_tiny", {"window": 4, "bias": "continuous"}),
             "pvt": ("pvt_tiny", {"reduction": (4, 2, 1, 1)}),
             "shared": ("vit_tiny", {"positions": "shared_bias", "layer_scale": 0.1}),
             "block": ("vit_tiny", {"positions": "block_bias", "layer_scale": 0.1})}
    model, defaults = kinds[name]
    return models.build(model, img_size, in_chans=in_chans, **{**defaults, **options})


PYRAMIDS, ALL = ("table", "continuous", "pvt"), ("table", "continuous", "pvt", "shared", "block")


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(("img_size", "in_chans"), [((64, 64), 1), ((48, 80), 4)])
def test_sizes_and_gradients(name, img_size, in_chans):
    """Non-square images, odd maps (12x20, 6x10, 3x5, 2x3) and other channels; every parameter gets a gradient."""
    encoder = make(name, img_size, in_chans)
    latent = encoder(torch.randn(2, in_chans, *img_size))
    h, w = (-(-n // encoder.out_stride) for n in img_size)
    assert latent.shape == (2, encoder.num_prefix + h * w, encoder.width)
    (latent * torch.randn(latent.shape)).sum().backward()
    for key, parameter in encoder.named_parameters():
        if not key.endswith("posmlp.2.bias"):  # one number for all logits: softmax does not see it
            assert parameter.grad is not None and parameter.grad.norm() > 0, key
    assert all(0 <= encoder.layer_id(key) <= encoder.num_layers + 1 for key, _ in encoder.named_parameters())
    assert not [key for key in encoder.state_dict() if "mask" in key or "index" in key]


@pytest.mark.parametrize("name", ALL)
def test_round_trip(name, tmp_path, capsys):
    """encoder.pt to an encoder made from its arch: the same features. Stochastic depth, checkpointing."""
    encoder = make(name).eval()
    checkpoint.write(tmp_path / "encoder.pt", {"arch": encoder.arch, "model": encoder.state_dict()})
    saved = read_encoder(tmp_path / "encoder.pt")
    arch = saved["arch"]
    again = models.build(arch["model"], arch["img_size"], arch["patch_size"], arch["in_chans"], drop_path=0.5,
                         **arch["options"])
    weights.load_encoder(again, saved, "encoder.pt")
    imgs = torch.randn(2, 3, 64, 64)
    assert torch.equal(encoder(imgs), again(imgs))
    noise = torch.rand(2, 2 * again.num_layers)
    dropped = again.encode(again.embed(imgs), noise=noise)
    assert not torch.allclose(dropped, again(imgs))
    again.checkpointing = True
    torch.testing.assert_close(again.encode(again.embed(imgs), noise=noise), dropped)


@pytest.mark.parametrize("name", ALL)
def test_coordinates(name):
    """No coordinates means those of the map; other coordinates are another input, except to a table of biases."""
    encoder = make(name).eval()
    for key, parameter in encoder.named_parameters():
        if "bias_table" in key or "posmlp" in key:
            torch.nn.init.normal_(parameter)
    h, w = encoder.grid
    tokens, own = torch.randn(2, h * w, encoder.embed_width), layers.raster((h, w)).expand(2, -1, -1)
    torch.testing.assert_close(encoder.encode(tokens, own), encoder.encode(tokens), rtol=1e-4, atol=1e-4)
    if name in PYRAMIDS:
        part, grid, true = tokens[:, : h * w // 4], (h // 2, w // 2), random_units(2, 4, 4)
        torch.testing.assert_close(encoder.encode(part, layers.raster(grid).expand(2, -1, -1), grid),
                                   encoder.encode(part, grid=grid), rtol=1e-4, atol=1e-4)
    else:
        part, grid, true = tokens[:, :9], None, own[:, torch.tensor([3, 1, 4, 15, 9, 2, 6, 5, 8])]
    latent = encoder.encode(part, true, grid)
    torch.testing.assert_close(latent[1:], encoder.encode(part[1:], true[1:], grid), rtol=1e-4, atol=1e-4)
    here = encoder.encode(part, own[:, : part.shape[1]] if grid is None else None, grid)
    assert torch.allclose(latent, here, atol=1e-4) == (name == "table")


@pytest.mark.parametrize("name", ALL)
def test_low_precision_and_maps(name):
    encoder = make(name).eval()
    imgs = torch.randn(2, 3, 64, 64)
    plain = encoder(imgs)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(encoder(imgs).float(), plain, rtol=0.1, atol=0.15)
    explicit, attention, _ = maps_of(encoder, imgs)
    torch.testing.assert_close(explicit, plain, rtol=1e-4, atol=1e-4)
    assert len(attention) == sum(isinstance(m, layers.Attention) for m in encoder.modules())
    for maps in attention.values():
        torch.testing.assert_close(maps.sum(dim=4), torch.ones(maps.shape[:4]))


def test_other_windows(capsys):
    """Bias tables and positions travel to another image size and window, with a line that says so."""
    pairs = [(make("table"), make("table", (96, 128), window=6)), (make("shared"), make("block", (96, 128))),
             (make("pvt"), make("pvt", (96, 128), reduction=(8, 4, 2, 1), learn_positions=True)),
             (make("continuous"), make("continuous", (96, 128), window=8))]
    for old, new in pairs:
        weights.load_encoder(new, {"arch": old.arch, "model": old.state_dict()}, "encoder.pt")
    said = capsys.readouterr().out
    assert "4x4 to 6x6" in said and "copied to every block" in said and "positions resized from 16x16 to 24x32" in said
    with pytest.raises(ValueError, match="bias table, not continuous"):
        old, new = make("table"), make("continuous")
        weights.load_encoder(new, {"arch": old.arch, "model": old.state_dict()}, "encoder.pt")


def test_resizing_bias_tables():
    table = torch.randn(11 * 11 + 3, 2)
    assert torch.allclose(weights.resize_bias_table(table, (6, 6), (6, 6)), table, atol=1e-6)
    cut = weights.resize_bias_table(table, (6, 6), (4, 5))
    expected = table[:121].view(11, 11, 2)[2:9, 1:10].reshape(-1, 2)
    assert torch.allclose(cut, torch.cat([expected, table[121:]]), atol=1e-5)
    grown = weights.resize_bias_table(table[:121], (6, 6), (7, 7)).view(13, 13, 2)
    for here, there in ((0, 0), (6, 5), (12, 10)):  # the ends, the middle
        assert torch.allclose(grown[here, here], table[:121].view(11, 11, 2)[there, there], atol=1e-5)
    places = weights.geometric_places(5, 6)
    smooth = (places[:, None] ** 3 - places[:, None] * places[None] ** 2).view(-1, 1)
    row = torch.arange(-6, 7, dtype=torch.float64)
    exact = (row[:, None] ** 3 - row[:, None] * row[None] ** 2).view(-1, 1)  # a spline through a cubic is the cubic
    assert torch.allclose(weights.resize_bias_table(smooth, (6, 6), (7, 7)), exact, atol=1e-6)
    assert weights.resize_bias_table(table, (6, 6), (7, 7), "bicubic").shape == (13 * 13 + 3, 2)
    with pytest.raises(ValueError, match="nearest"):
        weights.resize_bias_table(table, (6, 6), (7, 7), "nearest")


@pytest.mark.parametrize(("arguments", "said"), [
    (("swin_t", (224, 224), 16), "patch_size of swin_t must be 4"), (("swin_t", (226, 224)), "does not divide"),
    (("pvt_s", (224, 224), 8), "patch_size of pvt_s must be 4"), (("swin_x", (224, 224)), "there are vit_tiny")])
def test_refusals(arguments, said):
    with pytest.raises(ValueError, match=said) as error:
        models.build(*arguments)
    assert "\n" not in str(error.value)


def test_wrong_tokens_are_refused():
    encoder = make("continuous")
    with pytest.raises(ValueError, match="do not fill a map"):
        encoder(torch.randn(1, 3, 32, 64))
    with pytest.raises(ValueError, match="3 channels"):
        encoder.embed(torch.randn(1, 1, 64, 64))


@pytest.mark.parametrize(("arguments", "options", "parameters"), [
    (("swin_t", (224, 224)), {"window": 7}, 27_519_354), (("swin_b", (224, 224)), {"window": 14}, 86_917_944),
    (("swin_t", (256, 256)), {"window": 8, "bias": "continuous"}, 27_499_050),
    (("swin_l", (256, 256)), {"window": 8, "bias": "continuous"}, 194_936_052),
    (("pvt_s", (256, 256)), {"reduction": (4, 2, 1, 1)}, 20_771_584)])
def test_parameter_counts(arguments, options, parameters):
    """Those of the published models, without a head."""
    with torch.device("meta"):
        encoder = models.build(*arguments, **options)
    assert sum(p.numel() for p in encoder.parameters()) == parameters
