"""Numbers of the published implementations, reproduced: tests/golden/, or the directory in the environment variable
GOLDEN. Losses to 1e-5 relative, tensors to 1e-4, every gradient norm to 1e-4 relative. torchvision's ViT is a second
oracle that shares no line with the first.
"""

import json
import os
from pathlib import Path

import numpy as np
import parity
import pytest
import torch
import torch.nn.functional as F
import torchvision

import fastmim
import finetune
import lut
import mae
import models
import simmim
import um_mae
from common import checkpoint, layers, optim, transforms

GOLDEN = Path(os.environ.get("GOLDEN", Path(__file__).parent / "golden"))
HEADS = 4  # of encoder and decoder: the one number that the arrays do not tell


def case(name):
    """The arrays of a golden file, as torch tensors; float16 weights are exact, and become float32."""
    path = GOLDEN / f"{name}.npz"
    if not path.exists():
        pytest.skip(f"no {path.name} in {GOLDEN}")
    with np.load(path) as arrays:
        return {k: torch.tensor(v.astype(np.float32) if v.dtype == np.float16 else v) for k, v in arrays.items()}


def images_of(arrays):
    return transforms.normalize(arrays["images"].permute(0, 3, 1, 2))  # (B, C, H, W)


def depth_of(arrays, prefix):
    return 1 + max(int(k.split(".")[1]) for k in arrays if k.startswith(f"sd/{prefix}."))


def encoder_of(arrays, monkeypatch, **options):
    """Our ViT of the width, depth, patch and image size that the arrays have."""
    width, C, p, _ = arrays["sd/patch_embed.proj.weight"].shape
    monkeypatch.setitem(models.VIT, "golden", (width, depth_of(arrays, "blocks"), HEADS))
    return models.build("golden", tuple(arrays["images"].shape[1:3]), p, C, **options)


def copy_in(model, arrays, rename):
    """Load every `sd/` array under the name `rename(published)`; nothing may be missing, left over or reshaped.
    Tables that we compute ourselves must already be what was published."""
    tensors = {rename(k[3:]): v for k, v in arrays.items() if k.startswith("sd/")}
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, tensors[name], rtol=1e-3, atol=1e-3, msg=f"{name} is another table")
    model.load_state_dict(tensors, strict=True)


def check_loss(loss, arrays):
    assert loss.item() == pytest.approx(arrays["loss"].item(), rel=1e-5)


def check_gradients(model, arrays, rename):
    """Every published gradient norm, 1e-4 relative; what is below 1e-6 is rounding, and may differ by that."""
    expected = {rename(k[9:]): v.item() for k, v in arrays.items() if k.startswith("gradnorm/")}
    found = {name: p.grad.norm().item() for name, p in model.named_parameters()}
    assert found.keys() == expected.keys()
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name,target", [("mae_rawpix", "pixels"), ("mae_normpix", "norm_pixels")],
                         ids=["mae_rawpix", "mae_normpix"])
def test_mae(name, target, monkeypatch):
    arrays = case(name)
    def rename(name):
        return (name.replace("decoder_", "decoder.", 1) if name.startswith("decoder_")
                else name if name == "mask_token" else "encoder." + name)

    encoder_of(arrays, monkeypatch)  # puts "golden" into the table of models
    C, p = arrays["sd/patch_embed.proj.weight"].shape[1:3]
    model = mae.MAE(mae.Config(
        model="golden", img_size=tuple(arrays["images"].shape[1:3]), patch_size=p, in_chans=C, target=target,
        decoder_depth=depth_of(arrays, "decoder_blocks"), decoder_width=arrays["sd/mask_token"].shape[2],
        decoder_heads=HEADS))
    copy_in(model, arrays, rename)

    imgs, noise = images_of(arrays), arrays["noise"]
    ids_keep, ids_restore, mask = model.mask(noise)
    assert torch.equal(mask, arrays["mask"].bool())
    pred = model.decode(model.encode(imgs, ids_keep, mask), ids_restore)
    torch.testing.assert_close(pred, arrays["pred"], rtol=1e-4, atol=1e-4)
    loss = model(imgs, noise)
    check_loss(loss, arrays)
    loss.backward()
    check_gradients(model, arrays, rename)


