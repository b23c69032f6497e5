"""PVTv2 and torchvision's models behind the one interface of all encoders."""

import pytest
import torch
from conftest import equal

import checkpoint
import engine
import layers
import mae
import models
import simmim
import um_mae
import weights


def build(model, img_size=(64, 64), in_chans=3, **options):
    torch.manual_seed(0)
    return models.build(model, img_size, in_chans=in_chans, **options).eval()


def spread_weights(module, std=0.3):
    """Other weights than the small or zero ones of an initialisation, so that everything matters."""
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=std)


# PVTv2


@pytest.mark.parametrize(("model", "parameters"), [("pvtv2_b2", 25_362_856), ("pvtv2_b5", 81_956_008)])
def test_pvtv2_has_the_published_number_of_parameters(model, parameters):
    with torch.device("meta"):
        encoder = models.build(model, (224, 224))
    assert sum(p.numel() for p in encoder.parameters()) + encoder.width * 1000 + 1000 == parameters


def test_pvtv2_speaks_the_names_of_timm():
    names = set(build("pvtv2_tiny").state_dict())
    assert {name.split(".")[0] for name in names} == {"patch_embed", "stages", "norm"}
    assert {"patch_embed.proj.weight", "patch_embed.norm.bias", "stages.0.norm.weight", "stages.1.downsample.proj.bias",
            "stages.1.downsample.norm.weight", "stages.2.blocks.1.attn.q.weight", "stages.0.blocks.0.attn.kv.bias",
            "stages.0.blocks.0.attn.sr.weight", "stages.0.blocks.0.attn.norm.weight", "stages.3.blocks.0.mlp.fc1.bias",
            "stages.3.blocks.0.mlp.dwconv.weight", "stages.3.blocks.0.norm2.weight", "norm.weight"} <= names
    assert not any("stages.3.blocks.0.attn.sr" in name or "stages.0.downsample" in name for name in names)


