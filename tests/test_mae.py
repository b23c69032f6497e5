"""mae.py: what is hidden, what is seen, where every token lies, and that none of it depends on how a batch is cut."""

import dataclasses
import math
import shutil

import pytest
import torch
from conftest import dimmed, log_of

import mae
import models
from common import engine, layers, transforms


def config(**options):
    return mae.Config(**{"model": "vit_tiny", "img_size": (32, 32), "patch_size": 8, "decoder_depth": 1,
                         "decoder_width": 32, "decoder_heads": 2, "target": "pixels", "data": "shapes", **options})


def build(seed=0, **options):
    torch.manual_seed(seed)
    return mae.MAE(config(**options))


def batch(model, B=4, seed=0):
    draw = torch.Generator().manual_seed(seed)
    shape = (B, model.cfg.in_chans, *model.cfg.img_size)
    return torch.randn(shape, generator=draw), torch.rand(B, model.num_noise, generator=draw)


# Patches


@pytest.mark.parametrize("size", [(32, 32), (32, 64), (96, 160)], ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("C", [1, 3, 4, 6])
@pytest.mark.parametrize("p", [2, 4, 8, 16])
def test_patchify_round_trip(size, C, p):
    imgs = torch.randn(2, C, *size)
    grid = (size[0] // p, size[1] // p)
    patches = layers.patchify(imgs, p)
    assert patches.shape == (2, grid[0] * grid[1], p * p * C)
    assert torch.equal(layers.unpatchify(patches, p, grid), imgs)
    k, w = patches.shape[1] - 2, grid[1]  # some patch, by hand: raster order; rows, columns, channels
    by_hand = imgs[1, :, k // w * p : (k // w + 1) * p, k % w * p : (k % w + 1) * p]
    assert torch.equal(patches[1, k], by_hand.permute(1, 2, 0).flatten())


@pytest.mark.parametrize("size,C,p", [((32, 32), 1, 2), ((32, 64), 3, 4), ((96, 160), 4, 8), ((96, 160), 6, 16),
                                      ((32, 32), 3, 16), ((32, 64), 6, 8)])
def test_any_size_channels_and_patch_train(size, C, p):
    model = build(img_size=size, in_chans=C, patch_size=p)
    imgs, noise = batch(model, B=2)
    N, h, w = model.num_noise, size[0] // p, size[1] // p
    assert model.encoder.grid == (h, w) and N == h * w
    ids_keep, ids_restore, mask = model.mask(noise)
    latent = model.encode(imgs, ids_keep, mask)
    assert latent.shape == (2, 1 + N // 4, 96)
    assert model.decode(latent, ids_restore).shape == model.target(imgs).shape == (2, N, p * p * C)
    loss = model(imgs, noise)
    loss.backward()
    assert loss.shape == () and loss.dtype == torch.float32 and loss.isfinite()


# Masks


RATIOS = [(100, 0.9, 10), (25, 0.8, 5), (196, 0.75, 49), (64, 0.1, 57), (64, 0.95, 3), (4, 0.95, 1), (16, 0.6, 6),
          (16, 0.0, 16), (10, 0.7, 3), (49, 0.5, 24), (196, 0.9, 19), (3, 0.99, 1)]


@pytest.mark.parametrize("N,ratio,expected", RATIOS)
@pytest.mark.parametrize("kind", ["random", "grid", "block"])
def test_the_number_of_visible_patches_is_the_stated_rule(kind, N, ratio, expected):
    model = build(img_size=(8, 8 * N), mask=kind, mask_ratio=ratio)
    ids_keep, ids_restore, mask = model.mask(torch.rand(5, N))
    assert ids_keep.shape == (5, expected) and mask.dtype == torch.bool and mask.shape == ids_restore.shape == (5, N)
    assert (~mask).sum(dim=1).tolist() == [expected] * 5
    visible = torch.ones(5, N, dtype=torch.bool).scatter(1, ids_keep, False)
    assert torch.equal(visible, mask)


def test_the_rule_in_full():
    """max(1, floor(N (1 - ratio))), of the ratio that was typed: 100 * (1 - 0.9) is 9.999... in floating point."""
    for N in (4, 9, 16, 25, 49, 60, 100, 196, 256):
        model = build(img_size=(8, 8 * N))
        for percent in range(0, 100, 5):
            model.cfg.mask_ratio = float(f"{percent / 100:.2f}")
            assert model.mask(torch.rand(1, N))[0].shape[1] == max(1, N * (100 - percent) // 100), (N, percent)


@pytest.mark.parametrize("kind", ["random", "grid", "block"])
def test_masks_are_pure_and_differ_between_images(kind):
    model = build(img_size=(64, 64), mask=kind, mask_ratio=0.6)
    noise = torch.rand(32, 64)
    before = noise.clone()
    one, two = model.mask(noise), model.mask(noise)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True)) and torch.equal(noise, before)
    alone = torch.cat([model.mask(row[None])[2] for row in noise])  # whatever else is in the batch
    assert torch.equal(alone, one[2])
    assert len({tuple(row.tolist()) for row in one[2]}) == 32


def test_random_masks_hide_every_patch_equally_often():
    shares = build(img_size=(64, 64)).mask(torch.rand(4000, 64))[2].float().mean(dim=0)
    assert (shares - 0.75).abs().max() < 0.04  # 6 standard deviations


def test_ids_restore_puts_a_shuffled_list_back():
    model = build(img_size=(32, 64))
    ids_keep, ids_restore, mask = model.mask(torch.rand(3, 32))
    hidden = mask.nonzero()[:, 1].view(3, -1)
    listed = torch.cat([ids_keep, torch.full_like(hidden, -1)], dim=1).gather(1, ids_restore)
    assert torch.equal(listed, torch.arange(32).expand(3, -1).masked_fill(mask, -1))


def test_equal_noise_is_broken_the_same_way_everywhere():
    """By a stable sort. (Of 16 and fewer, an unstable one may look stable.)"""
    assert build(img_size=(64, 64)).mask(torch.zeros(2, 64))[0].tolist() == [list(range(16))] * 2


def test_grid_keeps_the_top_left_patch_of_every_cell():
    model = build(img_size=(32, 64), mask="grid")
    visible = ~model.mask(torch.rand(3, 32))[2].view(3, 4, 8)
    assert torch.equal(visible, (torch.arange(4)[:, None] % 2 + torch.arange(8) % 2 == 0).expand(3, -1, -1))
    fewer, more = build(img_size=(32, 64), mask="grid", mask_ratio=0.9), build(img_size=(32, 64), mask="grid",
                                                                                mask_ratio=0.5)
    noise = torch.rand(3, 32)
    assert not (~fewer.mask(noise)[2].view(3, 4, 8) & ~visible).any()  # a part of the corners
    assert (visible & ~more.mask(noise)[2].view(3, 4, 8)).equal(visible)  # all corners, and more


def largest_region(hidden):
    """Patches of the largest 4-connected region of a bool grid."""
    rest, best = {tuple(place) for place in hidden.nonzero().tolist()}, 0
    while rest:
        front, size = [rest.pop()], 0
        while front:
            row, column = front.pop()
            size += 1
            for near in ((row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)):
                if near in rest:
                    rest.remove(near)
                    front.append(near)
        best = max(best, size)
    return best


@pytest.mark.parametrize("size", [(112, 112), (64, 160)], ids=["14x14", "8x20"])
def test_block_masks_hide_large_regions(size):
    noise = torch.rand(40, size[0] * size[1] // 64)
    for ratio in (0.4, 0.5, 0.75):
        masks = {kind: build(img_size=size, mask=kind, mask_ratio=ratio).mask(noise)[2].view(40, size[0] // 8, -1)
                 for kind in ("random", "block")}
        edges = {kind: ((m[:, 1:] != m[:, :-1]).sum() + (m[:, :, 1:] != m[:, :, :-1]).sum()).item()
                 for kind, m in masks.items()}
        assert edges["block"] < 0.6 * edges["random"], (ratio, edges)  # borders between hidden and visible
        if ratio < 0.59:  # above, random patches percolate, too
            means = {kind: sum(map(largest_region, m)) / 40 for kind, m in masks.items()}
            assert means["block"] > 2 * means["random"], (ratio, means)


def test_block_masks_cover_every_place():
    shares = build(img_size=(64, 64), mask="block", mask_ratio=0.5).mask(torch.rand(1000, 64))[2].float().mean(dim=0)
    assert 0.08 < shares.min() and shares.max() < 0.9  # corners least, the centre most


# Target and loss


@pytest.mark.parametrize("target", ["pixels", "norm_pixels", "pca"])
def test_visible_pixels_enter_neither_loss_nor_target(target):
    model = build(target=target, pca_dim=10)
    imgs, noise = batch(model)
    mae.prepare(model, imgs, noise)
    mask = model.mask(noise)[2]
    pred = torch.randn_like(model.target(imgs))
    shown = torch.where(mask[..., None], 0.0, torch.randn_like(layers.patchify(imgs, 8)) * 9)
    other = imgs + layers.unpatchify(shown, 8, model.encoder.grid)
    assert torch.equal(model.target(imgs)[mask], model.target(other)[mask])
    assert not torch.equal(model.target(imgs)[~mask], model.target(other)[~mask])
    assert torch.equal(model.loss(pred, model.target(imgs), mask), model.loss(pred, model.target(other), mask))
    changed = torch.where(mask[..., None], pred, torch.full_like(pred, 1e6))  # nor does what is painted there
    assert torch.equal(model.loss(pred, model.target(imgs), mask), model.loss(changed, model.target(imgs), mask))


def test_hidden_pixels_do_not_reach_the_encoder():
    model = build()
    imgs, noise = batch(model)
    ids_keep, _, mask = model.mask(noise)
    hidden = torch.where(mask[..., None], torch.randn_like(layers.patchify(imgs, 8)), 0.0)
    other = imgs + layers.unpatchify(hidden, 8, model.encoder.grid)
    for encoder in (model, build(mask_tokens_in_encoder=True)):
        one, two = (encoder.encode(x, ids_keep, mask) for x in (imgs, other))
        assert torch.equal(one, two)


def test_the_loss_by_hand():
    model = build()
    imgs, noise = batch(model)
    ids_keep, ids_restore, mask = model.mask(noise)
    pred = model.decode(model.encode(imgs, ids_keep, mask), ids_restore)
    errors = [(pred[b, n] - layers.patchify(imgs, 8)[b, n]).square().mean()
              for b in range(4) for n in range(16) if mask[b, n]]
    torch.testing.assert_close(model(imgs, noise), torch.stack(errors).mean())
    assert len(errors) == 4 * 12
    uneven = torch.rand(4, 16) < 0.4  # a mean over patches, not over images
    error = (pred - model.target(imgs)).square().mean(dim=2)
    torch.testing.assert_close(model.loss(pred, model.target(imgs), uneven), error[uneven].mean())


def test_normalised_pixels_have_mean_0_and_unbiased_std_1():
    model = build(target="norm_pixels")
    target = model.target(batch(model)[0] * 3 + 5)
    torch.testing.assert_close(target.mean(dim=2), torch.zeros(4, 16), rtol=0, atol=1e-5)
    torch.testing.assert_close(target.std(dim=2), torch.ones(4, 16), rtol=1e-4, atol=1e-4)
    flat = model.target(torch.ones(2, 3, 32, 32))
    assert flat.abs().max() == 0  # a patch of one value: no division by zero


def test_statistics_of_nearly_flat_patches():
    """Where the 1e-6 shows: it is added to the variance, below the root."""
    patches = 1e-3 * torch.randn(2, 4, 48, dtype=torch.float64)
    mean, std = layers.patch_statistics(patches)
    pixels = patches.numpy()
    torch.testing.assert_close(mean[..., 0], torch.from_numpy(pixels.mean(axis=2)))
    torch.testing.assert_close(std[..., 0], torch.from_numpy((pixels.var(axis=2, ddof=1) + 1e-6) ** 0.5))


def test_nothing_hidden_is_loss_0():
    model = build(mask_ratio=0.0)
    loss = model(*batch(model))
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_pca_target():
    model = build(target="pca", pca_dim=20)
    base = torch.randn(6, 192, generator=torch.Generator().manual_seed(0))
    imgs = layers.unpatchify(torch.randn(64, 16, 6) @ base + 2, 8, (4, 4))  # patches of rank 6, off centre
    imgs = imgs + 0.01 * torch.randn_like(imgs)
    trivial = mae.prepare(model, imgs, torch.rand(64, 16))
    gram = model.pca_basis.T @ model.pca_basis
    torch.testing.assert_close(gram, torch.eye(20), rtol=0, atol=1e-5)
    centred = layers.patchify(imgs, 8).flatten(0, 1) - model.pca_mean
    coefficients = centred @ model.pca_basis
    variances = coefficients.var(dim=0)
    assert variances[:6].sum() > 0.999 * centred.var(dim=0).sum()  # the largest ones come first
    assert (variances[:6].diff() < 0).all() and variances[6:].max() < 1e-3 * variances[5]
    torch.testing.assert_close(model.target(imgs).flatten(0, 1), coefficients)
    assert model.decode(torch.randn(2, 5, 96), torch.arange(16).expand(2, -1)).shape == (2, 16, 20)
    assert trivial["zero"] == pytest.approx(coefficients.square().mean().item(), rel=0.1)


@pytest.mark.parametrize("target", ["pixels", "norm_pixels", "pca"])
def test_trivial_predictors(target):
    """What --out prints before the first step, by hand: zero, and every patch in its own mean colour."""
    model = build(target=target, pca_dim=12)
    imgs, noise = batch(model, B=16)
    imgs = imgs + torch.randn(16, 3, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    told = mae.prepare(model, imgs, noise)
    mask = model.mask(noise)[2]
    painted = imgs.unflatten(2, (4, 8)).unflatten(4, (4, 8)).mean(dim=(3, 5))  # (B, C, 4, 4)
    painted = painted.repeat_interleave(8, 2).repeat_interleave(8, 3)
    target_of, patches = model.target(imgs), layers.patchify(painted, 8)
    if target == "norm_pixels":
        mean, std = layers.patch_statistics(layers.patchify(imgs, 8))
        patches = (patches - mean) / std
    elif target == "pca":
        patches = (patches - model.pca_mean) @ model.pca_basis
    assert told["zero"] == pytest.approx(target_of[mask].square().mean().item(), rel=1e-3)
    assert told["patch mean"] == pytest.approx((target_of - patches)[mask].square().mean().item(), rel=1e-3)


# Positions


@pytest.mark.parametrize("kind", ["random", "grid", "block"])
@pytest.mark.parametrize("size", [(32, 64), (64, 32), (24, 40)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_every_decoder_token_sits_at_its_own_position(size, kind, monkeypatch):
    """Features are their own patch number: what arrives at position n of the decoder must be n, or a mask token."""
    model = build(img_size=size, mask=kind)
    N = model.num_noise
    _, noise = batch(model)
    ids_keep, ids_restore, mask = model.mask(noise)
    tokens = torch.arange(N, dtype=torch.float32)[None, :, None].expand(4, -1, 96)
    seen = {}
    def encode(tokens, coords=None):
        seen["encoder"] = tokens[..., 0], coords
        return torch.cat([torch.full((len(tokens), 1, 96), -7.0), tokens], dim=1)

    def decode(x):
        seen["decoder"] = x[..., 0]
        return x

    monkeypatch.setattr(model.encoder, "embed", lambda tokens: tokens)
    monkeypatch.setattr(model.encoder, "encode", encode)
    monkeypatch.setattr(model.decoder, "embed", torch.nn.Identity())
    monkeypatch.setattr(model.decoder, "forward", decode)
    model.cfg = dataclasses.replace(model.cfg, decoder_width=96)
    model.mask_token = torch.nn.Parameter(torch.full((1, 1, 96), -1.0))
    model.decode(model.encode(tokens, ids_keep, mask), ids_restore)
    number, coords = seen["encoder"]
    assert torch.equal(number, ids_keep.float())  # and the encoder is told the right (row, column)
    w = size[1] // 8
    assert torch.equal(coords[..., 0] * w + coords[..., 1], ids_keep) and coords[..., 1].max() < w
    expected = torch.arange(N).expand(4, -1).masked_fill(mask, -1).float()
    assert torch.equal(seen["decoder"], torch.cat([torch.full((4, 1), -7.0), expected], dim=1))


def test_positions_are_row_and_column_of_the_grid():
    """By hand, at one patch of a non-square grid: the column first, as in the published weights (M17)."""
    table, row, column, D = layers.sincos_positions((3, 5), 16), 1, 3, 16
    frequencies = torch.tensor([10000 ** (-i / 4) for i in range(4)], dtype=torch.float64)
    by_hand = [f(x * frequencies) for x in (column, row) for f in (torch.sin, torch.cos)]
    assert table.shape == (1, 16, D) and table[:, 0].abs().max() == 0
    torch.testing.assert_close(table[0, 1 + row * 5 + column], torch.cat(by_hand).float())
    assert not torch.equal(layers.sincos_positions((4, 16), 16), layers.sincos_positions((8, 8), 16))


def test_positions_of_two_places():
    """At a width of 4 there is one frequency, 1."""
    table = layers.sincos_positions((2, 3), 4, num_prefix=2)
    expected = [[0, 1, 0, 1], [math.sin(2), math.cos(2), math.sin(1), math.cos(1)]]  # places (0, 0) and (1, 2)
    torch.testing.assert_close(table[0, [2, 7]], torch.tensor(expected))
    assert table.shape == (1, 8, 4) and table[:, :2].abs().max() == 0


def test_an_encoder_gathers_positions_at_coords():
    """A subset with its coordinates is the full grid with the other tokens taken out before the first block."""
    encoder = models.build("vit_tiny", (32, 64), 8, learn_positions=True)
    with torch.no_grad():
        encoder.pos_embed.normal_(generator=torch.Generator().manual_seed(0))
    tokens = encoder.embed(torch.randn(2, 3, 32, 64))
    ids = torch.rand(2, 32).argsort(dim=1)[:, :9]
    picked = tokens.gather(1, ids[..., None].expand(-1, -1, 96))
    got = encoder.encode(picked, torch.stack([ids // 8, ids % 8], dim=2))
    placed = tokens + encoder.pos_embed[:, 1:]
    x = torch.cat([(encoder.cls_token + encoder.pos_embed[:, :1]).expand(2, -1, -1),
                   placed.gather(1, ids[..., None].expand(-1, -1, 96))], dim=1)
    for block in encoder.blocks:
        x = block(x)
    torch.testing.assert_close(got, encoder.norm(x))
    everywhere = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(8), indexing="ij"), dim=2).view(1, 32, 2)
    torch.testing.assert_close(encoder.encode(tokens, everywhere.expand(2, -1, -1)), encoder.encode(tokens))


def test_the_order_of_visible_tokens_does_not_matter():
    encoder = models.build("vit_tiny", (32, 32), 8)
    tokens, places = encoder.embed(torch.randn(1, 3, 32, 32)), torch.arange(16)
    coords = torch.stack([places // 4, places % 4], dim=1)
    turn = torch.randperm(16)
    straight, turned = encoder.encode(tokens, coords[None]), encoder.encode(tokens[:, turn], coords[None, turn])
    torch.testing.assert_close(turned[:, 1:], straight[:, 1 + turn], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("has_bias", [False, True])
def test_attention_in_bf16_on_a_cpu_is_that_in_fp32(has_bias):
    """There it is written out."""
    attention = layers.Attention(8, 2)
    q, k, v = torch.randn(3, 2, 2, 5, 4)  # each (B, heads, N, D/heads)
    bias = torch.randn(2, 1, 5, 5) if has_bias else None
    low = attention.attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), bias)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), attention.attend(q, k, v, bias), rtol=0.03, atol=0.03)


def test_noise_decides_which_blocks_an_image_skips():
    encoder = models.build("vit_tiny", (32, 32), 8, drop_path=0.5).train()
    tokens, noise = encoder.embed(torch.randn(2, 3, 32, 32)), torch.ones(2, 2 * len(encoder.blocks))
    noise[1] = 0  # it skips what it may: all but the first block
    latent, without = encoder.encode(tokens, noise=noise), encoder.encode(tokens)
    assert not torch.allclose(latent[0], without[0])  # branches that are kept count for those that are not
    encoder.blocks = encoder.blocks[:1]
    torch.testing.assert_close(latent[1], encoder.encode(tokens)[1])


# Gradients and options


@pytest.mark.parametrize("options", [{}, {"mask": "grid"}, {"target": "norm_pixels"}, {"mask_tokens_in_encoder": True},
                                     {"activation_checkpointing": True}, {"target": "pca", "pca_dim": 8}], ids=repr)
def test_every_trainable_parameter_gets_a_gradient(options):
    model = build(**options)
    imgs, noise = batch(model)
    mae.prepare(model, imgs, noise)
    model(imgs, noise).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0, name


def gradients(model, imgs, noise):
    model.zero_grad()
    loss = model(imgs, noise)
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}


def test_activation_checkpointing_changes_nothing():
    plain, thrifty = build(), build(activation_checkpointing=True)
    imgs, noise = batch(plain)
    (a, da), (b, db) = gradients(plain, imgs, noise), gradients(thrifty, imgs, noise)
    assert torch.equal(a, b) and all(torch.equal(da[n], db[n]) for n in da)


def test_compile_captures_one_graph_and_changes_nothing(monkeypatch):
    """Everything of torch.compile but the generated code: forward and backward in one graph, no break, same numbers."""
    model = build()
    imgs, noise = batch(model)
    (plain, before), names = gradients(model, imgs, noise), list(model.state_dict())
    monkeypatch.setattr(model, "compile", lambda: torch.nn.Module.compile(model, backend="aot_eager", fullgraph=True))
    engine.Run(config(compile=True)).distribute(model)
    compiled, after = gradients(model, imgs, noise)
    assert list(model.state_dict()) == names  # no _orig_mod in checkpoints
    torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-6)
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.skipif(not (shutil.which("cc") or shutil.which("gcc")), reason="torch.compile needs a C compiler")
def test_compiled_code_gives_the_same_loss(monkeypatch):
    """Forward alone, and tiny: even so most of half a minute goes into the C++ compiler."""
    monkeypatch.setitem(models.VIT, "vit_test", (16, 1, 2))
    model = build(model="vit_test", decoder_width=16, img_size=(16, 16), patch_size=4)
    imgs, noise = batch(model)
    with torch.no_grad():
        plain = model(imgs, noise)
        engine.Run(config(compile=True)).distribute(model)
        assert model(imgs, noise).item() == pytest.approx(plain.item(), rel=1e-4)


@pytest.mark.parametrize("options", [{}, {"target": "pca", "pca_dim": 8}, {"mask_tokens_in_encoder": True}], ids=repr)
def test_bf16_autocast_keeps_target_and_loss_in_fp32(options):
    model = build(**options)
    imgs, noise = batch(model)
    mae.prepare(model, imgs, noise)
    exact = model(imgs, noise)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(imgs, noise)
        assert model.target(imgs.bfloat16()).dtype == torch.float32
    loss.backward()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact.item(), rel=0.02)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_mask_tokens_in_the_encoder_cost_what_they_should():
    """The paper's slow ablation: the encoder sees all N tokens, hidden ones as one learned vector."""
    model = build(mask_tokens_in_encoder=True)
    imgs, noise = batch(model)
    ids_keep, _, mask = model.mask(noise)
    assert model.encode(imgs, ids_keep, mask).shape == (4, 17, 96)
    assert model.mask_token.shape == (1, 1, 96)
    assert model(imgs, noise).isfinite()


def same_training(runs):
    """Logged losses and gradient norms, and so the weights behind them, agree between runs [(log, model)]."""
    (whole, weights), *others = runs
    for log, model in others:
        for key in ("loss", "grad_norm"):
            assert [line[key] for line in log] == pytest.approx([line[key] for line in whole], rel=2e-6), key
        for name in weights:
            if not name.endswith("qkv.bias"):  # a key's bias has gradient 0: Adam makes steps out of its rounding
                torch.testing.assert_close(model[name], weights[name], rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("clip", [0, 0.05])
def test_one_batch_equals_micro_batches(tiny, call, tmp_path, clip):
    """Through the script: 8 images at once, 2 x 4, 4 x 2, 8 x 1; clipping acts on the whole gradient."""
    runs = []
    for micro in (8, 4, 2, 1):
        out = tmp_path / str(micro)
        assert call(mae.main, tiny(micro_batch=micro, clip_grad=clip, max_steps=4, out=out)).code == 0
        runs.append((log_of(out), torch.load(out / "last.pt")["model"]))
    assert len(runs[0][0]) == 4 and runs[0][0][0]["grad_norm"] > 0.05  # there is something to clip
    same_training(runs)


def test_clipping_clips(tiny, call, tmp_path):
    """Adam does not see a constant factor, but norms that differ: two steps with and without end elsewhere."""
    for clip in (0, 0.05):
        assert call(mae.main, tiny(clip_grad=clip, max_steps=4, out=tmp_path / str(clip))).code == 0
    one, two = (torch.load(tmp_path / clip / "last.pt") for clip in ("0", "0.05"))
    assert not torch.equal(one["model"]["mask_token"], two["model"]["mask_token"])
    moments = two["optimizer"]["state"].values()
    assert sum(m["exp_avg_sq"].sum().item() for m in moments) <= 0.05**2 * (1 - 0.95**4) * 1.001


@pytest.mark.parametrize("clip", [0, 0.05])
def test_a_short_last_batch_weighs_its_images_alike(tiny, call, tmp_path, clip):
    """36 images in batches of 25 leave 11, which micro-batches of at most 5 cut unevenly, into 3 + 4 + 4."""
    runs = []
    for micro in (25, 5):
        out = tmp_path / str(micro)
        words = tiny(batch_size=25, micro_batch=micro, clip_grad=clip, drop_last="false", epochs=2, out=out)
        assert call(mae.main, words).code == 0
        runs.append((log_of(out), torch.load(out / "last.pt")["model"]))
    assert len(runs[0][0]) == 4  # two an epoch
    same_training(runs)


# Pictures


@pytest.mark.parametrize("target", ["pixels", "norm_pixels", "pca"])
@pytest.mark.parametrize("size,C", [((32, 32), 3), ((32, 64), 1)], ids=["32x32x3", "32x64x1"])
def test_reconstruct_undoes_the_target(target, size, C, monkeypatch):
    """A decoder that paints the target itself must give back the image, in [0, 1], whatever the target."""
    model = build(target=target, img_size=size, in_chans=C, pca_dim=8 * 8 * C)
    original = torch.randint(0, 256, (16, C, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    imgs, noise = transforms.normalize(original), torch.rand(16, model.num_noise)
    mae.prepare(model, imgs, noise)
    monkeypatch.setattr(model, "decode", lambda latent, ids_restore: model.target(imgs))
    rows = mae.reconstruct(model, imgs, noise)
    kinds = [title.split("\n")[0] for title in rows]
    assert kinds == ["original", "masked", "prediction", "prediction"]
    pictures, (exact, masked, pred, pasted) = original / 255, rows.values()
    for row in rows.values():
        assert row.shape == imgs.shape and row.min() >= 0 and row.max() <= 1
    for row in (exact, pasted):
        torch.testing.assert_close(row, pictures, rtol=0, atol=2e-3)
    hidden = model.mask(noise)[2]
    is_hidden = layers.expand_mask(hidden, model.grid, 8)[:, None]  # (B, 1, H, W)
    torch.testing.assert_close(pred, dimmed(imgs, is_hidden), rtol=0, atol=2e-3)
    shown = layers.patchify(masked, 8)
    assert torch.allclose(shown[~hidden], layers.patchify(pictures, 8)[~hidden], atol=1e-6)
    assert shown[hidden].std(dim=0).max() < 1e-6  # one grey for everything hidden
    says_so = [title for title in rows if "true mean" in title]
    assert len(says_so) == (target == "norm_pixels")  # the picture tells what was taken from the original


def test_reconstruct_pastes_between_what_was_visible():
    model = build()
    imgs, noise = batch(model)
    exact, _, pred, pasted = (layers.patchify(row, 8) for row in mae.reconstruct(model, imgs, noise).values())
    hidden = model.mask(noise)[2]
    assert torch.equal(pasted[hidden], pred[hidden]) and torch.equal(pasted[~hidden], exact[~hidden])
    assert not torch.equal(pred[~hidden], exact[~hidden])


# Whole runs


@pytest.mark.parametrize("changes", [
    {"target": "pca", "pca_dim": 8, "mask": "block"}, {"mask_tokens_in_encoder": "true", "mask": "grid"},
    {"img_size": "16x32", "crop_scale": "0.5,1", "mask_ratio": 0.5}, {"in_chans": 1, "precision": "bf16"},
    {"in_chans": 4, "activation_checkpointing": "true"}, {"patch_size": 2, "target": "norm_pixels"}], ids=repr)
def test_a_run_with_options(tiny, call, tmp_path, changes):
    done = call(mae.main, tiny(max_steps=2, out=tmp_path / "run", picture_epochs=0.1, **changes))
    assert done.code == 0 and done.err == ""
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "config.yaml", "encoder.pt", "last.pt", "log.jsonl", "pictures"]
    assert all(math.isfinite(line["loss"]) for line in log_of(tmp_path / "run"))
    assert len(list((tmp_path / "run" / "pictures").glob("*.png"))) == 2
    assert "trivial predictors" in done.out and "patch mean" in done.out


def test_it_learns(tiny, call, tmp_path):
    """A few dozen steps on 36 images: the loss falls below that of predicting nothing."""
    words = tiny(target="pixels", epochs=20, warmup_epochs=2, base_lr=0.06, clip_grad=1, batch_size=12, micro_batch=12,
                 log_every=10, out=tmp_path / "run")
    done = call(mae.main, words)
    zero = float(done.out.split("'zero': ")[1].split(",")[0])
    losses = [line["loss"] for line in log_of(tmp_path / "run")]
    assert losses[-1] < 0.7 * zero < losses[0], (losses, zero)
