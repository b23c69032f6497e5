"""lut.py: two views and what becomes of them, the teacher, every ablation, and BatchNorm over several processes."""

import json
import math
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, dimmed, equal, log_of
from PIL import Image, ImageFilter, ImageOps

import data
import lut
import mae
import models
from common import config, engine, layers, optim, transforms
from tools.trials import finish, fork, start, torchrun

SMALL = {"model": "vit_tiny", "img_size": (32, 32), "patch_size": 8, "decoder_depth": 1, "decoder_width": 32,
         "decoder_heads": 2, "head_width": 48}
ABLATIONS = [{}, {"one_directional": True}, {"steering": "masked"}, {"steering": "both"}, {"context": "cls"},
             {"context": "tokens"}, {"context": "pooled+tokens", "steering": "masked"}, {"context_loss": "infonce"},
             {"context_loss": "smooth_l1"}, {"target_mask_ratio": 0.75}, {"mask_ratio": 0.5}, {"target": "pixels"},
             {"one_directional": True, "steering": "both", "context": "tokens"}, {"activation_checkpointing": True}]


def build(seed=0, **options):
    torch.manual_seed(seed)
    cfg = lut.Config(**{**SMALL, **options})
    cfg.check()
    return lut.LUT(cfg)


def batch(model, B=4, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn((B, *model.input_shape), generator=draw), torch.rand(B, model.num_noise, generator=draw)


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture(scope="module")
def words_of(tiny):
    """`words_of(**changes)`: words for lut.py, a run of 12 steps of 8 images in two micro-batches."""
    return lambda **changes: tiny(**{"head_width": 32, **changes})


# Masks


@pytest.mark.parametrize("ratio", [0.5, 0.6, 0.75, 0.9])
def test_the_two_views_keep_disjoint_places(ratio):
    model = build(img_size=(32, 64), mask_ratio=ratio)
    noise = torch.rand(5, 32)
    ids_keep, ids_restore, mask = model.mask(noise)
    N_keep = math.floor(32 * (1 - ratio) + 1e-9)
    assert ids_keep.shape == (10, N_keep) and mask.shape == ids_restore.shape == (10, 32)
    assert torch.equal(ids_keep.view(2, 5, -1).transpose(0, 1).flatten(1), noise.argsort(dim=1)[:, : 2 * N_keep])
    one, two = (~mask).view(2, 5, 32)
    assert not (one & two).any() and (one.sum(dim=1) == N_keep).all() and (two.sum(dim=1) == N_keep).all()
    for ids, restore, hidden in zip(ids_keep, ids_restore, mask, strict=True):
        assert torch.equal(restore[ids], torch.arange(N_keep)) and not hidden[ids].any()
    tied = model.mask(torch.zeros(1, 32))[0].flatten()
    assert torch.equal(tied, torch.arange(2 * N_keep))  # of equal noise, the first come first


# The loss


def test_the_loss_by_hand():
    """One image after another, with two loops where the code has one batch."""
    model = build(three_augment=False, target="pixels").eval()  # BatchNorm by running averages: images stay apart
    model.teacher.load_state_dict({k: v + 0.1 if v.is_floating_point() else v
                                   for k, v in model.teacher.state_dict().items()})
    imgs, noise = batch(model)
    pixels, context = [], []
    for pair, row in zip(imgs, noise[:, :16], strict=True):
        ids, vectors = row.argsort(), []
        for view, img in enumerate(pair):
            visible = ids[4 * view : 4 * view + 4]
            coords = torch.stack([visible // 4, visible % 4], dim=1)[None]
            latent = model.encoder.encode(model.encoder.embed(img[None])[:, visible], coords)
            vectors.append(model.predictor(model.projector(latent[:, 1:].mean(dim=1)))[0])
            if view == 0:
                full = model.mask_token.expand(1, 16, -1).clone()
                full[:, visible] = model.decoder.embed(latent[:, 1:])
                pred = model.decoder(torch.cat([model.decoder.embed(latent[:, :1]), full], dim=1))[0]
                pixels.append((pred - layers.patchify(img[None], 8)[0])[ids[4:]].square().mean())
        whole = [model.teacher["projector"](model.teacher["encoder"](img[None])[:, 1:].mean(dim=1))[0] for img in pair]
        context += [2 - 2 * F.cosine_similarity(vectors[v], whole[1 - v], dim=0) for v in (0, 1)]
    expected = torch.stack(pixels).mean() + 0.25 * torch.stack(context).mean()
    torch.testing.assert_close(model(imgs, noise), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"steering": "both", "context": "tokens"}], ids=repr)
def test_one_direction_is_view_1_against_a_whole_view_2(options):
    both, one = build(three_augment=False, **options), build(three_augment=False, one_directional=True, **options)
    imgs, noise = batch(both)
    compared = {}
    for model in (both, one):
        compared[model] = []
        model.distance = lambda *pair, m=model: compared[m].append(pair) or lut.LUT.distance(m, *pair)
        model(imgs, noise)
    assert len(compared[both]) == 2 and len(compared[one]) == 1
    for found, expected in zip(compared[one][0], compared[both][0], strict=True):
        torch.testing.assert_close(found, expected)
    imgs[:, 1, :, :4] += 1
    one(imgs, noise)
    assert equal(compared[one][0][0], compared[one][1][0]) and not equal(compared[one][0][1], compared[one][1][1])


@pytest.mark.parametrize("steering,places", [("unmasked", slice(4)), ("masked", slice(4, None)), ("both", slice(None))])
def test_tokens_are_compared_at_their_own_place(steering, places, monkeypatch):
    """The teacher's token says its number; it must arrive beside the student's token of that place."""
    model = build(context="tokens", steering=steering, three_augment=False)
    imgs, noise = batch(model)
    taught = torch.arange(-1.0, 16).view(1, 17, 1).expand(8, -1, 96)  # class token -1, then the places
    monkeypatch.setattr(model, "teach", lambda imgs, noise: taught)
    monkeypatch.setattr(model.teacher["projector"], "forward", lambda x: x)
    seen = []
    monkeypatch.setattr(model, "distance", lambda student, teacher: seen.append((student, teacher)) or student.sum())
    model(imgs, noise)
    ids = noise[:, :16].argsort(dim=1)
    for view, (student, teacher) in enumerate(seen):
        order = ids.roll(-4 * view, dims=1)[:, places]
        assert teacher.shape == student.shape and torch.equal(teacher[:, 0].view(4, -1), order.float())


def test_infonce_and_smooth_l1_by_hand():
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(5, 96, generator=draw), torch.randn(5, 96, generator=draw)
    cosines = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T
    found = build(context_loss="infonce").distance(a, b)
    torch.testing.assert_close(found, -(cosines / 0.2).log_softmax(dim=1).diag().mean())
    gap = (a - b).abs()
    by_hand = torch.where(gap < 1, gap.square() / 2, gap - 0.5).mean()
    torch.testing.assert_close(build(context_loss="smooth_l1").distance(a, b), by_hand)
    torch.testing.assert_close(build().distance(a, b), (F.normalize(a) - F.normalize(b)).square().sum(dim=1).mean())


def test_a_masked_teacher_sees_what_the_student_sees_last():
    model = build(target_mask_ratio=0.75, three_augment=False)
    imgs, noise = batch(model)
    ids = noise[:, :16].argsort(dim=1)[:, 12:]
    coords = torch.stack([ids // 4, ids % 4], dim=2)
    encoder = model.teacher["encoder"]
    tokens = encoder.embed(imgs[:, 1])
    picked = torch.stack([t[i] for t, i in zip(tokens, ids, strict=True)])
    found = model.teach(imgs.transpose(0, 1).flip(0).flatten(0, 1), noise[:, :16])
    assert found.shape == (8, 5, 96)
    torch.testing.assert_close(found[:4], encoder.encode(picked, coords))


def test_of_equal_noise_a_masked_teacher_sees_the_last():
    model = build(img_size=(64, 64), target_mask_ratio=0.75, three_augment=False)
    imgs = batch(model)[0].transpose(0, 1).flatten(0, 1)
    last = torch.arange(48, 64).expand(len(imgs), -1)
    expected = model.encode(imgs, last, model.teacher["encoder"])
    torch.testing.assert_close(model.teach(imgs, torch.zeros(4, 64)), expected)


# Teacher and gradients


@pytest.mark.parametrize("options", ABLATIONS, ids=repr)
def test_every_trainable_parameter_gets_a_gradient_and_the_teacher_none(options):
    model = build(**options)
    before = {k: v.clone() for k, v in model.teacher.state_dict().items()}
    model(*batch(model, B=8)).backward()
    for name, p in trainable(model).items():
        assert p.grad is not None and p.grad.isfinite().all(), name  # DDP waits for those that get none
        assert p.grad.abs().sum() > 0, name
    assert all(p.grad is None and not p.requires_grad for p in model.teacher.parameters())
    assert equal(before, dict(model.teacher.state_dict()))  # nor does a forward pass move its running averages
    groups = optim.parameter_groups(model, 0.05)
    assert not [name for group in groups for name in group["names"] if name.startswith("teacher")]


def test_without_context_it_is_mae_and_nothing_more_is_computed(monkeypatch):
    """No teacher, no heads, no second view for the student; the same weights and the same loss as mae.py."""
    model = build(context_weight=0.0, three_augment=False)
    assert model.teacher is None and not [name for name in model.state_dict() if "projector" in name]
    imgs, noise = batch(model)
    seen, real = [], models.ViT.encode
    monkeypatch.setattr(models.ViT, "encode", lambda self, x, *more: seen.append(len(x)) or real(self, x, *more))
    loss = model(imgs, noise)
    assert seen == [4]
    monkeypatch.undo()

    torch.manual_seed(0)
    reference = mae.MAE(mae.Config(**{k: v for k, v in SMALL.items() if k != "head_width"}))
    assert torch.equal(model.encoder.patch_embed.proj.weight, reference.encoder.patch_embed.proj.weight)
    reference.load_state_dict(model.state_dict())
    assert loss.item() == pytest.approx(reference(imgs[:, 0], noise[:, :16]).item(), rel=1e-6)
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())
    model.update_ema(0.9)


@pytest.mark.parametrize("options", [{}, {"one_directional": True, "target_mask_ratio": 0.5}], ids=repr)
def test_the_parts_of_the_loss_and_their_trivial_predictors(options):
    """The parts add up to the loss. One vector for all images is as far from the teacher's as their spread makes it."""
    model = build(**options)
    imgs, noise = batch(model, B=8)
    loss = model(imgs, noise)
    parts = model.terms
    assert loss.item() == pytest.approx((parts["pixel_loss"] + 0.25 * parts["context_loss"]).item(), rel=1e-6)
    trivial = lut.prepare(model, imgs, noise)
    assert list(trivial) == ["pixels: zero", "pixels: patch mean", "context: one vector"]
    if not options:
        latent = torch.cat([model.teacher["encoder"](imgs[:, view])[:, 1:].mean(dim=1) for view in (0, 1)])
        vectors = F.normalize(model.teacher["projector"](latent), dim=1)
        by_hand = 2 - 2 * vectors.mean(dim=0).norm()  # the mean of cosines with the mean's direction
        assert trivial["context: one vector"] == pytest.approx(by_hand.item(), abs=2e-4)


def test_the_log_holds_the_parts_of_the_loss(words_of, call, tmp_path):
    assert call(lut.main, words_of(out=tmp_path / "run", micro_batch=8, log_every=3)).code == 0
    for line in log_of(tmp_path / "run"):
        assert line["loss"] == pytest.approx(line["pixel_loss"] + 0.25 * line["context_loss"], rel=1e-5)


def test_the_teacher_keeps_nothing_for_backward_and_stays_in_eval_mode():
    model = build().train()
    assert model.training and not any(m.training for m in model.teacher.modules())
    imgs, _ = batch(model)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t), lambda t: t):
        taught = model.teach(imgs.flatten(0, 1), None)
    assert taught.shape == (8, 17, 96) and not taught.requires_grad and not kept


