"""fastmim.py: what is hidden, what the loss sees, the HOG target, whole runs, and that any backbone will do."""

import math
import re
import types

import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT, batch, dimmed, equal, flags, gradients, log_of, snapshot

import fastmim
import finetune
import lut
import mae
from common import checkpoint, figures, layers, transforms, weights

KINDS = {"vit": {"model": "vit_tiny", "patch_size": 16}, "vit 4 px": {"model": "vit_tiny", "patch_size": 4},
         "swin": {"model": "swin_tiny"}, "swin 16 px": {"model": "swin_tiny", "mask_unit": 16},
         "pvt": {"model": "pvt_tiny", "target": "norm_pixels"}, "pvtv2": {"model": "pvtv2_tiny"},
         "resnet": {"model": "torchvision:resnet18"},
         "linear": {"model": "vit_tiny", "patch_size": 16, "decoder_depth": 0, "mask_unit": 32, "target": "pixels"}}


def config(kind="vit", **options):
    return fastmim.Config(**{"decoder_width": 32, "img_size": (64, 64), **KINDS[kind], **options})


def build(kind="vit", seed=0, **options):
    torch.manual_seed(seed)
    cfg = config(kind, **options)
    cfg.check()
    return fastmim.FastMIM(cfg)


def predict(model, imgs, noise):
    return model.decode(model.encode(imgs, model.mask(noise)))


