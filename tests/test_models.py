"""models.py: encoders that are built whole or in part, from a name, from the arch of a file, from a file."""

import functools

import pytest
import torch
from conftest import equal
from encoders import read_encoder
from torch._subclasses.fake_tensor import FakeTensorMode

import models
from common import checkpoint, layers

KINDS = {"vit": ("vit_tiny", {"patch_size": 8}),
         "shared": ("vit_tiny", {"patch_size": 8, "positions": "shared_bias", "layer_scale": 0.1}),
         "table": ("swin_tiny", {"window": 4}), "continuous": ("swin_tiny", {"window": 4, "bias": "continuous"}),
         "pvt": ("pvt_tiny", {}), "pvtv2": ("pvtv2_tiny", {})}
PYRAMIDS = ("table", "continuous", "pvt", "pvtv2")


def build(kind, seed=0, **options):
    """A small encoder whose biases and norms matter, too."""
    torch.manual_seed(seed)
    model, own = KINDS[kind]
    encoder = models.build(model, (64, 64), **{**own, **options})
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return encoder.eval()


def saved_of(encoder):
    return {"arch": encoder.arch, "model": encoder.state_dict(), "method": "MAE", "step": 1}


@pytest.mark.parametrize("changes", [{}, {"final_norm": False}, {"drop_layers": 1}], ids=repr)
@pytest.mark.parametrize("kind", KINDS)
def test_an_encoder_of_a_file_is_the_one_that_was_saved(kind, changes, tmp_path):
    encoder, imgs = build(kind, **changes), torch.randn(2, 3, 64, 64)
    checkpoint.write(tmp_path / "encoder.pt", saved_of(encoder))
    loaded = models.load(tmp_path / "encoder.pt")
    assert not loaded.training and loaded.arch == encoder.arch and torch.equal(loaded(imgs), encoder(imgs))
    again = models.from_arch(read_encoder(tmp_path / "encoder.pt")["arch"], **changes)
    assert list(again.state_dict()) == list(encoder.state_dict()) and again.arch == encoder.arch
    wide = models.from_arch(encoder.arch, img_size=(64, 128))
    assert wide.grid == (encoder.grid[0], 2 * encoder.grid[1]) and wide.arch["options"] == encoder.arch["options"]


@pytest.mark.parametrize("kind", ["vit", "table", "pvtv2"])
def test_a_file_that_keeps_its_dropped_layers_elsewhere_still_loads(kind, tmp_path):
    """As it was written before they were an option."""
    encoder, imgs = build(kind, drop_layers=1), torch.randn(2, 3, 64, 64)
    options = {name: value for name, value in encoder.arch["options"].items() if name != "drop_layers"}
    old = {**saved_of(encoder), "arch": {**encoder.arch, "options": options, "drop_layers": 1}}
    checkpoint.write(tmp_path / "encoder.pt", old)
    assert torch.equal(models.load(tmp_path / "encoder.pt")(imgs), encoder(imgs))
    assert read_encoder(tmp_path / "encoder.pt")["arch"] == encoder.arch


@pytest.mark.parametrize("content", [[1], {"model": {}}, {"arch": {}, "optimizer": {}}], ids=["list", "model", "arch"])
def test_what_is_no_encoder_is_not_loaded(content, tmp_path):
    checkpoint.write(tmp_path / "encoder.pt", content)
    with pytest.raises(ValueError, match=r"not an encoder\.pt"):
        models.load(tmp_path / "encoder.pt")
    with pytest.raises(FileNotFoundError):
        models.load(tmp_path / "nothing.pt")


@pytest.mark.parametrize("kind", KINDS)
def test_without_its_last_norm_an_encoder_gives_what_that_norm_would_get(kind):
    whole, bare, imgs = build(kind), build(kind, final_norm=False), torch.randn(2, 3, 64, 64)
    tensors = {name: tensor for name, tensor in whole.state_dict().items() if not name.startswith("norm.")}
    assert list(bare.state_dict()) == list(tensors) and isinstance(bare.norm, torch.nn.Identity)
    bare.load_state_dict(tensors)
    assert torch.equal(whole.norm(bare(imgs)), whole(imgs))
    assert bare.arch == whole.arch  # a file tells by its tensors