def test_the_teacher_starts_as_a_copy_and_moves_by_the_formula():
    model = build()
    own = model.state_dict()
    assert all(torch.equal(tensor, own[name]) for name, tensor in model.teacher.state_dict().items())
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(model.teacher["encoder"].parameters(),
                                                            model.encoder.parameters(), strict=True))
    before = {name: tensor.clone() for name, tensor in model.teacher.state_dict().items()}
    model(*batch(model)).backward()  # moves the student's running averages
    with torch.no_grad():
        for p in trainable(model).values():
            p.add_(torch.randn_like(p))
    model.update_ema(0.9)
    own, moved = model.state_dict(), set()
    for name, tensor in model.teacher.state_dict().items():
        if tensor.is_floating_point():
            assert torch.equal(tensor, before[name].lerp(own[name], 1 - 0.9)), name
            moved |= {name} if not torch.equal(tensor, before[name]) else set()
    assert {"projector.1.running_mean", "projector.1.running_var", "encoder.cls_token"} <= moved


def test_a_run_moves_the_teacher_once_a_step_along_a_cosine(words_of, call, tmp_path, monkeypatch):
    decays, real = [], lut.LUT.update_ema
    monkeypatch.setattr(lut.LUT, "update_ema", lambda self, decay: decays.append(decay) or real(self, decay))
    assert call(lut.main, words_of(out=tmp_path / "run")).code == 0
    assert decays[1:] == pytest.approx([1 - 0.004 * (1 + math.cos(math.pi * t / 12)) / 2 for t in range(12)])


