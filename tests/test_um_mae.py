"""um_mae.py: what is kept and what is hidden, that a compact image is what the paper says it is, and that every token
keeps its own place from the pixels to the decoder."""

import dataclasses
import math

import pytest
import torch
from conftest import ROOT, batch, dimmed, equal, flags, gradients, log_of
from encoders import read_encoder

import finetune
import models
import um_mae
from common import layers, transforms

KINDS = {"swin": {"model": "swin_tiny", "window": 8}, "pvt": {"model": "pvt_tiny"},
         "vit": {"model": "vit_tiny", "patch_size": 8}}
SIZES = {"64x64": (64, 64), "64x128": (64, 128), "192x64": (192, 64)}


def config(kind="swin", **options):
    return um_mae.Config(**{**KINDS[kind], "unit": 8, "img_size": (64, 64), "target": "pixels", "decoder_depth": 1,
                            "decoder_width": 32, "decoder_heads": 2, **options})


def build(kind="swin", seed=0, **options):
    torch.manual_seed(seed)
    cfg = config(kind, **options)
    cfg.check()
    return um_mae.UMMAE(cfg)


def predict(model, imgs, noise):
    ids_keep, secondary, _ = model.mask(noise)
    return model.decode(model.encode(imgs, ids_keep, secondary), ids_keep)


def changed_where(model, imgs, units, seed=1):
    """The images with other pixels on the units (B, U) bool."""
    side, noise = model.cfg.unit, torch.randn(imgs.shape, generator=torch.Generator().manual_seed(seed))
    where = units.view(-1, 1, *model.grid).repeat_interleave(side, 2).repeat_interleave(side, 3)
    return torch.where(where, noise, imgs)


# Masks