@pytest.mark.parametrize("kind", KINDS)
def test_dropped_layers_are_the_last_ones(kind):
    """Of a pyramid those of the third stage, and with them the fourth; what remains computes what it did."""
    whole, cut, imgs = build(kind), build(kind, drop_layers=1, drop_path=0.5), torch.randn(2, 3, 64, 64)
    rates = [block.drop_path_rate for block in cut.modules() if isinstance(block, layers.Block)]
    last = 4 if kind in PYRAMIDS else 3  # of the whole one, which has five blocks, or four
    assert rates == pytest.approx([0.5 * i / last for i in range(3)])
    names = cut.state_dict().keys()
    cut.load_state_dict({**cut.state_dict(), **{name: tensor for name, tensor in whole.state_dict().items()
                                                if name in names and not name.startswith("norm.")}})
    assert cut.num_layers == 3 and cut.arch["options"]["drop_layers"] == 1 and cut.arch["depth"] == whole.arch["depth"]
    layer_ids = {cut.layer_id(name) for name, _ in cut.named_parameters()}
    assert layer_ids - {0, 4} == {1, 2, 3} and cut.layer_id("norm.weight") == 4
    if kind in PYRAMIDS:
        assert (cut.width, cut.out_stride, len(cut.maps(imgs))) == (128, 16, 3)
        del whole.get_submodule(whole.list_name)[2]["blocks"][1:]
        expected = whole.run_stages(whole.embed(imgs))[2][0]
        assert not any(".3." in name.partition("blocks")[0] for name in names) and "norm.weight" in names
    else:
        assert (cut.width, cut.out_stride) == (whole.width, whole.out_stride)
        del whole.blocks[3:]
        whole.norm = torch.nn.Identity()
        expected = whole(imgs)
    assert torch.equal(cut(imgs), cut.norm(expected))


@pytest.mark.parametrize("count", [-1, 4, "two", 1.5, [1]], ids=repr)
def test_so_many_layers_cannot_be_dropped(count):
    with pytest.raises(ValueError, match=r"--drop_layers .* has 4 blocks"):
        models.build("vit_tiny", (64, 64), 8, drop_layers=count)
    with pytest.raises(ValueError, match=r"--drop_layers .* has 2 blocks"):
        models.build("swin_tiny", (64, 64), drop_layers=count)
    with pytest.raises(ValueError, match="takes no --drop_layers"):
        models.build("torchvision:resnet18", (64, 64), drop_layers=1)


@pytest.mark.parametrize(("kind", "half", "full"), [
    ("continuous", {"window": 4}, {"window": 8}), ("continuous", {"window": 1}, {"window": 1}),
    ("pvt", {"reduction": (4, 2, 1, 1)}, {"reduction": (8, 4, 2, 1)})], ids=str)
def test_a_compact_map_has_windows_and_pooling_of_half_the_side(kind, half, full):
    """As an encoder that is built with these; but what it says of itself is for full images."""
    one, two = build(kind, **half), build(kind, **full, compact=2)
    tokens, coords = torch.randn(2, 64, one.embed_width), 2 * layers.raster((8, 8)).expand(2, -1, -1)
    assert torch.equal(one.encode(tokens, coords, (8, 8)), two.encode(tokens, coords, (8, 8)))
    assert two.arch == build(kind, **full).arch and "compact" not in two.arch["options"]
    assert equal(dict(two.state_dict()), dict(build(kind, **full).state_dict()))  # no weight depends on it


def test_on_a_full_map_an_encoder_for_compact_ones_is_the_one_in_its_file():
    """Whole images, as a probe during training sees them: windows and pooling are those of the file."""
    for kind, options in (("continuous", {"window": 8}), ("pvt", {"reduction": (8, 4, 2, 1)})):
        encoder, imgs = build(kind, **options, compact=2), torch.randn(2, 3, 64, 64)
        assert torch.equal(encoder(imgs), build(kind, **options)(imgs))
        coords = layers.raster(encoder.grid)  # told or not
        assert torch.equal(encoder.encode(encoder.embed(imgs), coords, encoder.grid), encoder(imgs))


@pytest.mark.parametrize(("positions", "std", "largest"), [("shared_bias", 0.0108, 0.02), ("block_bias", 0.02, 0.2)])
def test_the_first_weights_of_simmim_s_vit(positions, std, largest):
    """As in tests/golden/simmim_vit.npz, of pre-training: what is cut at one of its standard deviations keeps 0.54."""
    torch.manual_seed(0)
    encoder = models.build("vit_s", (64, 64), 16, positions=positions)
    for name in ("patch_embed.proj", "blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.3.mlp.fc1", "blocks.3.mlp.fc2"):
        weight, bias = encoder.get_submodule(name).weight, encoder.get_submodule(name).bias
        scale = (2 * (int(name.split(".")[1]) + 1)) ** 0.5 if name.endswith(("attn.proj", "fc2")) else 1
        assert weight.std().item() * scale == pytest.approx(std, rel=0.02), name
        assert std < weight.abs().max() * scale <= largest and not bias.any()
    assert 0 < encoder.cls_token.abs().max() <= largest