@pytest.mark.parametrize("options", [{}, {"context_loss": "infonce", "steering": "both"}], ids=repr)
def test_bf16_keeps_target_and_losses_in_fp32(options):
    model = build(**options)
    imgs, noise = batch(model)
    exact = model(imgs, noise)
    compared, real = [], model.distance
    model.distance = lambda *pair: compared.append(real(*pair)) or compared[-1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(imgs, noise)
    loss.backward()
    assert loss.dtype == torch.float32 and {x.dtype for x in compared} == {torch.float32}
    assert loss.item() == pytest.approx(exact.item(), rel=0.03)


# Views


def test_both_views_are_random_alike_and_view_2_is_jittered(folder):
    cfg = lut.Config(data=str(folder), img_size=(16, 16), crop="simple", view_jitter=(0.4, 0.4, 0.2, 0.1))
    dataset = data.pretrain_set(cfg)
    pairs = torch.stack([dataset[epoch, 5, 0][0] for epoch in range(40)])
    assert pairs.shape == (40, 2, 3, 16, 16) and pairs.dtype == torch.uint8
    assert torch.equal(pairs[3], dataset[3, 5, 0][0])  # a function of (seed, epoch, index)
    plain = lut.Config(data=str(folder), img_size=(16, 16), view_jitter=(0, 0, 0, 0))
    still = torch.stack([data.pretrain_set(plain)[epoch, 5, 0][0] for epoch in range(40)])
    assert torch.equal(pairs[:, 0], still[:, 0])
    share = (pairs[:, 1] == still[:, 1]).flatten(1).all(dim=1).float().mean()
    assert 0.05 < share < 0.5  # one in five is left as it is
    source = dataset.source.load(5)[0]
    cuts = [F.pad(flip[None].float(), (4, 4, 4, 4), mode="reflect")[0][:, y : y + 16, x : x + 16].byte()
            for flip in (source, source.flip(2)) for y in range(9) for x in range(9)]
    assert all(any(torch.equal(view, cut) for cut in cuts) for view in still.flatten(0, 1))
    assert len({view.numpy().tobytes() for view in still.flatten(0, 1)}) > 40


@pytest.mark.parametrize("C", [1, 4, 6])
def test_other_channels_have_no_hue_and_no_grey(C, tmp_path):
    for i in range(2):
        np.save(tmp_path / f"{i}.npy", np.random.default_rng(i).integers(0, 256, (20, 30, C), dtype=np.uint8))
    cfg = lut.Config(data=str(tmp_path), in_chans=C, img_size=(16, 24), view_jitter=(0.4, 0.4, 0.2, 0.1))
    pairs = torch.stack([data.pretrain_set(cfg)[epoch, 0, 0][0] for epoch in range(8)])
    assert pairs.shape == (8, 2, C, 16, 24)
    model = build(in_chans=C, img_size=(16, 24))
    loss = model(transforms.normalize(pairs), torch.rand(8, model.num_noise))
    loss.backward()
    assert loss.isfinite()


@pytest.mark.parametrize("size,expected", [((16, 16), (16, 24)), ((16, 32), (21, 32)), ((40, 20), (40, 60))])
def test_a_simple_crop_keeps_proportions(size, expected):
    image = torch.randint(256, (3, 20, 30), dtype=torch.uint8)
    assert transforms.cover(image, size, transforms.BILINEAR).shape[1:] == expected


def test_three_augment_against_pillow():
    draw = torch.Generator().manual_seed(0)
    pixels = F.interpolate(torch.rand(1, 3, 8, 8, generator=draw), size=(48, 64), mode="bicubic").clamp(0, 1)
    image = (pixels * 255).round().byte()
    imgs = transforms.normalize(image).expand(4, -1, -1, -1)
    noise = torch.tensor([[0.1, 0.0], [0.5, 0.3], [0.5, 0.9], [0.9, 0.0]])  # solarized, blurred twice, grey
    picture = Image.fromarray(image[0].permute(1, 2, 0).numpy())
    found = transforms.denormalize(lut.three_augment(imgs, noise)) * 255
    expected = [ImageOps.solarize(picture, 128), picture.filter(ImageFilter.GaussianBlur(0.1 + 1.9 * 0.3)),
                picture.filter(ImageFilter.GaussianBlur(0.1 + 1.9 * 0.9)), ImageOps.grayscale(picture).convert("RGB")]
    for ours, theirs, tolerance in zip(found, expected, (0.01, 3, 3, 1), strict=True):
        gap = (ours - torch.from_numpy(np.array(theirs)).permute(2, 0, 1)).abs()
        assert gap[:, 8:-8, 8:-8].max() <= tolerance  # Pillow blurs by boxes, and repeats the last pixel
    assert (found[1] - found[2]).abs().max() > 5


def test_every_augmentation_is_equally_likely_and_an_images_own():
    imgs, noise = torch.randn(300, 3, 4, 4), torch.rand(300, 2)
    found = lut.three_augment(imgs, noise)
    alone = torch.cat([lut.three_augment(i[None], n[None]) for i, n in zip(imgs, noise, strict=True)])
    torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-6)
    grey = transforms.denormalize(found)
    grey = ((grey[:, 0] - grey[:, 1]).abs().flatten(1).amax(dim=1) < 1e-5).sum()
    assert 60 < grey < 140
    flat = torch.ones(2, 3, 8, 8)
    torch.testing.assert_close(lut.blur(flat, torch.tensor([0.1, 2.0])), flat)  # brightness stays