def test_lut(monkeypatch):
    """Both losses, the vectors of student and teacher, and every gradient."""
    arrays = case("lut")
    def rename(name):
        for theirs, ours in (("decoder_", "decoder."), ("head.", "projector."), ("mask_token", "mask_token"),
                             ("predictor.", "predictor.")):
            if name.startswith(theirs):
                return name.replace(theirs, ours, 1)
        return "encoder." + name

    encoder_of(arrays, monkeypatch)
    size, (C, p) = tuple(arrays["view1"].shape[2:]), arrays["sd/patch_embed.proj.weight"].shape[1:3]
    model = lut.LUT(lut.Config(
        model="golden", img_size=size, patch_size=p, in_chans=C, decoder_depth=depth_of(arrays, "decoder_blocks"),
        decoder_width=arrays["sd/mask_token"].shape[2], decoder_heads=HEADS, head_width=len(arrays["sd/head.0.weight"]),
        three_augment=False))
    tensors = {rename(k[3:]): v for k, v in arrays.items() if k.startswith("sd/")}
    taught = {rename(k[10:]): v for k, v in arrays.items() if k.startswith("target_sd/")}
    tensors |= {f"teacher.{k}": v for k, v in taught.items() if k.startswith(("encoder", "projector"))}
    model.load_state_dict(tensors, strict=True)

    imgs, noise = torch.stack([arrays["view1"], arrays["view2"]], dim=1), F.pad(arrays["noise"], (0, 2))
    compared, distance = [], model.distance
    monkeypatch.setattr(model, "distance", lambda *pair: compared.append(pair) or distance(*pair))
    loss = model(imgs, noise)
    check_loss(loss, arrays)
    for found, names in zip(compared, (("student1", "target2"), ("student2", "target1")), strict=True):
        for tensor, name in zip(found, names, strict=True):
            torch.testing.assert_close(tensor, arrays[name], rtol=1e-4, atol=1e-4)
    model.cfg.context_weight = 0
    assert model(imgs, noise).item() == pytest.approx(arrays["loss_mim"].item(), rel=1e-5)
    assert (loss.item() - arrays["loss_mim"].item()) * 4 == pytest.approx(arrays["loss_bc"].item(), rel=1e-5)
    loss.backward()
    check_norms({k: v.numpy() for k, v in arrays.items()}, lambda name: model.get_parameter(rename(name)).grad)


@pytest.mark.parametrize("pool", ["mean", "cls"], ids=["finetune_vit_mean", "finetune_vit_cls"])
def test_finetune(pool, monkeypatch):
    arrays = case(f"finetune_vit_{pool}")
    def rename(name):
        return name if name.startswith(("fc_norm", "head")) else "encoder." + name

    encoder = encoder_of(arrays, monkeypatch, learn_positions=True, final_norm=pool == "cls")
    model = finetune.Classifier(encoder, len(arrays["sd/head.bias"]), pool, {"mean": "layer", "cls": "none"}[pool])
    copy_in(model, arrays, rename)
    logits = model(images_of(arrays))
    torch.testing.assert_close(logits, arrays["logits"], rtol=1e-4, atol=1e-4)
    loss = F.cross_entropy(logits, torch.arange(len(logits)))
    check_loss(loss, arrays)
    loss.backward()
    check_gradients(model, arrays, rename)