def hidden_pixels(model, noise):
    """(B, 1, H, W) bool, by hand."""
    h, w = (n // model.mask_unit for n in model.cfg.img_size)
    return torch.kron(model.mask(noise).view(-1, 1, h, w).float(), torch.ones(model.mask_unit, model.mask_unit)).bool()


# The HOG target


def hog_by_hand(img, cell):
    """(C, H, W) -> (C * 9, H / cell, W / cell), one pixel after the other."""
    C, H, W = img.shape
    votes = np.zeros((C, 9, H // cell, W // cell))
    for c, i, j in np.ndindex(C, H, W):
        def at(y, x, c=c):  # reflected at the border, which is not repeated
            return float(img[c, H - 1 - abs(H - 1 - abs(y)), W - 1 - abs(W - 1 - abs(x))])
        gx = sum(weight * (at(i + k, j - 1) - at(i + k, j + 1)) for k, weight in ((-1, 1), (0, 2), (1, 1)))
        gy = sum(weight * (at(i - 1, j + k) - at(i + 1, j + k)) for k, weight in ((-1, 1), (0, 2), (1, 1)))
        angle = math.atan2(gx, gy) % math.pi
        votes[c, min(8, int(9 * angle / math.pi)), i // cell, j // cell] += math.hypot(gx, gy)
    norms = np.sqrt((votes**2).sum(axis=1, keepdims=True))
    return (votes / np.maximum(norms, 1e-12)).reshape(C * 9, H // cell, W // cell)


@pytest.mark.parametrize("shape,cell", [((3, 24, 40), 8), ((1, 21, 9), 3), ((4, 10, 25), 5), ((3, 6, 4), 2)], ids=str)
def test_hog_by_its_definition(shape, cell):
    img = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    found = fastmim.hog(img[None], cell)
    np.testing.assert_allclose(found[0], hog_by_hand(img.numpy(), cell), rtol=1e-4, atol=1e-4)
    assert found.dtype == torch.float32 and torch.equal(fastmim.hog(torch.stack([img, -img]), cell)[1], found[0])


def test_the_bins_of_hog_turn_with_the_gradient():
    """Of a flat image nothing; of one edge all in one bin, whatever its strength."""
    assert fastmim.hog(torch.full((1, 3, 16, 16), 5.0), 8).abs().max() == 0
    y, x = torch.meshgrid(torch.arange(24.0), torch.arange(24.0), indexing="ij")
    for k in range(9):
        angle = (k + 0.5) * math.pi / 9  # of the gradient, from the vertical
        ramp = x * math.sin(angle) + y * math.cos(angle)
        cells = fastmim.hog(torch.stack([ramp, -7 * ramp, ramp.flip(0)])[None], 8)[0].unflatten(0, (3, 9))[:, :, 1, 1]
        assert cells.argmax(dim=1).tolist() == [k, k, 8 - k] and torch.allclose(cells.amax(dim=1), torch.ones(3))


@pytest.mark.parametrize("target", ["hog", "norm_pixels"])
def test_targets_are_the_same_under_autocast(target):
    model = build(target=target, in_chans=4)
    imgs, _ = batch(model)
    exact = model.target(imgs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert exact.dtype == torch.float32 and torch.equal(model.target(imgs), exact)


@pytest.mark.parametrize("kind,C", [("vit", 3), ("swin", 1), ("vit 4 px", 4)])
def test_a_token_holds_its_own_cells(kind, C):
    """Channels vary slowest, then bins; cells fastest. Small tokens get small cells."""
    model = build(kind, in_chans=C, img_size=(64, 96))
    imgs, _ = batch(model)
    side = model.encoder.out_stride
    cell = {32: 8, 16: 8, 4: 2}[side]
    r, maps = side // cell, fastmim.hog(imgs, cell)
    target = model.target(imgs)
    assert model.cell == cell and target.shape == (3, 64 * 96 // side**2, 9 * C * r * r)
    for n in (0, 1, 96 // side, target.shape[1] - 1):
        i, j = n // (96 // side) * r, n % (96 // side) * r
        assert torch.equal(target[:, n], maps[:, :, i : i + r, j : j + r].flatten(1))


def test_glyphs_run_along_the_edges():
    """A vertical edge is drawn as a vertical stroke, and a weak one darker than a strong one."""
    img = torch.zeros(1, 1, 16, 16)
    img[..., 4:] = 1.0
    drawn = figures.glyphs(fastmim.hog(img, 8))[0, 0]
    stroke = drawn[:15, :15]
    assert drawn.shape == (30, 30) and stroke[:, 7].mean() > 0.8 > 0.2 > stroke[7].mean()
    assert drawn[:15, 15:].max() == 0 and 0 <= drawn.min() and drawn.max() <= 1
    assert torch.allclose(figures.glyphs(0.25 * fastmim.hog(img, 8))[0, 0], 0.25 * drawn)
    assert torch.allclose(figures.bright_glyphs(0.25 * fastmim.hog(img, 8))[0, 0], 0.5 * drawn.sqrt())


# Masks


@pytest.mark.parametrize("U,ratio,kept", [(64, 0.75, 16), (16, 0.75, 4), (100, 0.9, 10), (10, 0.7, 3), (9, 0.75, 2),
                                          (16, 0.0, 16), (49, 0.6, 19)])
def test_the_floor_of_the_units_stays_visible(U, ratio, kept):
    """Of the ratio that was typed: 100 * (1 - 0.9) is 9.999... in floating point."""
    model = build("vit", img_size=(16, 16 * U), mask_ratio=ratio)
    assert model.num_noise == U and model.mask(torch.rand(2, U)).sum(dim=1).tolist() == [U - kept] * 2


def test_the_unit_is_the_stride_of_the_latent_unless_told_otherwise():
    for kind, units in (("vit", (8, 8)), ("swin", (4, 4)), ("pvt", (4, 4)), ("swin 16 px", (8, 8)), ("linear", (4, 4))):
        assert build(kind, img_size=(128, 128)).grid == units


def test_masks_are_pure_and_hide_every_unit_equally_often():
    model = build("vit")
    noise = torch.rand(4000, 16)
    before, mask = noise.clone(), model.mask(noise)
    assert mask.dtype == torch.bool and torch.equal(noise, before)
    assert torch.equal(torch.cat([model.mask(row) for row in noise.split(1000)]), mask)
    assert (mask.float().mean(dim=0) - 0.75).abs().max() < 0.041  # 6 deviations


def test_units_with_the_lowest_noise_stay_visible():
    """Of equal noise, the first."""
    model, noise = build("vit", img_size=(128, 128)), torch.rand(20, 64)
    for mask, row in zip(model.mask(noise), noise, strict=True):
        assert row[mask].min() > row[~mask].max()
    assert model.mask(torch.zeros(2, 64)).tolist() == [[False] * 16 + [True] * 48] * 2


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_pixels_are_in_the_loss_and_nowhere_else(kind):
    """The encoder sees one colour where something is hidden. No loss on what is visible, whatever the unit."""
    model = build(kind, img_size=(64, 96))
    imgs, noise = batch(model)
    hidden, mask = hidden_pixels(model, noise), model.mask(noise)
    with torch.no_grad():
        colours = torch.where(hidden, model.mask_token, imgs)
        assert torch.equal(model.encoder(colours), model.encode(imgs, mask))
        pred, target = predict(model, imgs, noise), model.target(imgs)
        assert torch.equal(predict(model, torch.where(hidden, torch.randn_like(imgs), imgs), noise), pred)
        assert not torch.equal(predict(model, torch.where(hidden, imgs, torch.randn_like(imgs)), noise), pred)
        for change in (hidden, ~hidden):
            other = target_of_parts(model, torch.where(change, 1e3, 0.0).expand_as(imgs))
            changed = model.loss(pred + other, target, mask) != model.loss(pred, target, mask)
            assert changed == (change is hidden)


def target_of_parts(model, maps):
    """A map of pixels (B, C, H, W), constant in every cell, in the layout of a target."""
    side, part = model.encoder.out_stride, model.part
    if model.cfg.target != "hog":
        return layers.patchify(maps, side)
    cells = maps[:, :1, ::part, ::part].expand(-1, 9 * maps.shape[1], -1, -1)
    return torch.nn.functional.pixel_unshuffle(cells, side // part).flatten(2).transpose(1, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_by_hand(kind):
    model = build(kind)
    imgs, noise = batch(model)
    pred, target = predict(model, imgs, noise), model.target(imgs)
    chosen = target_of_parts(model, hidden_pixels(model, noise).float().expand_as(imgs)).bool()
    torch.testing.assert_close(model(imgs, noise), (pred - target).square()[chosen].mean())
    zero, mean = target.square()[chosen].mean(), (target - target.mean(dim=(0, 1))).square()[chosen].mean()
    assert fastmim.prepare(model, imgs, noise) == pytest.approx({"zero": zero.item(), "mean": mean.item()}, abs=1e-4)


def test_nothing_hidden_is_loss_0():
    model = build(mask_ratio=0.0)
    loss = model(*batch(model))
    loss.backward()
    assert loss.item() == 0 and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


# Sizes, gradients, precision


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size,C", [((64, 64), 3), ((64, 96), 1), ((96, 32), 4)], ids=["64x64x3", "64x96x1", "96x32x4"])
def test_every_trainable_parameter_gets_a_gradient(kind, size, C):
    model = build(kind, img_size=size, in_chans=C, mask_ratio=0.5)
    imgs, noise = batch(model)
    assert predict(model, imgs, noise).shape == model.target(imgs).shape
    loss = model(imgs, noise)
    loss.backward()
    assert loss.shape == () and loss.dtype == torch.float32 and loss.isfinite()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("size,patch", [((32, 32), 4), ((32, 32), 2), ((28, 42), 14), ((30, 50), 10)], ids=str)
def test_small_images_and_odd_patches(size, patch):
    model = build("vit", img_size=size, patch_size=patch, mask_ratio=0.5)
    assert model.cell == {4: 2, 2: 1, 14: 7, 10: 5}[patch] and model(*batch(model)).isfinite()


@pytest.mark.parametrize("kind,options,said", [
    ("swin", {"img_size": (64, 72)}, "64x72 must be divisible by --mask_unit 32 and by 32"),
    ("vit", {"mask_unit": 24, "img_size": (96, 96)}, "--mask_unit 24 must be a multiple of 8 that divides 16"),
    ("vit", {"mask_unit": 4}, "--mask_unit 4 must be a multiple of 8"),
    ("swin", {"img_size": (32, 32)}, "hides all 1 units of 32 px"), ("vit", {"mask_ratio": 0.99}, "hides all 16"),
    ("vit", {"mask_ratio": 1.0}, "--mask_ratio"), ("vit", {"target": "edges"}, "--target"),
    ("vit", {"patch_size": 1, "img_size": (8, 8)}, "pixels and norm_pixels take any"),
    ("vit", {"decoder_depth": -1}, "--decoder_depth"), ("vit", {"decoder_heads": 5}, "--decoder_heads"),
    ("swin", {"window": 0}, "--window")])
def test_what_does_not_fit_is_refused_with_what_would(kind, options, said):
    with pytest.raises(ValueError, match=said) as error:
        build(kind, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_activation_checkpointing_changes_nothing(kind):
    plain, thrifty = (build(kind, activation_checkpointing=on) for on in (False, True))
    assert equal(gradients(plain, *batch(plain)), gradients(thrifty, *batch(plain)))


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_autocast_keeps_the_loss_in_fp32(kind):
    model = build(kind)
    imgs, noise = batch(model)
    exact = model(imgs, noise)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(imgs, noise)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact.item(), rel=0.02)
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


def test_compile_captures_one_graph_and_changes_nothing(monkeypatch):
    model = build("vit")
    imgs, noise = batch(model)
    exact = model(imgs, noise)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(imgs, noise), exact, rtol=1e-6, atol=1e-7)


# Pictures


@pytest.mark.parametrize("kind", KINDS)
def test_reconstruct(kind, monkeypatch):
    """A model that predicts the target paints the original, or the glyphs of its HOG."""
    model = build(kind, img_size=(64, 96))
    original = torch.randint(0, 256, (4, 3, 64, 96), dtype=torch.uint8)
    imgs, noise = transforms.normalize(original), torch.rand(4, model.num_noise)
    monkeypatch.setattr(model, "decode", lambda latent: model.target(imgs))
    rows = fastmim.reconstruct(model, imgs, noise)
    hog = ["HOG"] if model.cfg.target == "hog" else []
    assert [title.split("\n")[0] for title in rows] == ["original", "masked", *hog, "prediction", "prediction"]
    exact, masked, *_, pred, pasted = rows.values()
    hidden = hidden_pixels(model, noise).expand_as(imgs)
    torch.testing.assert_close(exact, original / 255, rtol=0, atol=1e-5)
    assert torch.equal(masked[~hidden], exact[~hidden])
    assert all(0 <= row.min() and row.max() <= 1 for row in rows.values())
    if hog:
        assert torch.equal(pasted, rows["HOG"]) and pred.shape == (4, 1, *(n // model.cell * 15 for n in (64, 96)))
        in_cells = hidden[:, :1, :: model.cell, :: model.cell]  # (B, 1, H/cell, W/cell)
        seen = torch.where(torch.kron(in_cells, torch.ones(15, 15)) > 0, 1.0, 0.3**0.5)  # brighter by a root
        torch.testing.assert_close(pred, pasted * seen)
    else:
        torch.testing.assert_close(pasted, exact, rtol=0, atol=1e-5)
        torch.testing.assert_close(pred, dimmed(imgs, hidden), rtol=0, atol=1e-5)


# Whole runs


@pytest.fixture
def run(folder, call, tmp_path):
    """`run(name, **changes)`: three steps of the tiny recipe on a few images, in OUT = tmp_path / name."""
    def words(name, script=fastmim, **changes):
        recipe = ROOT / "configs" / ("fastmim_tiny.yaml" if script is fastmim else "finetune_tiny.yaml")
        given = {"data": folder, "batch_size": 8, "micro_batch": 4, "max_steps": 3, "log_every": 1, "device": "cpu",
                 "labels": None if script is fastmim else 0, "out": tmp_path / name, **changes}
        return call(script.main, ["--config", recipe, *flags(**given)])
    return words


@pytest.mark.parametrize("kind,changes", [
    ("vit", {}), ("swin", {"model": "swin_tiny", "patch_size": 0, "mask_unit": 16, "target": "norm_pixels"})],
    ids=["vit", "swin"])
def test_a_run_and_fine_tuning(kind, changes, run, tmp_path):
    """Three steps, two pictures; a stopped and resumed run ends bit-identical; micro-batches are one batch; encoder.pt
    trains on, at another size, too, and with the bias tables that go with it."""
    done = run("whole", **changes)
    assert done.code == 0 and done.err == "" and "trivial predictors" in done.out
    assert len(list((tmp_path / "whole" / "pictures").glob("*.png"))) == 2  # after the first and the last step
    for name, more in (("parts", {"max_steps": 1}), ("parts", {"resume": True}), ("once", {"micro_batch": 8})):
        assert run(name, **{**changes, **more}).code == 0
    whole, parts = (torch.load(tmp_path / name / "last.pt") for name in ("whole", "parts"))
    assert equal(whole["model"], parts["model"]) and equal(whole["optimizer"], parts["optimizer"])
    for one, two in zip(log_of(tmp_path / "once"), log_of(tmp_path / "whole"), strict=True):
        assert [one["loss"], one["grad_norm"]] == pytest.approx([two["loss"], two["grad_norm"]], rel=1e-5)

    init = tmp_path / "whole" / "encoder.pt"
    tuned = run("tuned", finetune, init=init, max_steps=1, head_start="random", img_size="96x64", batch_size=4,
                window=6 if kind == "swin" else 0)
    assert tuned.code == 0 and "loaded" in tuned.out, tuned.err
    assert ("bias tables resized" if kind == "swin" else "positions resized") in tuned.out


def test_a_wrong_size_is_one_line(run, tmp_path):
    done = run("run", img_size="60x64")
    assert done.code == 2 and "--patch_size 8 does not divide" in done.err and done.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


# Distillation


def export(model, path):
    saved = {"arch": model.encoder.arch, "model": model.encoder.state_dict(), "method": "FastMIM"}
    checkpoint.write(path, saved)
    return str(path)


def test_a_teacher_is_asked_about_the_whole_image_and_stays_what_it_is(tmp_path):
    wide = build("swin", img_size=(96, 96))
    model = build("pvt", teacher=export(wide, tmp_path / "encoder.pt"), teacher_weight=0.5)
    alone = build("pvt")
    alone.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("project")})
    imgs, noise = batch(model)
    before = [p.clone() for p in model.teacher.parameters()]
    latent = model.encode(imgs, model.mask(noise))
    wanted = model.teacher(imgs)
    wanted = (wanted - wanted.mean(2, True)) / (wanted.var(2, correction=0, keepdim=True) + 1e-5).sqrt()
    apart = (model.project(latent) - wanted).abs().mean()
    loss = model(imgs, noise)
    torch.testing.assert_close(loss, alone(imgs, noise) + 0.5 * apart)
    loss.backward()
    assert all(p.grad is None and torch.equal(p, q) for p, q in zip(model.teacher.parameters(), before, strict=True))
    assert model.project.weight.grad.abs().sum() > 0 and not model.teacher.training
    assert not any(name.startswith("teacher") for name in model.state_dict())
    groups = fastmim.optim.parameter_groups(model, 0.05)
    assert not any(name.startswith("teacher") for group in groups for name in group["names"])


@pytest.mark.parametrize("teacher,said", [("/no/such.pt", "/no/such.pt"), ("torchvision:resnet", "resnet"),
                                          ("encoder.pt", "equal strides, not 16, 32")])
def test_a_teacher_that_does_not_fit_is_refused(teacher, said, tmp_path):
    teacher = export(build("vit"), tmp_path / teacher) if teacher == "encoder.pt" else teacher
    with pytest.raises((ValueError, OSError), match=said) as error:
        build("swin", teacher=teacher)
    assert "\n" not in str(error.value)


def test_a_teacher_of_torchvision_has_the_weights_that_are_there(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(ValueError, match="--download fetches them"):
        build("swin", teacher="torchvision:resnet18")
    net, path = torchvision.models.resnet18(), tmp_path / "checkpoints" / "resnet18-f37072fd.pth"
    path.parent.mkdir()
    torch.save(net.state_dict(), path)
    model = build("swin", teacher="torchvision:resnet18")
    imgs, noise = batch(model)
    maps = torch.nn.Sequential(*list(net.eval().children())[:-2])(imgs)
    torch.testing.assert_close(model.teacher(imgs), maps.flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-4)
    assert model(imgs, noise).isfinite()


def test_a_teacher_goes_by_its_own_statistics_whatever_is_asked_of_batchnorm(monkeypatch, tmp_path):
    """BatchNorm of a single image is refused in a student; a teacher's has averages."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "checkpoints" / "resnet18-f37072fd.pth")
    model = build("swin", img_size=(32, 32), mask_unit=8, teacher="torchvision:resnet18")
    fastmim.engine.require_two_images(model, types.SimpleNamespace(smallest=lambda: 1))
    assert model.training and not any(module.training for module in model.teacher.modules())


def test_a_teacher_of_torchvision_may_have_the_names_of_its_older_files(monkeypatch, tmp_path):
    """Such as denselayer1.norm.1 for what is now denselayer1.norm1."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    net, path = torchvision.models.densenet121(), tmp_path / "checkpoints" / "densenet121-a639ec97.pth"
    path.parent.mkdir()
    old = {re.sub(r"(denselayer\d+\.(?:norm|relu|conv))([12])\.", r"\1.\2.", name): tensor
           for name, tensor in net.state_dict().items() if not name.endswith("num_batches_tracked")}
    assert "features.denseblock4.denselayer16.conv.2.weight" in old
    torch.save(old, path)
    encoder = weights.frozen_encoder("torchvision:densenet121", types.SimpleNamespace(
        img_size=(64, 64), in_chans=3, plan=False, download=False), fastmim.models.from_arch, fastmim.models.SIZES)
    assert torch.equal(encoder.state_dict()["net.features.conv0.weight"], net.features.conv0.weight)
    name = "features.denseblock4.denselayer16.conv2.weight"
    assert torch.equal(encoder.state_dict()[f"net.{name}"], net.state_dict()[name])


class Hostile:
    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize("content", [b"", b"rubbish", {"no": torch.zeros(1)}, Hostile()])
def test_a_teacher_of_torchvision_whose_file_is_damaged_is_one_line(content, run, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    path = tmp_path / "checkpoints" / "resnet18-f37072fd.pth"
    path.parent.mkdir()
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    done = run("damaged", model="swin_tiny", patch_size=0, window=2, teacher="torchvision:resnet18")
    assert done.code == 2 and done.err.count("\n") == 1 and "resnet18-f37072fd.pth" in done.err
    assert "executed" not in done.out and not (tmp_path / "damaged").exists()


@pytest.mark.parametrize("name, said", [("googlenet", "normalised in another way"),
                                        ("efficientnet_v2_l", "normalised by mean 0.5,0.5,0.5")])
def test_a_teacher_of_torchvision_that_takes_other_pixels_is_refused(name, said):
    cfg = types.SimpleNamespace(img_size=(64, 64), in_chans=3, plan=False, download=False)
    with pytest.raises(ValueError, match=said):
        weights.frozen_encoder(f"torchvision:{name}", cfg, fastmim.models.from_arch, fastmim.models.SIZES)


def test_a_run_with_a_teacher_resumes_from_its_path(run, tmp_path):
    """The teacher is a fine-tuned encoder, without the norm that its head took away."""
    assert run("teacher", finetune, model="vit_tiny", patch_size=8, max_steps=1, head_start="random").code == 0
    teacher = tmp_path / "teacher" / "encoder.pt"
    for name, more in (("whole", {}), ("parts", {"max_steps": 1}), ("parts", {"resume": True})):
        done = run(name, teacher=teacher, **more)
        assert done.code == 0 and done.err == "", done.err
    whole, parts = (torch.load(tmp_path / name / "last.pt") for name in ("whole", "parts"))
    assert equal(whole["model"], parts["model"]) and equal(whole["optimizer"], parts["optimizer"])
    assert "project.weight" in whole["model"] and not any(name.startswith("teacher") for name in whole["model"])


# Starting from another run


def test_a_phase_starts_with_the_weights_of_the_one_before(tmp_path):
    """Tables resized as an image; everything else, decoder included, as it was."""
    old = build("swin", img_size=(64, 64), window=4)
    for table in [p for name, p in old.named_parameters() if name.endswith("bias_table")]:
        torch.nn.init.normal_(table)
    step = {"optimizer": {}, "scaler": {}, "step": 7, "config": old.cfg.fixed_options()}
    checkpoint.write(tmp_path / "last.pt", {"model": old.state_dict(), **step})
    new = build("swin", seed=1, img_size=(96, 96), window=6, init=str(tmp_path / "last.pt"))
    for (name, a), b in zip(old.state_dict().items(), new.state_dict().values(), strict=True):
        if a.shape == b.shape:
            assert torch.equal(a, b), name
        else:
            n, m = (int(len(x) ** 0.5 + 1) // 2 for x in (a, b))
            assert name.endswith("bias_table") and (n, m) in ((4, 6), (2, 3))
            assert torch.equal(b, weights.resize_bias_table(a, (n, n), (m, m), "bicubic"))
    for change, said in (({"target": "pixels"}, "--target hog, not pixels"), ({"decoder_width": 64}, "decoder"),
                         ({"in_chans": 1}, "--in_chans 3")):
        with pytest.raises(ValueError, match=said):
            build("swin", init=str(tmp_path / "last.pt"), **change)


def test_fixed_positions_are_computed_for_each_size(tmp_path):
    old = build("vit", img_size=(64, 64))
    step = {"optimizer": {}, "scaler": {}, "step": 7, "config": old.cfg.fixed_options()}
    checkpoint.write(tmp_path / "last.pt", {"model": old.state_dict(), **step})
    new = build("vit", img_size=(64, 96), init=str(tmp_path / "last.pt"))
    assert torch.equal(new.encoder.pos_embed, layers.sincos_positions((4, 6), 96))
    assert torch.equal(new.decoder.pred.weight, old.decoder.pred.weight)


@pytest.mark.parametrize("value", [["a", "b"], [64], [2**40, 2**40], 64])
def test_a_crafted_run_to_start_from_is_one_line(run, tmp_path, value):
    assert run("run", max_steps=1).code == 0
    saved = torch.load(tmp_path / "run" / "last.pt")
    saved["config"]["img_size"] = value
    torch.save(saved, tmp_path / "crafted.pt")
    done = run("next", init=tmp_path / "crafted.pt", img_size=64)
    assert done.code == 2 and "another script's run" in done.err and done.err.count("\n") == 1, done.err


def test_a_run_starts_from_one_that_agrees_in_what_counts(run, tmp_path):
    """Not in how a default is written, nor in masks; but in heads, which no shape shows."""
    small = {"model": "swin_tiny", "window": 2, "max_steps": 1}
    assert run("run", **small, patch_size=4, mask_unit=8, decoder_heads=2).code == 0
    start = {**small, "init": tmp_path / "run" / "last.pt"}
    done = run("next", **start, patch_size=0, img_size=128, mask_unit=64, mask_ratio=0.5, decoder_heads=2)
    assert done.code == 0 and "weights start from" in done.out, done.err
    done = run("heads", **start, patch_size=0, mask_unit=8, decoder_heads=1)
    assert done.code == 2 and "--decoder_heads 2, not 1" in done.err


def test_batchnorm_of_a_single_image_does_not_cost_the_run_that_was_there(run, tmp_path):
    assert run("run", max_steps=1).code == 0
    before = snapshot(tmp_path / "run")
    changes = {"model": "torchvision:resnet18", "patch_size": 0, "img_size": 32, "mask_unit": 8}
    done = run("run", **changes, micro_batch=1, overwrite=True)
    assert done.code == 2 and done.err.startswith("error: BatchNorm needs two") and done.err.count("\n") == 1
    assert snapshot(tmp_path / "run") == before


@pytest.mark.parametrize("script", [fastmim, lut, mae])
def test_a_patch_of_one_value_is_not_normalised(script, call, folder, tmp_path):
    words = flags(model="vit_tiny", patch_size=1, img_size=8, in_chans=1, target="norm_pixels", data=folder,
                  max_steps=1, batch_size=4, micro_batch=4, decoder_width=32, decoder_heads=2, device="cpu",
                  out=tmp_path / "run")
    done = call(script.main, words)
    assert done.code == 2 and "a patch of one value has no spread" in done.err and done.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("script", [fastmim, lut])
def test_without_options_it_does_not_begin_the_recipe(script, call, monkeypatch):
    monkeypatch.setattr("sys.argv", ["script.py"])
    done = call(lambda words: script.main(), [])
    assert done.code == 2 and done.err.count("\n") == 1 and "days on many GPUs" in done.err and done.out == ""


def test_a_network_that_cannot_be_planned_is_one_line(run):
    done = run("run", model="torchvision:regnet_y_400mf", patch_size=0, img_size=64, plan=True)
    assert done.code == 2 and "cannot be planned" in done.err and done.err.count("\n") == 1


def test_a_resumed_run_does_not_need_what_it_started_from(run, tmp_path):
    """Nor does it need last.pt itself, if a kill between two renames left its predecessor alone."""
    small = {"model": "swin_tiny", "patch_size": 0, "window": 2, "mask_unit": 16}
    assert run("first", **small, max_steps=1).code == 0
    started = {**small, "init": tmp_path / "first" / "last.pt", "img_size": 96}
    assert run("whole", **started).code == 0
    for steps in (1, 2):
        assert run("parts", **started, max_steps=steps, resume=True).code == 0
    (tmp_path / "first" / "last.pt").unlink()
    (tmp_path / "parts" / "last.pt").unlink()
    done = run("parts", **started, resume=True)
    assert done.code == 0 and "going on from" in done.out and "weights start from" not in done.out, done.err
    assert equal(*(torch.load(tmp_path / name / "last.pt")["model"] for name in ("whole", "parts")))
    done = run("other", **started)
    assert done.code == 2 and done.err.count("\n") == 1 and "first/last.pt" in done.err