# Whole runs


@pytest.mark.parametrize("changes", [
    {"steering": "both", "context": "pooled+tokens", "crop": "random_resized", "shift": 0}, {"one_directional": "true"},
    {"img_size": "16x32", "target": "pixels", "context_loss": "infonce"}, {"in_chans": 1, "precision": "bf16"}],
    ids=repr)
def test_a_run_with_options(words_of, call, tmp_path, changes):
    done = call(lut.main, words_of(max_steps=2, out=tmp_path / "run", **changes))
    assert done.code == 0 and done.err == ""
    assert all(math.isfinite(line["loss"]) for line in log_of(tmp_path / "run"))
    assert len(list((tmp_path / "run" / "pictures").glob("*.png"))) == 1
    encoder = torch.load(tmp_path / "run" / "encoder.pt")
    last = torch.load(tmp_path / "run" / "last.pt")["model"]
    assert encoder["method"] == "LUT"
    assert all(torch.equal(tensor, last[f"encoder.{name}"]) for name, tensor in encoder["model"].items())  # the student


BAD = [({"mask_ratio": 0.4}, ["--mask_ratio", "0.4", "[0.5, 1)"]), ({"steering": "all"}, ["--steering", "masked"]),
       ({"context": "mean"}, ["--context", "pooled+tokens"]), ({"context_loss": "l2"}, ["--context_loss", "cosine"]),
       ({"context": "tokens", "target_mask_ratio": 0.5}, ["--context tokens", "--target_mask_ratio"]),
       ({"context": "cls", "steering": "both"}, ["--context cls", "--steering"]), ({"crop": "none"}, ["--crop"]),
       ({"micro_batch": 1}, ["--micro_batch", "2"]), ({"drop_last": "false"}, ["--drop_last"]),
       ({"ema_decay": 1.5}, ["--ema_decay"]), ({"context_weight": -1}, ["--context_weight"]),
       ({"pixel_weight": -1}, ["--pixel_weight"]),
       ({"head_width": 0}, ["--head_width"]), ({"view_jitter": "0.4,0.4,0.2,0.9"}, ["--view_jitter", "0.9"]),
       ({"model": "swin_tiny"}, ["swin_tiny"]), ({"patch_size": 16}, ["two patches"]), ({"shift": 16}, ["--shift"])]