@pytest.mark.parametrize("grid", [(8, 8), (6, 9)])  # 6x9: zeros complete it to 8x12
def test_keys_of_pvtv2_by_definition(grid):
    """Every key, every query and every hidden channel by itself."""
    attention, (h, w), D, r = layers.ConvAttention(8, 2, 4), grid, 8, 4
    spread_weights(attention)
    x = torch.randn(2, h * w, D)
    rows, columns = -(-h // r), -(-w // r)
    padded = torch.zeros(2, rows * r, columns * r, D)
    padded[:, :h, :w] = x.view(2, h, w, D)
    keys = [torch.einsum("bijc,dcij->bd", padded[:, r * i : r * i + r, r * j : r * j + r], attention.sr.weight)
            for i in range(rows) for j in range(columns)]
    keys = attention.norm(torch.stack(keys, dim=1) + attention.sr.bias)  # (B, N', D)
    q, (k, v) = attention.q(x).view(2, -1, 2, 4), attention.kv(keys).view(2, -1, 2, 2, 4).unbind(2)
    weight = (torch.einsum("bihd,bjhd->bhij", q, k) / 2).softmax(dim=3)
    expected = attention.proj(torch.einsum("bhij,bjhd->bihd", weight, v).flatten(2))
    torch.testing.assert_close(attention(x, grid), expected, rtol=1e-4, atol=1e-4)


def test_layer_decay_of_pvtv2():
    """FastMIM: patch embedding k counts to the last block of the stage before it, norm k to that of its own stage."""
    encoder = build("pvtv2_b2")
    ids = {"patch_embed.proj.weight": 0, "stages.0.blocks.0.attn.q.weight": 1, "stages.0.blocks.2.mlp.dwconv.bias": 3,
           "stages.0.norm.weight": 3, "stages.1.downsample.proj.weight": 3, "stages.1.blocks.0.norm1.bias": 4,
           "stages.1.norm.bias": 7, "stages.2.downsample.norm.weight": 7, "stages.2.blocks.5.attn.sr.weight": 13,
           "stages.3.downsample.proj.bias": 13, "stages.3.blocks.2.mlp.fc2.bias": 16, "norm.weight": 17}
    assert {name: encoder.layer_id(name) for name in ids} == ids and encoder.num_layers == 16


def test_maps_of_pvtv2():
    encoder = build("pvtv2_tiny", (72, 96))
    imgs = torch.randn(1, 3, 72, 96)
    maps = encoder.maps(imgs)
    assert [tuple(m.shape[1:]) for m in maps] == [(32, 18, 24), (64, 9, 12), (128, 5, 6), (256, 3, 3)]
    assert torch.equal(maps[-1].flatten(2).transpose(1, 2), encoder(imgs))
    plain = encoder(imgs)
    for attention in (module for module in encoder.modules() if isinstance(module, models.Attention)):
        attention.keep_maps = True
    torch.testing.assert_close(encoder(imgs), plain, rtol=1e-4, atol=1e-4)
    assert encoder.stages[0]["blocks"][0].attn.maps.shape == (1, 1, 18 * 24, 3 * 3)


# All of them


ALL = [("pvtv2_tiny", (64, 64), 3, {}), ("pvtv2_tiny", (48, 80), 1, {}), ("pvtv2_tiny", (20, 36), 4, {})]
IDS = ["-".join([model, "x".join(map(str, size)), str(C), *map(str, options.values())])
       for model, size, C, options in ALL]


@pytest.mark.parametrize(("model", "img_size", "in_chans", "options"), ALL, ids=IDS)
def test_shapes_gradients_and_a_round_trip(model, img_size, in_chans, options, tmp_path, capsys):
    """Latent of the promised shape; every parameter gets a gradient and a layer; encoder.pt makes the same encoder."""
    encoder = build(model, img_size, in_chans, **options)
    imgs = torch.randn(2, in_chans, *img_size)
    tokens = encoder.embed(imgs)
    assert tokens.shape == (2, encoder.grid[0] * encoder.grid[1], encoder.embed_width)
    latent = encoder(imgs)
    assert torch.equal(encoder.encode(tokens), latent)
    h, w = (-(-n // encoder.out_stride) for n in img_size)
    assert latent.shape == (2, encoder.num_prefix + h * w, encoder.width)
    (latent * torch.randn(latent.shape)).sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.norm() > 0, name
    layers_of = [encoder.layer_id(name) for name, _ in encoder.named_parameters()]
    assert set(layers_of) - {encoder.num_layers + 1} == set(range(encoder.num_layers + 1))

    checkpoint.write(tmp_path / "encoder.pt", {"arch": engine.plain(encoder.arch), "model": encoder.state_dict()})
    saved = weights.read_encoder(tmp_path / "encoder.pt")
    arch = saved["arch"]
    again = models.build(arch["model"], tuple(arch["img_size"]), arch["patch_size"], arch["in_chans"], drop_path=0.5,
                         learn_positions=True, **arch["options"]).eval()
    weights.load_encoder(again, saved, "encoder.pt")
    assert equal(dict(again.state_dict()), dict(encoder.state_dict())) and torch.equal(again(imgs), latent)


def test_stochastic_depth_and_checkpointing():
    """What is dropped is a function of the given noise: whoever else is in the batch, and recomputed or not."""
    encoder = build("pvtv2_tiny", drop_path=0.9)
    imgs, noise = torch.randn(4, 3, 64, 64), torch.rand(4, 2 * encoder.num_layers)
    results = []
    for checkpointing in (False, True):
        encoder.checkpointing = checkpointing
        encoder.zero_grad()
        latent = encoder.encode(encoder.embed(imgs), noise=noise)
        latent.square().sum().backward()
        results.append((latent, [p.grad for p in encoder.parameters()]))
    torch.testing.assert_close(*results, rtol=0, atol=0)
    parts = [encoder.encode(encoder.embed(imgs[i : i + 1]), noise=noise[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(torch.cat(parts), results[0][0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(results[0][0], encoder(imgs))


REFUSED = [(simmim.SimMIM, simmim.Config(model="pvtv2_tiny"), "masks pixels"),
           (um_mae.UMMAE, um_mae.Config(model="pvtv2_tiny"), "across the borders"),
           (mae.MAE, mae.Config(model="pvtv2_tiny", patch_size=0), "cannot encode a set of patches")]


@pytest.mark.parametrize(("method", "cfg", "said"), REFUSED, ids=lambda v: getattr(v, "model", None))
def test_methods_refuse_what_would_show_hidden_pixels(method, cfg, said):
    with pytest.raises(ValueError, match=said) as error:
        method(cfg)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("model", "img_size", "said"), [("pvtv2_b2", (226, 224), "does not divide"),
                                                         ("pvtv2_b3", (224, 224), "pvtv2_b2, pvtv2_b5")])
def test_refusals(model, img_size, said):
    with pytest.raises(ValueError, match=said) as error:
        models.build(model, img_size)
    assert "\n" not in str(error.value)
