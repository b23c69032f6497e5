"""PVTv2 and torchvision's models behind the one interface of all encoders."""

import copy
import json

import pytest
import torch
import torchvision
from conftest import equal, log_of
from encoders import SMALL, make_small, read_encoder
from maps import maps_of

import finetune
import mae
import models
import simmim
import um_mae
from common import checkpoint, config, layers, optim, weights


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
    explicit, attention, _ = maps_of(encoder, imgs)
    torch.testing.assert_close(explicit, encoder(imgs), rtol=1e-4, atol=1e-4)
    assert attention[0].shape == (1, 1, 1, 18 * 24, 3 * 3)


# torchvision


HEADS = {"resnet18": lambda net, x: net.fc(x), "densenet121": lambda net, x: net.classifier(x),
         "efficientnet_b0": lambda net, x: net.classifier(x), "regnet_x_400mf": lambda net, x: net.fc(x),
         "convnext_tiny": lambda net, x: net.classifier(x[..., None, None]),
         "swin_t": lambda net, x: net.head(x), "swin_v2_t": lambda net, x: net.head(x)}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    make_small(monkeypatch)


@pytest.mark.parametrize("name", HEADS)
def test_the_latent_is_what_torchvision_classifies(name):
    encoder, net = build(f"torchvision:{name}", (64, 96)), torchvision.models.get_model(name, weights=None).eval()
    for key, tensor in net.state_dict().items():
        if "running" in key:
            tensor.uniform_(0.5, 1.5)
    theirs = net.state_dict()
    encoder.load_state_dict({key: theirs[key.removeprefix("net.")] for key in encoder.state_dict()})
    imgs = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        latent = encoder(imgs)
        assert latent.shape == (2, 6, encoder.width)
        torch.testing.assert_close(HEADS[name](net, latent.mean(dim=1)), net(imgs), rtol=1e-5, atol=1e-5)
        maps = encoder.maps(imgs)
    assert [tuple(m.shape[2:]) for m in maps] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    assert torch.equal(maps[-1].flatten(2).transpose(1, 2), latent)


def test_torchvisions_vit_with_and_without_its_positions():
    """The same at its size; another size gets resized positions, and tokens go where `coords` says."""
    encoder, net = build("torchvision:vit_b_32"), SMALL["vit_b_32"](64).eval()
    theirs = net.state_dict()
    names = {"pos_embed": "encoder.pos_embedding", "cls_token": "class_token"}
    encoder.load_state_dict({k: theirs[names.get(k, k.removeprefix("net."))] for k in encoder.state_dict()})
    torch.nn.init.normal_(net.heads.head.weight)
    imgs = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        latent = encoder(imgs)
        torch.testing.assert_close(net.heads(latent[:, 0]), net(imgs), rtol=1e-4, atol=1e-4)
        coords = torch.tensor([[[1, 0], [0, 1], [0, 0], [1, 1]]]).expand(2, -1, -1)
        tokens = encoder.embed(imgs)[:, [2, 1, 0, 3]]
        torch.testing.assert_close(encoder.encode(tokens, coords)[:, [0, 3, 2, 1, 4]], latent, rtol=1e-4, atol=1e-4)
    wide = build("torchvision:vit_b_32", (64, 96))
    weights.load_encoder(wide, {"arch": encoder.arch, "model": encoder.state_dict()}, "encoder.pt")
    assert wide.pos_embed.shape == (1, 7, 48) and wide(torch.randn(1, 3, 64, 96)).shape == (1, 7, 48)


def test_a_small_stride_keeps_the_first_part_of_a_network():
    encoder = build("torchvision:resnet50", (32, 32), max_stride=8)
    assert (encoder.out_stride, encoder.width, encoder.num_layers) == (8, 512, 7)
    assert encoder(torch.randn(1, 3, 32, 32)).shape == (1, 16, 512)
    assert {name.split(".")[1] for name in encoder.state_dict()} == {"conv1", "bn1", "layer1", "layer2"}
    encoder = build("torchvision:swin_t", (32, 48), max_stride=16)  # channels come last here
    assert (encoder.out_stride, encoder.width, encoder.patchwise) == (16, 64, True)
    assert encoder(torch.randn(1, 3, 32, 48)).shape == (1, 6, 64)