@pytest.mark.parametrize("changes,names", BAD, ids=lambda v: str(v) if isinstance(v, dict) else None)
def test_bad_input_is_one_line_and_writes_nothing(words_of, call, tmp_path, changes, names):
    done = call(lut.main, words_of(**{"out": tmp_path / "run", "max_steps": 1, **changes}))
    assert done.code == 2 and len(done.err.splitlines()) == 1 and done.err.startswith("error: "), done.err
    assert all(name in done.err for name in names), done.err
    assert not list(tmp_path.iterdir())


def test_stopped_anywhere_and_resumed_is_as_if_never_stopped(words_of, call, tmp_path, monkeypatch):
    """Teacher, running averages, decay and optimizer come back: bit for bit."""
    assert call(lut.main, words_of(out=tmp_path / "whole")).code == 0
    real = engine.Run.log
    for stops in ([1], [3, 7]):
        out = tmp_path / "-".join(map(str, stops))
        for stop in stops:
            def log(run, step, *rest, stop=stop):
                real(run, step, *rest)
                if step + 1 == stop:
                    signal.raise_signal(signal.SIGTERM)
            with monkeypatch.context() as patch:
                patch.setattr(engine.Run, "log", log)
                assert call(lut.main, words_of(out=out, resume="true")).code == 128 + signal.SIGTERM
        assert call(lut.main, words_of(out=out, resume="true")).code == 0
        whole, resumed = (torch.load(path / "last.pt") for path in (tmp_path / "whole", out))
        assert equal(whole, resumed)
    state = whole["model"]
    assert any(name.startswith("teacher.projector.1.running") for name in state)
    assert not torch.equal(state["teacher.encoder.cls_token"], state["encoder.cls_token"])


