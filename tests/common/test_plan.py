"""plan.py: what --plan prints, against what really happens."""

import contextlib
import re
import types

import pytest
import torch

import finetune
import lut
import mae
from common import layers, plan


def small(**options):
    return mae.Config(**{"model": "vit_tiny", "img_size": (32, 32), "patch_size": 8, "decoder_depth": 1,
                         "decoder_width": 32, "decoder_heads": 2, "precision": "fp32", "data": "shapes", **options})


def planned(cfg, build, capsys):
    """The numbers that --plan prints: parameters, GFLOPs of an image forward and in a step, MB kept an image,
    {micro_batch: GB}."""
    plan.show(cfg, build)
    text = capsys.readouterr().out
    count, flops, step, kept = (float(re.search(rf"([\d.]+) {what}", text)[1]) for what in
                                ("M trained parameters", "GFLOPs", "in a step", "MB an image"))
    table = {int(n): float(gb) for n, gb in re.findall(r"--micro_batch (\d+) +([\d.]+) GB", text)}
    return types.SimpleNamespace(count=count, flops=flops, step=step, kept=kept, table=table, text=text)


def really_kept(model, B, *inputs, dtype=torch.float32):
    """Bytes that a real forward keeps for its backward, weights and inputs aside."""
    kept = {}
    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t
        return t

    autocast = torch.autocast("cpu", dtype=dtype) if dtype != torch.float32 else contextlib.nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), autocast:
        model(*inputs)
    own = {t.untyped_storage().data_ptr() for t in model.state_dict(keep_vars=True).values()}
    return sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in own)


@pytest.mark.parametrize("asked,shown", [(48, 48), (64, 64), (4096, 96)])
def test_plan_shows_the_micro_batch_that_is_asked_for(asked, shown, capsys):
    """Which is at most the batch."""
    cost = planned(small(micro_batch=asked, batch_size=96), mae.MAE, capsys)
    (line,) = [line for line in cost.text.splitlines() if "<-" in line]
    assert line.startswith(f"  --micro_batch {shown} ") and shown in cost.table


@pytest.mark.parametrize("changes", [{}, {"activation_checkpointing": True}, {"precision": "bf16"}],
                         ids=["fp32", "checkpointing", "bf16"])
def test_plan_agrees_with_what_happens(changes, capsys, monkeypatch):
    def fused(self, q, k, v, bias=None):  # what a GPU does, and so the plan; a CPU takes another way in bf16
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)

    monkeypatch.setattr(layers.Attention, "attend", fused)
    cfg = small(img_size=(160, 160), decoder_depth=2, decoder_width=64, **changes)
    cost = planned(cfg, mae.MAE, capsys)
    model = mae.MAE(cfg)
    assert cost.count == pytest.approx(sum(p.numel() for p in model.parameters()) / 1e6, abs=0.05)
    dtype = torch.bfloat16 if cfg.precision == "bf16" else torch.float32
    sizes = [really_kept(model, B, torch.randn(B, 3, 160, 160), torch.rand(B, 400), dtype=dtype) for B in (2, 4)]
    assert cost.kept == pytest.approx((sizes[1] - sizes[0]) / 2 / 1e6, rel=0.02, abs=0.06)  # 0.05 by rounding


def test_plan_counts_flops_and_memory(capsys):
    cfg = small(img_size=(64, 64))
    cost, deeper = (planned(small(img_size=(64, 64), decoder_depth=d), mae.MAE, capsys) for d in (1, 3))
    N, keep, D, d = 64, 16, 96, cfg.decoder_width
    def block(tokens, width):  # qkv and proj 4 D^2, MLP 8 D^2, two attention matmuls; a multiply-add is two
        return 2 * tokens * (12 * width**2 + 2 * tokens * width)

    matmuls = 2 * N * 192 * D + 4 * block(1 + keep, D) + 2 * (1 + keep) * D * d + block(1 + N, d) + 2 * N * d * 192
    assert cost.flops == pytest.approx(matmuls / 1e9, rel=0.02, abs=0.005)
    assert cost.step == pytest.approx(3 * matmuls / 1e9, rel=0.06)  # no gradient of the images; two decimals
    assert deeper.flops - cost.flops == pytest.approx(2 * block(1 + N, d) / 1e9, abs=0.011)
    steps = [cost.table[128] - cost.table[64], cost.table[256] - cost.table[128]]
    assert steps == pytest.approx([64 * cost.kept / 1e3, 128 * cost.kept / 1e3], abs=0.02)


def test_plan_of_finetuning(capsys, monkeypatch):
    cfg = finetune.Config(model="vit_tiny", patch_size=8, img_size=(160, 160), in_chans=3, precision="fp32")
    def build(cfg):
        return finetune.build_classifier(cfg, None, list("abcde"))

    cost, model = planned(cfg, build, capsys), build(cfg)
    assert cost.count == pytest.approx(sum(p.numel() for p in model.parameters()) / 1e6, abs=0.05)
    def kept_by_an_image():
        torch.manual_seed(0)
        sizes = [really_kept(model, B, torch.randn(B, 3, 160, 160), torch.rand(B, model.num_noise)) for B in (2, 34)]
        return (sizes[1] - sizes[0]) / 32 / 1e6

    # Where dropped branches are left out, which a plan cannot know, the others keep a copy of what they see.
    assert cost.kept == pytest.approx(kept_by_an_image(), rel=0.1, abs=0.06)
    monkeypatch.setattr(layers, "can_skip", lambda noise: False)
    assert cost.kept == pytest.approx(kept_by_an_image(), rel=0.02, abs=0.06)


def test_a_plan_knows_what_does_not_go_backward(capsys):
    """The teacher of LUT, which takes more than half of the forward, and a frozen encoder."""
    cfg = lut.Config(model="vit_tiny", patch_size=8, img_size=(160, 160), precision="fp32", decoder_depth=1,
                     decoder_width=32)
    cost = planned(cfg, lut.LUT, capsys)
    assert cost.flops < cost.step < 2 * cost.flops
    cfg = finetune.Config(model="vit_tiny", patch_size=8, img_size=(160, 160), in_chans=3, precision="fp32",
                          mode="linear", head_norm="batch")
    cost = planned(cfg, lambda cfg: finetune.build_classifier(cfg, None, list("abcde")), capsys)
    assert cost.step == cost.flops > 0


@pytest.mark.parametrize("batch_size,gpus,fits,expected", [
    (4096, 8, 384, 256),  # the largest divisor of 512 that fits
    (4096, 8, 2000, 512), (4096, 1, 2000, 512),  # more at once are no faster
    (24, 8, 100, 3), (24, 1, 23, 12), (1024, 8, 16, 16),
    (4, 8, 100, 0), (64, 8, 0, 0),  # there is none
])
def test_the_rule_of_micro_batch(batch_size, gpus, fits, expected):
    assert plan.micro_batch(batch_size, gpus, fits) == expected


def test_two_of_24_gb_stay_free():
    cost = plan.Cost(trained=1, forward_flops=1, step_flops=3, per_image=1e9, besides=4e9)
    assert cost.bytes(2) == 6e9 and cost.fits() == 18
    assert plan.Cost(1, 1, 3, per_image=1e9, besides=23e9).fits() == 0


def test_copies_can_be_planned(capsys):
    """Of what has BatchNorm, whose counter is a constant that a fake tensor knows."""
    cfg = finetune.Config(model="vit_tiny", patch_size=8, img_size=(32, 32), in_chans=3, head_norm="batch", ema=0.9)
    assert planned(cfg, lambda cfg: finetune.build_classifier(cfg, None, list("abc")), capsys).count > 0