def test_lars():
    arrays = case("lars")
    weight, bias = (torch.nn.Parameter(arrays[k].clone()) for k in ("weight0", "bias0"))
    optimizer = optim.LARS([weight, bias], arrays["lr"].item(), 0.0, arrays["momentum"].item(),
                              arrays["trust"].item())
    for step in range(len(arrays["grad_weight"])):
        weight.grad, bias.grad = arrays["grad_weight"][step].clone(), arrays["grad_bias"][step].clone()
        optimizer.step()
        torch.testing.assert_close(weight.data, arrays["weight"][step], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(bias.data, arrays["bias"][step], rtol=1e-5, atol=1e-6)


def test_layer_decay(monkeypatch):
    path = GOLDEN / "layer_decay.json"
    if not path.exists():
        pytest.skip(f"no {path.name} in {GOLDEN}")
    cases = {k: v for k, v in json.loads(path.read_text()).items() if k.startswith("vit")}
    assert cases
    for name, expected in cases.items():
        depth, decay = int(name.split("depth")[1].split("_")[0]), float(name.split("decay")[1])
        monkeypatch.setitem(models.VIT, "golden", (48, depth, HEADS))
        mean = any(k.startswith("fc_norm") for k in expected)
        encoder = models.build("golden", (64, 64), 16, learn_positions=True, final_norm=not mean)
        model = finetune.Classifier(encoder, 5, "mean" if mean else "cls", "layer" if mean else "none")
        groups = optim.parameter_groups(model, 0.05, optim.layer_decay(model, decay))
        found = {name.removeprefix("encoder."): [group["lr_scale"], group["weight_decay"]]
                 for group in groups for name in group["names"]}
        assert found.keys() == expected.keys()
        for parameter, values in expected.items():
            assert found[parameter] == pytest.approx(values), parameter


# Pyramids, and SimMIM's ViT, with weights under other names than ours: tests/parity.py knows both.


DEPTHS = (2, 1, 1, 1)


@pytest.fixture
def small(monkeypatch):
    """The sizes of these cases."""
    monkeypatch.setitem(models.SWIN, "swin_golden", (16, DEPTHS, (2, 2, 4, 4), 32))
    monkeypatch.setitem(models.PVT, "pvt_golden", ((16, 32, 48, 64), DEPTHS, (1, 2, 3, 4), (4, 4, 2, 2)))
    monkeypatch.setitem(models.VIT, "vit_golden", (48, 2, HEADS))


def published(name):
    """(arrays, normalised images, weights under their published names) of a case."""
    if not (parity.GOLDEN / f"{name}.npz").exists():
        pytest.skip(f"no {name}.npz in {parity.GOLDEN}")
    return parity.case(name)


def check_tensor(found, expected):
    largest = np.abs(expected).max()
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-4, atol=1e-4 * largest)


def check_norms(arrays, gradient_of):
    """Every published gradient norm, 1e-4 relative; what is below 1e-5 of the largest is rounding."""
    norms = {k.removeprefix("gradnorm/"): float(v) for k, v in arrays.items() if k.startswith("gradnorm/")}
    assert norms
    for name, norm in norms.items():
        found = gradient_of(name).norm().item()
        assert found == pytest.approx(norm, rel=1e-4, abs=1e-5 * max(norms.values())), name


@pytest.mark.parametrize("name", ["um_mae_swin", "um_mae_pvt"])
def test_um_mae(name, small):
    """With each token at its own place, and with the places of the released code."""
    arrays, imgs, theirs = published(name)
    model = um_mae.UMMAE(um_mae.Config(model=name.removeprefix("um_mae_") + "_golden", img_size=(128, 128), window=8,
                                       decoder_depth=1, decoder_width=32, decoder_heads=HEADS))
    tensors = {f"encoder.{k}": v for k, v in parity.encoder_tensors(theirs).items()}
    tensors |= {f"decoder.{k}": v for k, v in parity.decoder_tensors(theirs).items()}
    tensors |= {"secondary_token": theirs["vis_mask_token"], "mask_token": theirs["mask_token"]}
    checkpoint.load_exactly(model, tensors, name)
    noise = torch.cat([torch.from_numpy(arrays[k]).float() for k in ("mask", "secondary_noise")], dim=1)
    ids_keep, secondary, mask = model.mask(noise)
    assert torch.equal(mask, torch.from_numpy(arrays["mask"]).bool())
    check_tensor(model.encode(imgs, ids_keep, secondary), arrays["latent"])
    model.cfg.published_order = True
    assert model(imgs, noise).item() == pytest.approx(float(arrays["loss_published_code"]), rel=1e-5)
    model.cfg.published_order = False
    loss = model(imgs, noise)
    assert loss.item() == pytest.approx(float(arrays["loss"]), rel=1e-5)
    loss.backward()
    own = dict(model.named_parameters())

    def gradient_of(name):
        if decoder := parity.decoder_name(name):
            return own[f"decoder.{decoder}"].grad
        token = {"vis_mask_token": "secondary_token", "mask_token": "mask_token"}.get(name)
        return own[token or "encoder." + parity.um_mae_names(name, DEPTHS)].grad

    check_norms(arrays, gradient_of)