def test_compile_changes_nothing(monkeypatch):
    monkeypatch.setitem(models.VIT, "vit_test", (16, 1, 2))
    model = build(model="vit_test", decoder_width=16, head_width=16)
    imgs, noise = batch(model)
    plain = model(imgs, noise)
    monkeypatch.setattr(model, "compile", lambda: torch.nn.Module.compile(model, backend="eager"))
    engine.Run(lut.Config(compile=True, data="shapes")).distribute(model)
    assert model(imgs, noise).item() == pytest.approx(plain.item(), rel=1e-5)


# Several processes


DRIVER = """
import json, os, sys
import torch
import torch.distributed as dist
import lut

join, leave = dist.init_process_group, dist.destroy_process_group
dist.init_process_group = lambda *a, **k: dist.is_initialized() or join(*a, **k)
dist.destroy_process_group = lambda: None
folder, runs = sys.argv[1], json.loads(sys.argv[2])
for name, words in runs:
    lut.main(words + ["--out", os.path.join(folder, name)])
rank = dist.get_rank()
draw = torch.Generator().manual_seed(0)
x, weight = torch.randn(8, 5, generator=draw), torch.randn(8, 5, generator=draw)
mine = slice(4 * rank, 4 * rank + 4)
norm, part = lut.BatchNorm(5), x[mine].clone().requires_grad_()
out = norm(part)
(out * weight[mine]).sum().backward()
torch.save([out.detach(), part.grad, norm.running_mean, norm.running_var], os.path.join(folder, f"norm{rank}.pt"))
dist.barrier()
leave()
"""


def test_processes_share_their_batches(words_of, call, tmp_path):
    """Two processes that hold 2 images each at a time are one that holds 4: the same losses, gradients, running
    averages, for the default and for negatives of other processes."""
    (tmp_path / "driver.py").write_text(DRIVER)
    common = dict(max_steps=3, clip_grad=0.5)
    runs = {"cosine": common, "infonce": {**common, "context_loss": "infonce", "steering": "both", "context": "tokens"}}
    for name, changes in runs.items():
        assert call(lut.main, words_of(out=tmp_path / "one" / name, micro_batch=4, **changes)).code == 0
    words = json.dumps([(name, words_of(micro_batch=2, **changes)) for name, changes in runs.items()])
    code, _, err = finish(start(*torchrun(2, tmp_path / "driver.py", tmp_path, words)), timeout=200)
    assert code == 0, err[-3000:]
    for name in runs:
        one, two = (log_of(path / name) for path in (tmp_path / "one", tmp_path))
        for key in ("loss", "grad_norm"):
            assert [line[key] for line in two] == pytest.approx([line[key] for line in one], rel=1e-5), (name, key)
        one, two = (torch.load(path / name / "last.pt")["model"] for path in (tmp_path / "one", tmp_path))
        for part in ("projector.1.running_mean", "predictor.1.running_var", "teacher.projector.1.running_var"):
            torch.testing.assert_close(two[part], one[part], rtol=1e-4, atol=1e-6)

    draw = torch.Generator().manual_seed(0)
    x, weight = torch.randn(8, 5, generator=draw), torch.randn(8, 5, generator=draw)
    norm, x = torch.nn.BatchNorm1d(5), x.requires_grad_()
    out = norm(x)
    (out * weight).sum().backward()
    parts = [torch.load(tmp_path / f"norm{rank}.pt") for rank in (0, 1)]
    torch.testing.assert_close(torch.cat([part[0] for part in parts]), out.detach())
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), x.grad)
    for part in parts:
        assert equal(part[2:], [norm.running_mean, norm.running_var])