def test_layer_decay_of_torchvisions_networks():
    """By order of blocks: a block, a convolution or a merging that stands alone is a layer."""
    ids = {"resnet18": {"conv1.weight": 0, "bn1.bias": 0, "layer1.0.conv1.weight": 1, "layer1.1.bn2.weight": 2,
                        "layer2.0.downsample.0.weight": 3, "layer4.1.conv2.weight": 8},
           "swin_t": {"features.0.0.weight": 0, "features.0.2.bias": 0, "features.1.0.mlp.0.weight": 1,
                      "features.2.reduction.weight": 2, "features.3.1.norm1.weight": 4, "features.7.0.mlp.3.bias": 8,
                      "norm.weight": 9},
           "mobilenet_v3_small": {"features.0.0.weight": 0, "features.1.block.0.0.weight": 1, "features.12.1.bias": 12}}
    for name, expected in ids.items():
        encoder = build(f"torchvision:{name}")
        assert {key: encoder.layer_id("net." + key) for key in expected} == expected
        last = encoder.layer_id(list(dict(encoder.named_parameters()))[-1])
        assert last == encoder.num_layers + (name == "swin_t")


@pytest.mark.parametrize("name", ["resnet18", "swin_v2_t", "efficientnet_b0"])
def test_nothing_is_drawn_in_training(name):
    """Not even where torchvision's recipe has stochastic depth; and a copy is another network."""
    encoder = build(f"torchvision:{name}", (32, 64), drop_path=0.5).train()
    imgs, noise, state = torch.randn(3, 3, 32, 64), torch.rand(3, 2 * encoder.num_layers), torch.get_rng_state()
    latents = [encoder.encode(encoder.embed(imgs), noise=draws) for draws in (None, None, noise, noise)]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(*latents[:2]) and torch.equal(*latents[2:])
    assert torch.equal(latents[0], latents[2]) == (name == "resnet18")
    twin = copy.deepcopy(encoder)
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert torch.equal(encoder(imgs), latents[0]) and not torch.allclose(twin(imgs), latents[0])


def test_recomputing_does_not_count_a_batch_twice():
    """BatchNorm's statistics, the latent and all gradients in training, with and without."""
    results = []
    for checkpointing in (False, True):
        encoder = build("torchvision:mobilenet_v3_small", (32, 64)).train()
        encoder.checkpointing = checkpointing
        latent = encoder(torch.randn(4, 3, 32, 64, generator=torch.Generator().manual_seed(1)))
        latent.square().sum().backward()
        results.append((latent.detach(), {k: p.grad for k, p in encoder.named_parameters()}, encoder.state_dict()))
    torch.testing.assert_close(*results, rtol=0, atol=0)
    assert results[1][2]["net.features.1.block.0.1.num_batches_tracked"] == 1
    before = copy.deepcopy(encoder.state_dict())
    with torch.no_grad():  # a picture in the midst of training leaves no trace
        encoder(torch.randn(4, 3, 32, 64))
    assert equal(dict(encoder.state_dict()), dict(before))


def test_simmim_replaces_the_patches_that_torchvisions_swin_v2_embeds():
    """No prediction depends on a hidden pixel; and it learns to paint."""
    torch.manual_seed(0)
    model = simmim.SimMIM(simmim.Config(model="torchvision:swin_v2_t", img_size=(64, 64), mask_unit=16))
    assert model.encoder.grid == (16, 16) and model.encoder.embed_width == 16
    imgs, noise = torch.randn(2, 3, 64, 64), torch.rand(2, model.num_noise)
    mask = model.mask(noise[:, : model.num_units])
    hidden = layers.expand_mask(mask, model.grid, 16)[:, None]
    with torch.no_grad():
        one, two = (model.decode(model.encode(x, mask))
                    for x in (imgs, torch.where(hidden, torch.randn_like(imgs), imgs)))
        assert torch.equal(one, two)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(3):
        losses.append(model(imgs, noise))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters()) and losses[2] < losses[0]


# All of them


ALL = [("pvtv2_tiny", (64, 64), 3, {}), ("pvtv2_tiny", (48, 80), 1, {}), ("pvtv2_tiny", (20, 36), 4, {}),
       ("torchvision:resnet18", (32, 64), 1, {}), ("torchvision:convnext_tiny", (64, 32), 4, {}),
       ("torchvision:swin_v2_t", (32, 64), 1, {}), ("torchvision:mobilenet_v3_small", (24, 40), 4, {"max_stride": 8})]
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

    checkpoint.write(tmp_path / "encoder.pt", {"arch": config.to_plain(encoder.arch), "model": encoder.state_dict()})
    saved = read_encoder(tmp_path / "encoder.pt")
    arch = saved["arch"]
    again = models.build(arch["model"], tuple(arch["img_size"]), arch["patch_size"], arch["in_chans"], drop_path=0.5,
                         learn_positions=True, **arch["options"]).eval()
    weights.load_encoder(again, saved, "encoder.pt")
    assert equal(dict(again.state_dict()), dict(encoder.state_dict())) and torch.equal(again(imgs), latent)


@pytest.mark.parametrize("model", ["pvtv2_tiny", "torchvision:convnext_tiny", "torchvision:swin_v2_t"])
def test_stochastic_depth_and_checkpointing(model):
    """What is dropped is a function of the given noise: whoever else is in the batch, and recomputed or not."""
    encoder = build(model, drop_path=0.9)
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


