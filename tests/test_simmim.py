"""simmim.py: what is hidden, what the loss sees, the 47 x 47 target, and that any backbone will do."""

import math

import numpy as np
import pytest
import torch
from conftest import ROOT, batch, dimmed, equal, flags, gradients, log_of

import finetune
import simmim
from common import checkpoint, layers, transforms

KINDS = {"swin": {"model": "swin_tiny", "window": 4}, "continuous": {"model": "swin_tiny", "bias": "continuous"},
         "pvt": {"model": "pvt_tiny"}, "vit": {"model": "vit_tiny", "patch_size": 16},
         "absolute": {"model": "vit_tiny", "patch_size": 8, "positions": "absolute"}}


def config(kind="swin", **options):
    return simmim.Config(**{**KINDS[kind], "mask_unit": 16, "img_size": (64, 64), **options})


def build(kind="swin", seed=0, **options):
    torch.manual_seed(seed)
    cfg = config(kind, **options)
    cfg.check()
    return simmim.SimMIM(cfg)


def predict(model, imgs, noise):
    return model.decode(model.encode(imgs, model.mask(noise[:, : model.num_units])))


def hidden_pixels(model, noise):
    """(B, 1, H, W) bool, by hand."""
    mask, side = model.mask(noise[:, : model.num_units]), model.cfg.mask_unit
    h, w = (n // side for n in model.cfg.img_size)
    return torch.kron(mask.view(-1, 1, h, w).float(), torch.ones(side, side)).bool()


# Masks


def test_the_ceiling_of_the_units_is_hidden():
    """ceil(U ratio), of the ratio that was typed: 10 * 0.3 is 3.000...4 in floating point."""
    for U in (1, 4, 9, 10, 16, 25, 36, 49, 64, 100, 144, 196):
        model = build("absolute", img_size=(16, 16 * U))
        for percent in range(0, 100, 5):
            model.cfg.mask_ratio = float(f"{percent / 100:.2f}")
            mask = model.mask(torch.rand(2, U))
            assert mask.dtype == torch.bool and mask.sum(dim=1).tolist() == [-(-U * percent // 100)] * 2, (U, percent)
    model = build("absolute", img_size=(128, 128))
    noise = torch.rand(20, 64)
    for each, row in zip(model.mask(noise), noise, strict=True):
        assert row[each].min() > row[~each].max()  # those with the highest noise
    assert model.mask(torch.zeros(2, 64)).tolist() == [[False] * 25 + [True] * 39] * 2  # of equal noise, the last
    for size, count in ((192, 22), (224, 30)):  # the paper's two
        model = build("vit", img_size=(size, size), mask_unit=32)
        assert model.mask(torch.rand(2, model.num_units)).sum(dim=1).tolist() == [count] * 2


def test_units_do_not_depend_on_patches_or_backbone():
    models = [build("vit", patch_size=p, img_size=(64, 96)) for p in (4, 8, 16)]
    models += [build(kind, img_size=(64, 96)) for kind in ("swin", "pvt")]
    noise = torch.rand(20, 24)
    before, reference = noise.clone(), models[0].mask(noise)
    for model in models:
        assert model.grid == (4, 6) and torch.equal(model.mask(noise), reference)
        assert torch.equal(torch.cat([model.mask(row) for row in noise.split(1)]), reference)  # whoever else is there
        tokens = layers.expand_mask(reference, model.grid, 16 // model.encoder.stride)
        assert tokens.shape[1:] == model.encoder.grid
        pixels = torch.kron(tokens.float(), torch.ones(model.encoder.stride, model.encoder.stride)).bool()
        assert torch.equal(pixels, layers.expand_mask(reference, model.grid, 16))
    assert torch.equal(noise, before) and len({tuple(row.tolist()) for row in reference}) == 20
    assert (models[0].mask(torch.rand(4000, 24)).float().mean(dim=0) - 15 / 24).abs().max() < 0.046  # 6 deviations


# What enters the encoder, and what the loss


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_pixels_are_in_the_loss_and_nowhere_else(kind):
    """No prediction depends on a hidden pixel, no loss on a visible one."""
    model = build(kind, img_size=(64, 96))
    imgs, noise = batch(model)
    hidden, mask = hidden_pixels(model, noise), model.mask(noise[:, : model.num_units])
    with torch.no_grad():
        pred, target = predict(model, imgs, noise), model.target(imgs)
        other = torch.where(hidden, torch.randn_like(imgs), imgs)
        assert torch.equal(predict(model, other, noise), pred)
        assert model.loss(pred, model.target(other), mask) != model.loss(pred, target, mask)
        other = torch.where(hidden, imgs, torch.randn_like(imgs))
        assert not torch.equal(predict(model, other, noise), pred)
        assert torch.equal(model.loss(pred, model.target(other), mask), model.loss(pred, target, mask))
        painted = torch.where(hidden, pred, 1e6)
        assert torch.equal(model.loss(painted, target, mask), model.loss(pred, target, mask))


@pytest.mark.parametrize("target", ["pixels", "window_pixels"])
def test_the_loss_by_hand(target):
    model = build(target=target, in_chans=4)
    imgs, noise = batch(model)
    hidden, to_paint = hidden_pixels(model, noise).expand_as(imgs), model.target(imgs)
    errors = (predict(model, imgs, noise) - to_paint).abs()
    torch.testing.assert_close(model(imgs, noise), errors[hidden].mean())
    flat = to_paint.unflatten(3, (4, 16)).unflatten(2, (4, 16)).mean(dim=(3, 5), keepdim=True)
    flat = flat.expand(-1, -1, -1, 16, -1, 16).reshape(imgs.shape)
    by_hand = {"zero": to_paint[hidden].abs().mean().item(), "unit mean": (flat - to_paint)[hidden].abs().mean().item()}
    assert simmim.prepare(model, imgs, noise) == pytest.approx(by_hand, abs=1e-4)


def test_nothing_hidden_is_loss_0():
    model = build(mask_ratio=0.0)
    loss = model(*batch(model))
    loss.backward()
    assert loss.item() == 0 and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("shape", [(2, 3, 64, 96), (1, 1, 32, 32), (1, 4, 96, 48)], ids=str)
def test_the_47_x_47_target(shape):
    """Against its definition, pixel by pixel in double precision: borders use what lies inside the image."""
    imgs = torch.randn(shape) * 2 + 5
    found, pixels, r = simmim.window_normalise(imgs).numpy(), imgs.double().numpy(), 23
    for b, c, i, j in np.ndindex(*shape):
        if (i + 3 * j) % 11 and (i, j) not in ((0, 0), (0, shape[3] - 1), (shape[2] - 1, 0)):
            continue  # every eleventh, and corners
        window = pixels[b, c, max(0, i - r) : i + r + 1, max(0, j - r) : j + r + 1]
        expected = (pixels[b, c, i, j] - window.mean()) / math.sqrt(window.var(ddof=1) + 1e-6)
        assert found[b, c, i, j] == pytest.approx(expected, rel=1e-3, abs=1e-3), (b, c, i, j)
    flat = simmim.window_normalise(torch.full((1, 3, 64, 64), 2.0))
    assert flat.isfinite().all() and flat.abs().max() < 0.1


# Sizes, gradients, precision


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size,C", [((64, 64), 3), ((64, 96), 1), ((96, 32), 4)], ids=["64x64x3", "64x96x1", "96x32x4"])
def test_every_trainable_parameter_gets_a_gradient(kind, size, C):
    model = build(kind, img_size=size, in_chans=C)
    imgs, noise = batch(model)
    assert predict(model, imgs, noise).shape == model.target(imgs).shape == imgs.shape
    loss = model(imgs, noise)
    loss.backward()
    assert loss.shape == () and loss.dtype == torch.float32 and loss.isfinite()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        if not name.endswith("posmlp.2.bias"):  # one number for all logits: softmax does not see it
            assert parameter.grad.abs().sum() > 0, name


def test_the_mask_token_of_a_vit_is_cut_as_its_weights_are():
    """Among 96 numbers with a std of 0.02, about 30 are larger."""
    assert build("vit").mask_token.abs().max() <= 0.02 < build("swin").mask_token.abs().max()
    assert build("vit", positions="absolute").mask_token.abs().max() > 0.02


@pytest.mark.parametrize("kind,options,said", [
    ("swin", {"img_size": (64, 72)}, "64x72 must be divisible by --mask_unit 16 and by 32, .* as 64x96 is"),
    ("swin", {"mask_unit": 18, "img_size": (576, 576)}, "by 4, the patches of"),
    ("vit", {"mask_unit": 8}, "by 16, the patches of"),
    ("vit", {"mask_unit": 0}, "--mask_unit must be 1 or more, not 0"),
    ("vit", {"img_size": (64, 72)}, "72"),
    ("swin", {"mask_ratio": 1.0}, "--mask_ratio"), ("swin", {"target": "hog"}, "--target"),
    ("swin", {"window": 0}, "--window"), ("swin", {"bias": "none"}, "--bias"),
    ("vit", {"positions": "x"}, "--positions")])
def test_what_does_not_fit_is_refused_with_what_would(kind, options, said):
    with pytest.raises(ValueError, match=said) as error:
        build(kind, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_activation_checkpointing_changes_nothing(kind):
    plain, thrifty = (build(kind, activation_checkpointing=on, drop_path=0.3) for on in (False, True))
    assert equal(gradients(plain, *batch(plain)), gradients(thrifty, *batch(plain)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_latent_has_a_token_for_every_square(kind):
    """Of a ViT, too, whose class token is none."""
    model = build(kind)
    imgs, noise = batch(model)
    stride = model.encoder.out_stride
    squares = (imgs.shape[2] // stride) * (imgs.shape[3] // stride)
    latent = model.encode(imgs, model.mask(noise[:, : model.num_units]))
    assert latent.shape == (len(imgs), squares, model.encoder.width)
    assert model.decode(latent).shape == imgs.shape


def test_stochastic_depth_follows_the_noise():
    model = build("vit", drop_path=0.9)
    imgs, noise = batch(model)
    other = noise.clone()
    other[:, model.num_units :] = torch.rand(3, 2 * model.encoder.num_layers)
    assert torch.equal(model(imgs, noise), model(imgs, noise)) and model(imgs, noise) != model(imgs, other)


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_autocast_keeps_target_and_loss_in_fp32(kind):
    model = build(kind, target="window_pixels")
    imgs, noise = batch(model)
    exact = model(imgs, noise)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(imgs, noise)
        assert model.target(imgs.bfloat16()).dtype == torch.float32
    loss.backward()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact.item(), rel=0.02)
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


# Pictures


@pytest.mark.parametrize("target", ["pixels", "window_pixels"])
def test_reconstruct(target, monkeypatch):
    model = build(target=target, img_size=(64, 96))
    original = torch.randint(0, 256, (4, 3, 64, 96), dtype=torch.uint8)
    imgs, noise = transforms.normalize(original), torch.rand(4, model.num_noise)
    monkeypatch.setattr(model, "decode", lambda latent: model.target(imgs))
    rows = simmim.reconstruct(model, imgs, noise)
    kinds = [title.split("\n")[0] for title in rows]
    normalised = ["target"] * (target == "window_pixels")
    assert kinds == ["original", "masked", *normalised, "prediction", "prediction"]
    assert len([title for title in rows if "47 x 47" in title]) == 3 * len(normalised)
    exact, masked, *_, pred, pasted = rows.values()
    hidden = hidden_pixels(model, noise).expand_as(imgs)
    torch.testing.assert_close(exact, original / 255, rtol=0, atol=1e-5)
    assert torch.equal(masked[~hidden], exact[~hidden]) and torch.equal(pred[hidden], pasted[hidden])
    assert all(0 <= row.min() and row.max() <= 1 and row.shape == imgs.shape for row in rows.values())
    if not normalised:
        torch.testing.assert_close(pasted, exact, rtol=0, atol=1e-5)
        torch.testing.assert_close(pred, dimmed(imgs, hidden), rtol=0, atol=1e-5)


# Whole runs


@pytest.fixture
def run(folder, call, tmp_path):
    """`run(name, **changes)`: three steps of the tiny recipe on a few images, in OUT = tmp_path / name."""
    def words(name, script=simmim, **changes):
        recipe = ROOT / "configs" / ("simmim_tiny.yaml" if script is simmim else "finetune_tiny.yaml")
        given = {"data": folder, "batch_size": 8, "micro_batch": 4, "max_steps": 3, "log_every": 1, "device": "cpu",
                 "labels": None if script is simmim else 0, "out": tmp_path / name, **changes}
        return call(script.main, ["--config", recipe, *flags(**given)])
    return words


@pytest.mark.parametrize("kind,changes", [("swin", {"target": "window_pixels"}), ("pvt", {"model": "pvt_tiny"}),
                                          ("vit", {"model": "vit_tiny", "patch_size": 8, "drop_path": 0.2})],
                         ids=["swin", "pvt", "vit"])
def test_a_run_and_fine_tuning(kind, changes, run, tmp_path):
    """Three steps, two pictures; a stopped and resumed run ends bit-identical; micro-batches are one batch, clipped as
    one; encoder.pt trains on, at another size, too."""
    done = run("whole", clip_grad=0.05, **changes)
    assert done.code == 0 and done.err == "" and "unit mean" in done.out
    assert len(list((tmp_path / "whole" / "pictures").glob("*.png"))) == 2  # after the first and the last step
    for name, more in (("parts", {"max_steps": 1}), ("parts", {"resume": True}), ("once", {"micro_batch": 8})):
        assert run(name, clip_grad=0.05, **{**changes, **more}).code == 0
    whole, parts = (torch.load(tmp_path / name / "last.pt") for name in ("whole", "parts"))
    assert equal(whole["model"], parts["model"]) and equal(whole["optimizer"], parts["optimizer"])
    assert log_of(tmp_path / "whole")[0]["grad_norm"] > 0.05  # there is something to clip
    for one, two in zip(log_of(tmp_path / "once"), log_of(tmp_path / "whole"), strict=True):
        assert [one["loss"], one["grad_norm"]] == pytest.approx([two["loss"], two["grad_norm"]], rel=1e-5)

    init = tmp_path / "whole" / "encoder.pt"
    tuned = run("tuned", finetune, init=init, max_steps=1, head_start="random", img_size="96x64", batch_size=4)
    assert tuned.code == 0 and "loaded" in tuned.out, tuned.err
    if kind != "pvt":
        assert "bias tables resized" in tuned.out
    assert ("copied to every block" in tuned.out) == (kind == "vit")


def test_fine_tuning_simmim_s_vit_starts_with_the_shared_table_in_every_block(tmp_path):
    model = build("vit", layer_scale=0.1)
    table = model.encoder.rel_pos_bias["relative_position_bias_table"]
    torch.nn.init.normal_(table)
    checkpoint.write(tmp_path / "encoder.pt", {"arch": model.encoder.arch, "model": model.encoder.state_dict()})
    cfg, saved = finetune.resolve(finetune.Config(init=str(tmp_path / "encoder.pt"), img_size=(64, 64)))
    classifier = finetune.build_classifier(cfg, saved, ["a", "b"])
    tables = [block.attn.relative_position_bias_table for block in classifier.encoder.blocks]
    assert len({id(t) for t in tables}) == len(tables) and all(torch.equal(t, table) for t in tables)
    imgs = torch.randn(2, 3, 64, 64)
    classifier.encoder.norm = model.encoder.norm  # a fresh one stands before the head
    torch.testing.assert_close(classifier.encoder(imgs), model.encoder(imgs), rtol=1e-4, atol=1e-5)


def test_a_wrong_size_is_one_line(run, tmp_path):
    done = run("run", img_size="60x64")
    assert done.code == 2 and "must be divisible by" in done.err and done.err.count("\n") == 1
    assert not (tmp_path / "run").exists()