def test_batchnorm_of_one_process_is_torchs():
    torch.manual_seed(0)
    ours, theirs = lut.BatchNorm(5), torch.nn.BatchNorm1d(5)
    for _ in range(2):
        x = torch.randn(6, 5)
        assert torch.equal(ours(x), theirs(x))
    assert equal(dict(ours.state_dict()), dict(theirs.state_dict()))
    assert torch.equal(ours.eval()(x), theirs.eval()(x))


# Pictures


@pytest.mark.parametrize("options", [{}, {"target": "pixels", "in_chans": 1}, {"one_directional": True}], ids=repr)
def test_reconstruct_undoes_the_target_and_shows_both_masks(options, monkeypatch):
    model = build(img_size=(32, 64), **options)
    original = torch.randint(0, 256, (6, *model.input_shape), dtype=torch.uint8)
    imgs, noise = transforms.normalize(original), torch.rand(6, model.num_noise)
    monkeypatch.setattr(model, "decode", lambda latent, ids_restore: model.target(imgs[:, 0]))
    model.decoder.pred = torch.nn.Identity()
    rows = lut.reconstruct(model, imgs, noise)
    assert len(rows) == (5 if model.cfg.one_directional else 6)
    assert all(row.shape == (6, *model.input_shape[1:]) and row.min() >= 0 and row.max() <= 1 for row in rows.values())
    exact, masked, pred, pasted, two, *two_masked = rows.values()
    for row in (exact, pasted):
        torch.testing.assert_close(row, original[:, 0] / 255, rtol=0, atol=2e-3)
    shown = [(masked, exact), *((row, two) for row in two_masked)]
    hidden = model.mask(noise[:, :32])[2].view(len(shown), 6, 32)
    is_hidden = layers.expand_mask(hidden[0], model.grid, 8)[:, None]  # (B, 1, H, W)
    torch.testing.assert_close(pred, dimmed(imgs[:, 0], is_hidden), rtol=0, atol=2e-3)
    for (row, whole), mask in zip(shown, hidden, strict=True):
        row, whole = layers.patchify(row, 8), layers.patchify(whole, 8)
        assert torch.equal(row[~mask], whole[~mask]) and not torch.equal(row[mask], whole[mask])
    assert sum("true mean" in title for title in rows) == (model.cfg.target == "norm_pixels")


def test_defaults_are_the_main_recipe():
    defaults, recipe = lut.Config(), ROOT / "configs" / "lut_vit_b.yaml"
    told = vars(config.parse(lut.Config, "", ["--config", str(recipe)]))
    assert {name for name, value in told.items() if value != getattr(defaults, name)} == {"workers"}


GATHER = """
import sys
import torch
import torch.distributed as dist
from lut import all_gather

dist.init_process_group("gloo")
rank = dist.get_rank()
rows = torch.arange(12.0).view(6, 2).sin().requires_grad_()  # (6, 2), three of each process
loss = (all_gather(rows[3 * rank : 3 * rank + 3])[0].square() * torch.arange(12.0).view(6, 2)).sum() * (rank + 1)
loss.backward()
torch.save((loss.detach(), rows.grad), f"{sys.argv[1]}/{rank}.pt")
dist.destroy_process_group()
"""


def test_what_is_gathered_sends_every_gradient_home(tmp_path):
    """Each process has a loss of all rows; a row gets the gradients of both losses, in the process that it is from."""
    (tmp_path / "driver.py").write_text(GATHER)
    code, _, err = finish(fork(tmp_path / "driver.py", tmp_path, world=2))
    assert code == 0, err
    rows, weight = torch.arange(12.0).view(6, 2).sin(), torch.arange(12.0).view(6, 2)
    for rank in (0, 1):
        loss, grad = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(loss, (rows.square() * weight).sum() * (rank + 1))
        own = slice(3 * rank, 3 * rank + 3)
        torch.testing.assert_close(grad[own], (3 * 2 * rows * weight)[own])
        assert not grad[:3].any() if rank else not grad[3:].any()