@pytest.mark.parametrize("grid", [(4, 4), (4, 8), (12, 6)], ids=str)
def test_every_cell_keeps_one_unit_in_the_order_of_the_compact_image(grid):
    (h, w), noise = grid, torch.rand(50, grid[0] * grid[1])
    for name in ("uniform", "grid"):
        ids = um_mae.SAMPLING[name](noise, grid)
        assert ids.shape == (50, h * w // 4)
        cell = ids // w // 2 * (w // 2) + ids % w // 2
        assert torch.equal(cell, torch.arange(h * w // 4).expand(50, -1))
    assert torch.equal(ids // w % 2 + ids % w % 2, torch.zeros_like(ids))  # grid: top left
    random = um_mae.random_sampling(noise, grid)
    assert random.shape == ids.shape and (random.diff(dim=1) > 0).all()  # raster order, nothing twice
    visible = noise.gather(1, random).max(dim=1).values
    assert ((noise < visible[:, None]).sum(dim=1) == h * w // 4 - 1).all()  # the lowest noise


def test_uniform_sampling_takes_every_place_of_a_cell_equally_often():
    ids = um_mae.uniform_sampling(torch.rand(4000, 16), (4, 4))
    shares = torch.bincount(ids.flatten(), minlength=16) / 4000
    assert (shares - 0.25).abs().max() < 0.04  # 6 standard deviations
    assert torch.equal(um_mae.uniform_sampling(torch.zeros(1, 16), (4, 4)), torch.tensor([[0, 2, 8, 10]]))  # a tie


def test_random_sampling_takes_the_first_of_equal_noise():
    assert um_mae.random_sampling(torch.zeros(2, 64), (8, 8)).tolist() == [list(range(16))] * 2


@pytest.mark.parametrize("sampling", ["uniform", "grid", "random"])
def test_masks_are_pure_functions_of_noise_and_grid(sampling):
    """Of the units' grid, that is: whatever the backbone and its patches, and whoever else is in the batch."""
    kinds = ["vit"] if sampling == "random" else ["vit", "swin", "pvt"]
    built = [build(kind, sampling=sampling, img_size=(64, 128)) for kind in kinds]
    noise = torch.rand(20, built[0].num_noise)
    before, reference = noise.clone(), built[0].mask(noise)
    for model in built:
        alone = [torch.cat(part) for part in zip(*map(model.mask, noise.split(1)), strict=True)]
        for found in (model.mask(noise), alone):
            assert all(torch.equal(a, b) for a, b in zip(found, reference, strict=True))
    ids_keep, secondary, mask = reference
    assert torch.equal(noise, before) and secondary.dtype == mask.dtype == torch.bool
    assert torch.equal(torch.ones_like(mask).scatter(1, ids_keep, False), mask)
    assert mask.sum(dim=1).unique().tolist() == [96] and len({tuple(row.tolist()) for row in secondary}) == 20
    doubled = build("vit", patch_size=16, unit=16, img_size=(128, 256), sampling=sampling).mask(noise)
    assert all(torch.equal(a, b) for a, b in zip(doubled, reference, strict=True))  # the same grid of larger units


def test_secondary_masking_leaves_the_floor_of_what_is_kept():
    """floor(K (1 - ratio)) units, at least one, of the ratio that was typed; exact where floating point is not."""
    for K in (1, 4, 9, 16, 25, 36, 49, 60, 64, 100, 256):
        noise, ids_keep = torch.rand(3, 4 * K), torch.rand(3, 4 * K).argsort(dim=1)[:, :K]
        for percent in range(0, 100, 5):
            hidden = um_mae.secondary_mask(noise, ids_keep, float(f"{percent / 100:.2f}"))
            assert ((~hidden).sum(dim=1) == max(1, K * (100 - percent) // 100)).all(), (K, percent)
            seen, unseen = (noise.gather(1, ids_keep).masked_fill(m, f) for m, f in ((hidden, -1), (~hidden, 2)))
            assert (seen.amax(dim=1) < unseen.amin(dim=1)).all()
    tied = um_mae.secondary_mask(torch.zeros(2, 256), torch.arange(0, 256, 4).expand(2, -1), 0.25)
    assert tied.tolist() == [[False] * 48 + [True] * 16] * 2  # of equal noise, the first stay visible
    for size, patch, visible in (((256, 256), 16, 48), ((224, 224), 16, 36)):  # the paper's two
        model = build("vit", img_size=size, patch_size=patch, unit=patch)
        assert (~model.mask(torch.rand(2, model.num_noise))[1]).sum(dim=1).tolist() == [visible] * 2


def average_distance(visible, unit=16):
    """Mean distance in pixels of the hidden pixels to the nearest visible pixel, masks (B, h, w) bool (SimMIM's
    AvgDist), by its definition: nearest pixel of every visible unit, then the nearest of these."""
    (h, w), total, count = visible.shape[1:], 0, 0
    for mask in visible:
        rows, columns = mask.nonzero().T * unit  # (V,), top left pixel of every visible unit
        gaps = []
        for n, first in ((h, rows), (w, columns)):
            pixel = torch.arange(n * unit)[:, None]
            gaps.append((pixel - pixel.maximum(first).minimum(first + unit - 1)).float())  # (n * unit, V)
        nearest = (gaps[0][:, None].square() + gaps[1].square()).amin(dim=2).sqrt()  # (H, W)
        total, count = total + nearest.sum(), count + (nearest > 0).sum()
    return (total / count).item()


def test_the_average_distance_of_the_four_strategies():
    """256 px in units of 16: GS < US < RS < UM, the order of losses in the paper's Table 1. Values by an independent
    simulation: US 7.4, RS 10.1, UM 10.3; secondary masking restores the distance that uniform sampling took."""
    noise, found = torch.rand(24, 512, generator=torch.Generator().manual_seed(0)), {}
    strategies = {"RS": ("random", 0), "GS": ("grid", 0), "US": ("uniform", 0), "UM": ("uniform", 0.25)}
    for name, (sampling, ratio) in strategies.items():
        model = build("vit", img_size=(256, 256), unit=16, patch_size=16, sampling=sampling, secondary_ratio=ratio)
        ids_keep, secondary, mask = model.mask(noise)
        visible = ~mask.scatter(1, ids_keep, secondary)
        found[name] = average_distance(visible[:1 if name == "GS" else None].view(-1, 16, 16))
    assert found == pytest.approx({"RS": 10.1, "GS": found["GS"], "US": 7.4, "UM": 10.3}, abs=0.15)
    assert sorted(found, key=found.get) == ["GS", "US", "RS", "UM"], found


# What enters the encoder, and what the loss


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_perturbing_units(kind, size):
    """Behind a token: neither prediction nor loss sees the pixels. Dropped: the target alone. Kept and visible: the
    prediction, and no loss on the unit itself."""
    model = build(kind, img_size=SIZES[size])
    imgs, noise = batch(model)
    ids_keep, secondary, dropped = model.mask(noise)
    behind = torch.zeros_like(dropped).scatter(1, ids_keep, secondary)
    with torch.no_grad():
        pred, loss, target = predict(model, imgs, noise), model(imgs, noise), model.target(imgs)
        other = changed_where(model, imgs, behind)
        assert not torch.equal(other, imgs)
        assert torch.equal(predict(model, other, noise), pred) and torch.equal(model(other, noise), loss)
        other = changed_where(model, imgs, dropped)
        assert torch.equal(predict(model, other, noise), pred) and not torch.equal(model(other, noise), loss)
        assert torch.equal(model.target(other)[~dropped], target[~dropped])
        other = changed_where(model, imgs, ~dropped & ~behind)
        assert not torch.equal(predict(model, other, noise), pred)
        assert torch.equal(model.loss(pred, model.target(other), dropped), model.loss(pred, target, dropped))
        painted = torch.where(dropped[..., None], pred, 1e6)  # nothing counts that is painted on the kept quarter
        assert torch.equal(model.loss(painted, target, dropped), model.loss(pred, target, dropped))


@pytest.mark.parametrize("target", ["pixels", "norm_pixels"])
def test_the_loss_by_hand(target):
    model = build(target=target)
    imgs, noise = batch(model)
    dropped, pred = model.mask(noise)[2], predict(model, imgs, noise)
    errors, guesses = [], {"zero": [], "unit mean": []}
    for b, n in dropped.nonzero().tolist():
        row, column = n // 8 * 8, n % 8 * 8
        pixels = imgs[b, :, row : row + 8, column : column + 8].permute(1, 2, 0)  # (8, 8, C)
        flat = pixels.mean(dim=(0, 1)).expand_as(pixels)
        if target == "norm_pixels":
            mean, std = pixels.mean(), (pixels.var() + 1e-6).sqrt()
            pixels, flat = (pixels - mean) / std, (flat - mean) / std
        errors.append((pred[b, n] - pixels.flatten()).square().mean())
        guesses["zero"].append(pixels.square().mean())
        guesses["unit mean"].append((pixels - flat).square().mean())
    assert len(errors) == 3 * 48
    torch.testing.assert_close(model(imgs, noise), torch.stack(errors).mean())
    by_hand = {name: torch.stack(values).mean().item() for name, values in guesses.items()}
    assert um_mae.prepare(model, imgs, noise) == pytest.approx(by_hand, abs=1e-4)


# Positions


def traced(model, monkeypatch):
    """Pixels, tokens, latents and decoder tokens all carry the number of the unit that they come from, -1 a mask token,
    -7 a class token: what the encoder is told about places, and what arrives in the decoder, (B, P + U)."""
    seen, P = {}, model.encoder.num_prefix

    def encode(tokens, coords=None, grid=None):
        seen["number"], seen["coords"], up = tokens[..., 0], coords, model.up
        side, (h, w) = model.cfg.unit // model.encoder.stride, grid
        units = tokens.view(len(tokens), h // side, side, w // side, side)[:, :, 0, :, 0]  # (B, h', w')
        units = units.unflatten(2, (-1, up)).unflatten(1, (-1, up)).transpose(2, 3).flatten(3).flatten(1, 2)
        return torch.cat([units.new_full((len(units), P, up * up), -7), units], dim=1)

    monkeypatch.setattr(model.encoder, "embed", lambda imgs: imgs[:, 0, ::s, ::s].flatten(1)[..., None])
    monkeypatch.setattr(model.encoder, "encode", encode)
    monkeypatch.setattr(model.encoder.patch_embed, "norm", torch.nn.Identity())
    monkeypatch.setattr(model.decoder, "embed", torch.nn.Identity())
    monkeypatch.setattr(model.decoder, "forward", lambda x: x[..., 0])
    model.cfg = dataclasses.replace(model.cfg, decoder_width=1)
    model.mask_token, model.secondary_token = (torch.nn.Parameter(torch.full((1, 1, 1), float(n))) for n in (-1, -2))
    s, (h, w), B = model.encoder.stride, model.grid, 5
    noise = torch.rand(B, model.num_noise)
    ids_keep, secondary, mask = model.mask(noise)
    numbers = torch.arange(h * w).view(1, 1, h, w).float().expand(B, 3, -1, -1)
    imgs = numbers.repeat_interleave(model.cfg.unit, 2).repeat_interleave(model.cfg.unit, 3)
    arrived = model.decode(model.encode(imgs, ids_keep, torch.zeros_like(secondary)), ids_keep)
    expected = torch.arange(h * w).expand(B, -1).masked_fill(mask, -1).float()
    return seen, arrived, torch.cat([torch.full((B, P), -7.0), expected], dim=1)


CASES = [(kind, sampling) for kind in KINDS for sampling in ("uniform", "grid", "random")
         if kind == "vit" or sampling != "random"]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind,sampling", CASES)
def test_every_decoder_token_sits_at_its_own_position(kind, sampling, size, monkeypatch):
    model = build(kind, img_size=SIZES[size], sampling=sampling)
    seen, arrived, expected = traced(model, monkeypatch)
    side = model.cfg.unit // model.encoder.stride
    row, column = (seen["coords"] // side).unbind(dim=2)
    assert torch.equal(row * model.grid[1] + column, seen["number"].long())  # the encoder is told true places
    assert seen["coords"].max(dim=1).values.lt(torch.tensor(model.encoder.grid)).all()
    assert torch.equal(arrived, expected)


@pytest.mark.parametrize("kind,options", [("swin", {}), ("pvt", {}), ("vit", {}), ("pvt", {"unit": 32})], ids=str)
def test_the_published_order_puts_a_pyramid_s_tokens_elsewhere(kind, options, monkeypatch):
    options = {"img_size": (128, 128), "reduction": (16, 8, 4, 2), **options}
    _, arrived, expected = traced(build(kind, published_order=True, **options), monkeypatch)
    visible = expected >= 0
    at_home = (arrived == expected)[visible].float().mean()
    assert at_home == 1 if kind == "vit" else at_home < 0.5
    assert torch.equal(arrived >= 0, visible)  # mask tokens are right in both


# The claim that makes it work (UM-MAE, Figures 2 and 3)


def attend(q, k, v, heads, bias=0.0):
    """Plain attention, (N, D) and (K, D) -> (N, D); `bias` (heads, N, K) or a number."""
    q, k, v = (x.view(len(x), heads, -1).transpose(0, 1) for x in (q, k, v))  # (heads, N, d)
    return ((q @ k.mT / math.sqrt(q.shape[2]) + bias).softmax(dim=2) @ v).transpose(0, 1).flatten(1)


def window_attention(attn, x, place, side, stage, grid, window):
    """Tokens at `place` (N, 2), true and on the full map of this stage, `grid`, in windows of the full map."""
    shift = [window // 2 if attn.shifted and n > window else 0 for n in grid]
    moved = place - torch.tensor(shift)
    parts = torch.cat([moved % torch.tensor(grid) // window, moved < 0], dim=1)  # (N, 4): window, and came round
    offset = side.float() / 2**stage
    offset = offset[None] - offset[:, None]  # (N, N, 2), from query to key
    bias = attn.posmlp(offset.sign() * offset.abs().log1p()).permute(2, 0, 1)
    bias = bias.masked_fill((parts[:, None] != parts).any(dim=2), -math.inf)
    return attn.proj(attend(*attn.qkv(x).chunk(3, dim=1), attn.num_heads, bias))


def pooled_attention(attn, x, place, reduction):
    """Keys are the means of what was kept in squares of the full map."""
    keys, at = (place // reduction).unique(dim=0, return_inverse=True)
    member = torch.nn.functional.one_hot(at, len(keys)).float()
    pooled = member.T @ x / member.sum(dim=0)[:, None]
    k, v = attn.kv(attn.norm(attn.sr(pooled))).chunk(2, dim=1)
    return attn.proj(attend(attn.q(x), k, v, attn.num_heads))


def by_definition(model, tokens, coords):
    """Latent of the kept tokens (N, D) at true `coords` (N, 2) of one image: no compact map anywhere, all is said in
    places, windows and squares of the full map. And {how many units a window or key saw in every 2x2 cell of it}."""
    encoder, x, spread = model.encoder, tokens, set()
    if encoder.pos_embed is not None:
        x = x + encoder.pos_embed[0].view(*encoder.grid, -1)[coords[:, 0], coords[:, 1]]
    for stage, layer in enumerate(encoder.layers):
        grid, place = [n // 2**stage for n in encoder.grid], coords // 2**stage  # on the full map of this stage
        for block in layer["blocks"]:
            y = block.norm1(x)
            if hasattr(block.attn, "posmlp"):
                x = x + window_attention(block.attn, y, place, coords, stage, grid, model.cfg.window)
            else:
                x = x + pooled_attention(block.attn, y, place, model.cfg.reduction[stage])
            x = x + block.mlp(block.norm2(x))
        reach = model.cfg.window if hasattr(block.attn, "posmlp") else model.cfg.reduction[stage]
        spread |= seen_per_cell(model, coords, place // min(reach, *grid), stage)
        if "downsample" in layer:
            unit = model.cfg.unit // 4 // 2**stage  # side of a unit in tokens
            near, within = (place // 2, place % 2) if unit > 1 else (place // 4, place // 2 % 2)
            group = near.unique(dim=0, return_inverse=True)[1]  # (N,), in raster order
            groups = (4 * group + 2 * within[:, 0] + within[:, 1]).argsort().view(-1, 2, 2)
            merging = layer["downsample"]
            x = torch.einsum("nabc,dcab->nd", merging.norm(x)[groups], merging.proj.weight) + merging.proj.bias
            coords = coords[groups[:, 0, 0]]
    return encoder.norm(x), spread


def seen_per_cell(model, coords, window, stage):
    """{numbers of kept units in a 2x2 cell of units, over the cells that a window meets}"""
    if model.cfg.unit // 4 < 2**stage:  # a token is more than a unit
        return set()
    unit = coords * 4 // model.cfg.unit
    pairs = torch.cat([window, unit // 2, unit], dim=1).unique(dim=0)
    whole = torch.cat([unit, window], dim=1).unique(dim=0)
    assert len(whole) == len(unit.unique(dim=0))  # no unit lies in two windows
    return set(pairs[:, :4].unique(dim=0, return_counts=True)[1].tolist())


@pytest.mark.parametrize("kind,options", [("swin", {"window": 16}), ("pvt", {})], ids=["swin", "pvt"])
def test_the_compact_map_is_the_full_one_without_what_was_dropped(kind, options, monkeypatch):
    """Windows of 8 on the compact map are windows of 16 on the full one, of which every 2x2 cell of units shows one; so
    are keys pooled by 4,2,1,1 those of 8,4,2,1. The encoder gives what the full map's definition gives, unit by unit.
    """
    monkeypatch.setitem(models.SWIN, "swin_tiny", (8, (2, 2, 2, 1), (1, 2, 2, 2), 8))
    monkeypatch.setitem(models.PVT, "pvt_tiny", ((8, 16, 16, 16), (1, 2, 1, 1), (1, 2, 2, 2), (2, 2, 2, 2)))
    model = build(kind, unit=16, img_size=(256, 128), **options)
    for name, parameter in model.encoder.named_parameters():
        if "posmlp" in name:
            torch.nn.init.normal_(parameter)
    imgs, noise = batch(model, B=2)
    ids_keep, secondary, _ = model.mask(noise)
    encode, seen = model.encoder.encode, {}
    def watched(tokens, coords=None, grid=None):
        seen.update(tokens=tokens, coords=coords)
        return encode(tokens, coords, grid)

    monkeypatch.setattr(model.encoder, "encode", watched)
    with torch.no_grad():
        latent = model.encode(imgs, ids_keep, torch.zeros_like(secondary))
    tokens, coords = seen["tokens"], seen["coords"]
    everything = model.encoder.embed(imgs)  # kept tokens are those of the full image, at their places
    place = coords[..., 0] * model.encoder.grid[1] + coords[..., 1]
    torch.testing.assert_close(tokens, everything.gather(1, place[..., None].expand_as(tokens)))
    with torch.no_grad():
        for b in range(2):
            expected, spread = by_definition(model, tokens[b], coords[b])
            torch.testing.assert_close(latent[b], expected, rtol=1e-4, atol=1e-4)
            assert spread == {1}


# Sizes, gradients, precision


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size,C,unit", [((128, 128), 3, 16), ((128, 64), 1, 8), ((64, 128), 4, 8)],
                         ids=["128x128x3", "128x64x1", "64x128x4"])
def test_every_trainable_parameter_gets_a_gradient(kind, size, C, unit):
    model = build(kind, img_size=size, in_chans=C, unit=unit, **({"patch_size": unit} if kind == "vit" else {}))
    imgs, noise = batch(model)
    U = (size[0] // unit) * (size[1] // unit)
    assert predict(model, imgs, noise).shape == model.target(imgs).shape == (3, U, unit * unit * C)
    loss = model(imgs, noise)
    loss.backward()
    assert loss.shape == () and loss.dtype == torch.float32 and loss.isfinite()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        if not name.endswith("posmlp.2.bias"):  # one number for all logits: softmax does not see it
            assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("kind,options,said", [
    ("swin", {"img_size": (96, 128)}, "96x128 must be divisible by 64 .* as 128x128 is"),
    ("pvt", {"img_size": (128, 100)}, "by 64"),
    ("vit", {"img_size": (64, 72)}, "64x72 must be divisible by 16 .* as 64x80 is"),
    ("swin", {"sampling": "random"}, "uniform or grid"), ("vit", {"unit": 16}, "divisible by 8 and divide 8"),
    ("swin", {"unit": 12}, "must be divisible by 4 and divide 32"),
    ("swin", {"window": 6}, "--window 6 .* divisible by 4"), ("swin", {"unit": 16, "window": 12}, "divisible by 8"),
    ("pvt", {"reduction": (8, 4, 3, 1)}, "multiples of 4,2,1,1"),
    ("pvt", {"reduction": (8, 2, 2, 1), "unit": 16}, "multiples of 8,4,2,1"),
    ("swin", {"sampling": "stripes"}, "--sampling is"), ("swin", {"target": "hog"}, "--target"),
    ("swin", {"secondary_ratio": 1.0}, "--secondary_ratio"), ("swin", {"decoder_heads": 3}, "--decoder_heads")])
def test_what_does_not_fit_is_refused_with_what_would(kind, options, said):
    with pytest.raises(ValueError, match=said) as error:
        build(kind, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("window,size,said", [(8, 128, True), (24, 128, True), (16, 128, False), (24, 64, False)])
def test_a_shift_that_cuts_units_is_said(window, size, said, capsys):
    """The released code takes such windows; but what is next to each other in them is not so in a full image."""
    build("swin", unit=16, window=window, img_size=(size, size))
    out = capsys.readouterr().out
    assert out == (f"shifted windows of {window} tokens cut units of 16 px: better --window 16, or a multiple\n"
                   if said else "")


@pytest.mark.parametrize("kind", KINDS)
def test_activation_checkpointing_changes_nothing(kind):
    plain, thrifty = (build(kind, activation_checkpointing=on) for on in (False, True))
    assert equal(gradients(plain, *batch(plain)), gradients(thrifty, *batch(plain)))


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_autocast_keeps_target_and_loss_in_fp32(kind):
    model = build(kind, target="norm_pixels")
    imgs, noise = batch(model)
    exact = model(imgs, noise)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(imgs, noise)
        assert model.target(imgs).dtype == torch.float32
    loss.backward()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact.item(), rel=0.02)
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


# Pictures


@pytest.mark.parametrize("kind,sampling", [("swin", "uniform"), ("pvt", "grid"), ("vit", "random")])
@pytest.mark.parametrize("target", ["pixels", "norm_pixels"])
def test_reconstruct(kind, sampling, target, monkeypatch):
    """A decoder that paints the target itself gives back the image, in [0, 1]; what is hidden is one grey."""
    model = build(kind, target=target, sampling=sampling, img_size=(64, 128))
    original = torch.randint(0, 256, (4, 3, 64, 128), dtype=torch.uint8)
    imgs, noise = transforms.normalize(original), torch.rand(4, model.num_noise)
    ids_keep, secondary, dropped = model.mask(noise)
    monkeypatch.setattr(model, "decode", lambda latent, ids_keep: model.target(imgs))
    rows = um_mae.reconstruct(model, imgs, noise)
    assert [title.split("\n")[0] for title in rows] == ["original", f"{sampling} sampling", "secondary masking",
                                                        "compact image", "prediction", "prediction"]
    assert len([title for title in rows if "true mean" in title]) == (target == "norm_pixels")
    exact, sampled, hidden, compact, pred, pasted = rows.values()
    for row in (exact, pasted):
        torch.testing.assert_close(row, original / 255, rtol=0, atol=2e-3)
    is_dropped = layers.expand_mask(dropped, model.grid, 8)[:, None]  # (B, 1, H, W)
    torch.testing.assert_close(pred, dimmed(imgs, is_dropped), rtol=0, atol=2e-3)
    if sampling != "random":
        assert compact.shape == (4, 3, 32, 64)
    assert all(0 <= row.min() and row.max() <= 1 for row in rows.values())
    exact, sampled, hidden = (layers.patchify(row, 8) for row in (exact, sampled, hidden))
    behind = torch.zeros_like(dropped).scatter(1, ids_keep, secondary)
    assert torch.equal(sampled[~dropped], exact[~dropped]) and sampled[dropped].std(dim=0).max() < 1e-6
    seen = ~dropped & ~behind
    assert torch.equal(hidden[seen], exact[seen]) and hidden[~seen].std(dim=0).max() < 1e-6
    kept = hidden.gather(1, ids_keep[..., None].expand(-1, -1, hidden.shape[2]))
    assert torch.equal(layers.patchify(compact, 8), kept)


# Whole runs


@pytest.fixture
def run(folder, call, tmp_path):
    """`run(name, **changes)`: three steps of the tiny recipe on a few images, in OUT = tmp_path / name."""
    def words(name, script=um_mae, **changes):
        recipe = ROOT / "configs" / ("um_mae_tiny.yaml" if script is um_mae else "finetune_tiny.yaml")
        given = {"data": folder, "batch_size": 8, "micro_batch": 4, "max_steps": 3, "log_every": 1, "device": "cpu",
                 "labels": None if script is um_mae else 0, "out": tmp_path / name, **changes}
        return call(script.main, ["--config", recipe, *flags(**given)])
    return words


VIT = {"model": "vit_tiny", "patch_size": 8, "sampling": "random"}


@pytest.mark.parametrize("kind,changes", [("swin", {}), ("pvt", {"model": "pvt_tiny"}), ("vit", VIT)],
                         ids=["swin", "pvt", "vit"])
def test_a_run_and_fine_tuning_at_full_resolution(kind, changes, run, tmp_path):
    """Three steps, two pictures; a stopped and resumed run ends bit-identical; micro-batches are one batch; encoder.pt
    makes an encoder of the full map, with the windows and reductions of the full map, and trains."""
    done = run("whole", **changes)
    assert done.code == 0 and done.err == "" and "unit mean" in done.out
    assert len(list((tmp_path / "whole" / "pictures").glob("*.png"))) == 2  # after the first and the last step
    assert run("parts", **{**changes, "max_steps": 1}).code == 0 and run("parts", resume=True, **changes).code == 0
    whole, parts = (torch.load(tmp_path / name / "last.pt") for name in ("whole", "parts"))
    assert equal(whole["model"], parts["model"]) and equal(whole["optimizer"], parts["optimizer"])
    assert run("once", micro_batch=8, **changes).code == 0
    for one, two in zip(log_of(tmp_path / "once"), log_of(tmp_path / "whole"), strict=True):
        assert [one["loss"], one["grad_norm"]] == pytest.approx([two["loss"], two["grad_norm"]], rel=1e-5)

    saved = read_encoder(tmp_path / "whole" / "encoder.pt")
    options = {"swin": {"window": 8, "bias": "continuous"}, "pvt": {"reduction": [8, 4, 2, 1]}, "vit": {}}[kind]
    assert options.items() <= saved["arch"]["options"].items() and saved["arch"]["img_size"] == [64, 64]
    tuned = run("tuned", finetune, init=tmp_path / "whole" / "encoder.pt", max_steps=1, head_start="random")
    assert tuned.code == 0 and "loaded" in tuned.out and "bias tables" not in tuned.out, tuned.err
    again = read_encoder(tmp_path / "tuned" / "encoder.pt")["arch"]
    assert options.items() <= again["options"].items()
    larger = run("larger", finetune, init=tmp_path / "whole" / "encoder.pt", max_steps=1, head_start="random",
                 img_size="64x96", batch_size=4)
    assert larger.code == 0 and ("positions resized" in larger.out) == (kind != "swin")


def test_a_wrong_size_is_one_line(run, tmp_path):
    done = run("run", img_size="64x96")
    assert done.code == 2 and "must be divisible by 64" in done.err and done.err.count("\n") == 1
    assert not (tmp_path / "run").exists()