@pytest.mark.parametrize("name", ["simmim_swin", "simmim_vit"])
def test_simmim(name, small):
    arrays, imgs, theirs = published(name)
    kind = name.removeprefix("simmim_")
    model = simmim.SimMIM(simmim.Config(model=f"{kind}_golden", img_size=(64, 64), window=4,
                                        mask_unit={"swin": 32, "vit": 16}[kind]))
    tensors = parity.simmim_tensors(theirs)
    tensors = {k if k == "mask_token" else f"encoder.{k}": v for k, v in tensors.items()}
    tensors |= {f"head.{k}": theirs[f"decoder.0.{k}"].squeeze() for k in ("weight", "bias")}
    checkpoint.load_exactly(model, tensors, name)
    side = model.cfg.mask_unit // model.encoder.stride
    mask = torch.from_numpy(arrays["mask"]).bool()
    units = mask[:, ::side, ::side].flatten(1)
    assert torch.equal(layers.expand_mask(units, model.grid, side), mask)
    latent = model.encode(imgs, units)
    check_tensor(latent.transpose(1, 2).reshape(arrays["latent"].shape), arrays["latent"])
    loss = model.loss(model.decode(latent), model.target(imgs), units)
    assert loss.item() == pytest.approx(float(arrays["loss"]), rel=1e-5)
    loss.backward()
    own = dict(model.named_parameters())

    def gradient_of(name):
        if name.endswith(("q_bias", "v_bias")):  # published apart, thirds of one tensor here
            prefix, part = name.rsplit(".", 1)
            return own[f"{prefix}.qkv.bias"].grad.chunk(3)["qkv".index(part[0])]
        return own["mask_token" if name.endswith("mask_token") else name.replace("decoder.0", "head")].grad

    check_norms(arrays, gradient_of)


def test_hog():
    arrays, imgs, _ = published("hog")
    check_tensor(fastmim.hog(imgs, 8), arrays["hog"])


@pytest.mark.parametrize("name,target", [("fastmim_vit_hog", "hog"), ("fastmim_vit_l2", "norm_pixels"),
                                         ("fastmim_swin_hog", "hog")])
def test_fastmim(name, target, small):
    arrays, imgs, theirs = published(name)
    model = fastmim.FastMIM(fastmim.Config(model=name.split("_")[1] + "_golden", img_size=tuple(imgs.shape[2:]),
                                           target=target, decoder_depth=1, decoder_width=32))
    checkpoint.load_exactly(model, {fastmim_name(k): v for k, v in theirs.items() if fastmim_name(k)}, name)
    noise = torch.from_numpy(arrays["noise"])
    mask = model.mask(noise)
    assert mask.sum(dim=1).tolist() == [12, 12]
    check_tensor(model.decode(model.encode(imgs, mask)), arrays["pred"])
    loss = model(imgs, noise)
    assert loss.item() == pytest.approx(float(arrays["loss"]), rel=1e-5)
    loss.backward()
    own = dict(model.named_parameters())
    assert len(own) == len([k for k in arrays if k.startswith("gradnorm/")])
    check_norms(arrays, lambda name: own[fastmim_name(name)].grad)


def fastmim_name(name):
    """A name in FastMIM's code -> ours; None for what we compute from sizes. A ViT's encoder has no prefix there."""
    if name.endswith(("relative_position_index", "attn_mask")):
        return None
    if decoder := parity.decoder_name(name):
        return f"decoder.{decoder}"
    return name if name.startswith(("encoder.", "mask_token")) else f"encoder.{name}"