@pytest.mark.parametrize("size", [(62, 64), (64, 63), (61, 61)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_sides_that_do_not_fit_are_refused(kind, size):
    with pytest.raises(ValueError, match=f"sides divisible by {4 if kind in PYRAMIDS else 8}; got 3 x {size[0]} x"):
        build(kind).embed(torch.zeros(1, 3, *size))


@pytest.mark.parametrize("kind", KINDS)
def test_what_one_mode_computed_does_not_come_back_in_another(kind):
    """Sizes were seen under fake tensors, on meta and in inference mode; then training gets tensors of its own."""
    imgs = torch.randn(2, 3, 64, 64)
    with FakeTensorMode(allow_non_fake_inputs=True):
        build(kind)(torch.zeros(2, 3, 64, 64)).sum().backward()
    with torch.device("meta"):
        models.build(KINDS[kind][0], (64, 64), **KINDS[kind][1])(torch.zeros(2, 3, 64, 64))
    encoder = build(kind)
    with torch.inference_mode():
        expected = encoder(imgs)
    latent = encoder(imgs)
    latent.sum().backward()
    assert type(latent) is torch.Tensor
    torch.testing.assert_close(latent.detach(), expected, rtol=1e-4, atol=1e-4)  # a fused kernel may differ


# ---------------------------------------- Stochastic depth

def sums(monkeypatch, encoder, imgs, noise, skips):
    """(latent, gradient of every parameter, numbers of images that branches saw): with or without skipping."""
    seen = []

    def noted(block, branch, x, *context):
        seen.append(len(x))
        return branch(block, x, *context)

    with monkeypatch.context() as patch:
        if not skips:
            patch.setattr(layers, "can_skip", lambda noise: False)
        for name in ("attention_branch", "mlp_branch"):
            patch.setattr(layers.Block, name, functools.partialmethod(noted, getattr(layers.Block, name)))
        encoder.zero_grad()
        latent = encoder.encode(encoder.embed(imgs), noise=noise)
        latent.square().sum().backward()
    return latent, {name: p.grad for name, p in encoder.named_parameters()}, seen


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_dropped_branches_are_not_computed(kind, checkpointing, dtype, monkeypatch):
    """The same latent, and the same gradients, from as many samples as noise leaves."""
    encoder, imgs = build(kind, drop_path=0.8).train(), torch.randn(5, 3, 64, 64)
    encoder.checkpointing = checkpointing
    noise = torch.rand(5, 2 * encoder.num_layers, generator=torch.Generator().manual_seed(1))
    rates = [block.drop_path_rate for block in encoder.modules() if isinstance(block, layers.Block)]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bf16"):
        latent, grads, seen = sums(monkeypatch, encoder, imgs, noise, skips=True)
        expected, expected_grads, all_seen = sums(monkeypatch, encoder, imgs, noise, skips=False)
    left = [int((noise[:, i] >= rates[i // 2]).sum()) for i in range(noise.shape[1])]
    assert min(left) < 5 and seen[: len(left)] == [max(1, n) for n in left] and set(all_seen) == {5}
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == "fp32" else {"rtol": 0.1, "atol": 0.1}
    torch.testing.assert_close(latent, expected, **tolerance)
    if dtype == "fp32":
        torch.testing.assert_close(grads, expected_grads, rtol=1e-3, atol=1e-3)


def test_parameters_of_a_branch_that_all_drop_have_a_gradient_of_zero(monkeypatch):
    """Or another process would wait for it; and Adam would skip its step, as it does not where one is kept."""
    encoder, imgs = build("vit", drop_path=0.9).train(), torch.randn(2, 3, 64, 64)
    noise = torch.ones(2, 8)
    noise[:, 6] = 0.0
    latent, grads, seen = sums(monkeypatch, encoder, imgs, noise, skips=True)
    expected, expected_grads, _ = sums(monkeypatch, encoder, imgs, noise, skips=False)
    assert seen == [2] * 6 + [1, 2]
    torch.testing.assert_close(latent, expected)
    of_branch = [name for name in grads if name.startswith(("blocks.3.attn", "blocks.3.norm1"))]
    assert len(of_branch) == 6 and all(grads[name].abs().max() == 0 for name in of_branch)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["vit", "continuous"])
def test_stochastic_depth_refuses_coords_that_differ(kind):
    """A branch of some samples would meet the places of others."""
    encoder = build(kind, drop_path=0.5)
    coords = layers.raster(encoder.grid)  # (1, N, 2)
    tokens, noise = encoder.embed(torch.randn(2, 3, 64, 64)), torch.rand(2, 2 * encoder.num_layers)
    shared = encoder.encode(tokens, coords, noise=noise)
    torch.testing.assert_close(shared, encoder.encode(tokens, noise=noise), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="coords"):
        encoder.encode(tokens, coords.expand(2, -1, -1), noise=noise)