REFUSED = [(simmim.SimMIM, simmim.Config(model="pvtv2_tiny"), "masks pixels, takes it"),
           (um_mae.UMMAE, um_mae.Config(model="pvtv2_tiny"), "across the borders"),
           (simmim.SimMIM, simmim.Config(model="torchvision:resnet18"), "masks pixels, takes it"),
           (um_mae.UMMAE, um_mae.Config(model="torchvision:swin_t"), "across the borders"),
           (mae.MAE, mae.Config(model="torchvision:swin_t", patch_size=0), "cannot encode a set of patches"),
           (mae.MAE, mae.Config(model="pvtv2_tiny", patch_size=0), "cannot encode a set of patches")]


@pytest.mark.parametrize(("method", "cfg", "said"), REFUSED, ids=lambda v: getattr(v, "model", None))
def test_methods_refuse_what_would_show_hidden_pixels(method, cfg, said):
    with pytest.raises(ValueError, match=said) as error:
        cfg.check()
        method(cfg)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("model", "img_size", "options", "said"), [
    ("pvtv2_b2", (226, 224), {}, "does not divide"), ("pvtv2_b3", (224, 224), {}, "pvtv2_b2, pvtv2_b5, .*torchvision:"),
    ("torchvision:resnet19", (64, 64), {}, "near names: resnet18"), ("torchvision:", (64, 64), {}, "near names"),
    ("torchvision:resnet18", (40, 56), {}, "40x56 must be divisible by 32, .* as 64x64 is"),
    ("torchvision:resnet18", (64, 64), {"patch_size": 16}, "must be 1, or 0"),
    ("torchvision:resnet18", (64, 64), {"in_chans": 0}, "in_chans"),
    ("torchvision:resnet18", (64, 64), {"max_stride": 1}, "squares of 1 pixels"),
    ("torchvision:alexnet", (64, 64), {}, "has no map"), ("torchvision:inception_v3", (299, 299), {}, "has no map"),
    ("torchvision:maxvit_t", (224, 448), {}, "takes squares of 224"),
    ("torchvision:swin_t", (64, 64), {"window": 7}, "takes no --window"),
    ("vit_b", (64, 64), {"window": 7}, "takes no --window")])
def test_refusals(model, img_size, options, said):
    with pytest.raises(ValueError, match=said) as error:
        models.build(model, img_size, **options)
    assert "\n" not in str(error.value)


def test_wrong_images_and_parts_of_a_map_are_refused():
    encoder = build("torchvision:resnet18", (32, 64))
    with pytest.raises(ValueError, match="expected 3 channels"):
        encoder(torch.randn(1, 1, 32, 64))
    with pytest.raises(ValueError, match="whole map"):
        encoder.encode(encoder.embed(torch.randn(1, 3, 32, 64))[:, :100])


@pytest.mark.parametrize("model", ["pvtv2_tiny", "torchvision:mobilenet_v3_small"])
@pytest.mark.parametrize("mode", ["finetune", "linear"])
def test_fine_tuning(model, mode, tuned, call, tmp_path):
    """From encoder.pt at another image size; layers learn at their own rates; evaluation says the same again."""
    encoder = build(model, (32, 32))
    checkpoint.write(tmp_path / "encoder.pt", {"arch": config.to_plain(encoder.arch), "model": encoder.state_dict()})
    words = tuned(model=None, patch_size=None, img_size=64, init=tmp_path / "encoder.pt", mode=mode, max_steps=2,
                  out=tmp_path / "run", drop_path=0.2)
    done = call(finetune.main, words)
    assert done.code == 0 and len(log_of(tmp_path / "run")) == 2, done.err
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    words = tuned(model=None, patch_size=None, img_size=None, init=tmp_path / "run" / "encoder.pt", eval=True,
                  out=tmp_path / "eval")
    assert call(finetune.main, words).code == 0
    assert json.loads((tmp_path / "eval" / "result.json").read_text())["top1"] == result["top1"]


def test_no_weight_decay_for_scales_and_what_makes_bias_tables():
    for name, exempt in (("swin_v2_t", ("logit_scale", "cpb_mlp.0.weight")), ("convnext_tiny", ("layer_scale",))):
        groups = optim.parameter_groups(build(f"torchvision:{name}"), 0.05)
        for group in groups:
            found = [name for name in group["names"] if name.endswith(exempt)]
            assert bool(found) == (group["weight_decay"] == 0)


def test_a_plan_allocates_nothing(call):
    done = call(simmim.main, ["--plan", "true", "--model", "torchvision:swin_v2_t", "--img_size", "192"])
    assert done.code == 0 and "M trained parameters" in done.out, done.out + done.err