@pytest.mark.parametrize("name", ["finetune_um_swin", "finetune_um_pvt"])
def test_fine_tuning_um_mae(name, small):
    arrays, imgs, theirs = published(name)
    kind = name.removeprefix("finetune_um_")
    options = {"swin": {"bias": "continuous", "window": 8}, "pvt": {"reduction": (8, 4, 2, 1)}}[kind]
    encoder = models.build(f"{kind}_golden", (64, 64), learn_positions=True, final_norm=False, **options)
    model = finetune.Classifier(encoder, 5)
    head = {k: v for k, v in theirs.items() if k.startswith(("fc_norm", "head"))}
    inner = {f"encoder.{k}": v for k, v in parity.encoder_tensors(theirs).items() if k not in head}
    checkpoint.load_exactly(model, {**head, **inner}, name)
    logits = model(imgs)
    check_tensor(logits, arrays["logits"])
    loss = F.cross_entropy(logits, torch.arange(len(logits)))
    assert loss.item() == pytest.approx(float(arrays["loss"]), rel=1e-5)
    loss.backward()
    own = dict(model.named_parameters())
    check_norms(arrays, lambda name: own[um_classifier_name(name)].grad)


def um_classifier_name(name):
    return name if name.startswith(("fc_norm", "head")) else "encoder." + parity.um_mae_names(name, DEPTHS)


@pytest.mark.parametrize("kind", ["swin", "pvt"], ids=["layer_decay_um_swin", "layer_decay_um_pvt"])
def test_layer_decay_of_um_mae(kind, small):
    path = parity.GOLDEN / "layer_decay.json"
    if not path.exists():
        pytest.skip(f"no {path.name} in {parity.GOLDEN}")
    cases = {k: v for k, v in json.loads(path.read_text()).items() if k.startswith(f"um_{kind}")}
    assert cases
    options = {"bias": "continuous"} if kind == "swin" else {}
    for case, expected in cases.items():
        decay = float(case.split("decay")[1])
        encoder = models.build(f"{kind}_golden", (64, 64), learn_positions=True, final_norm=False, **options)
        model = finetune.Classifier(encoder, 5)
        groups = optim.parameter_groups(model, 0.05, optim.layer_decay(model, decay))
        found = {name: [group["lr_scale"], group["weight_decay"]] for group in groups for name in group["names"]}
        expected = {um_classifier_name(name): values for name, values in expected.items()}
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            assert found[name] == pytest.approx(values), name


def test_vit_b_16_of_torchvision():
    oracle = torchvision.models.vit_b_16(weights=None).eval()  # random weights, LayerNorm eps 1e-6, learned positions
    ours = models.build("vit_b", (224, 224), 16, learn_positions=True).eval()
    names = {"class_token": "cls_token", "conv_proj": "patch_embed.proj", "encoder.pos_embedding": "pos_embed",
             "encoder.ln": "norm", "encoder.layers.encoder_layer_": "blocks.", "ln_1": "norm1", "ln_2": "norm2",
             "self_attention.in_proj_": "attn.qkv.", "self_attention.out_proj": "attn.proj", "mlp.0": "mlp.fc1",
             "mlp.3": "mlp.fc2"}
    tensors = {}
    generator = torch.Generator().manual_seed(0)
    for name, tensor in oracle.state_dict().items():
        if not name.startswith("heads"):
            # torchvision starts biases, class token and some weights at zero: that would hide a swapped name
            tensor.add_(0.02 * torch.randn(tensor.shape, generator=generator))
            for theirs, mine in names.items():
                name = name.replace(theirs, mine)
            tensors[name] = tensor
    ours.load_state_dict(tensors, strict=True)
    imgs = torch.randn(2, 3, 224, 224, generator=generator)
    with torch.no_grad():
        tokens = torch.cat([oracle.class_token.expand(2, -1, -1), oracle._process_input(imgs)], dim=1)
        torch.testing.assert_close(ours(imgs), oracle.encoder(tokens), rtol=1e-4, atol=1e-4)
