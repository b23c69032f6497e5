"""optim.py: the learning rate of every step, which parameters decay, and the norm of gradients.

LARS and the moving average are tested where they are used, in test_finetune.py and test_lut.py."""

import math
import types

import pytest
import torch
import torch.nn as nn

import mae
import models
from common import optim


def small(**options):
    return mae.Config(**{"model": "vit_tiny", "img_size": (32, 32), "patch_size": 8, "decoder_depth": 1,
                         "decoder_width": 32, "decoder_heads": 2, "precision": "fp32", "data": "shapes", **options})


def schedule(kind="cosine", steps=110, warmup=10, peak=2.0, floor=0.5):
    """A Schedule of one step an epoch."""
    cfg = types.SimpleNamespace(schedule=kind, epochs=steps, warmup_epochs=warmup, base_lr=peak, batch_size=8,
                                lr_batch=8, min_lr=floor)
    return optim.Schedule(cfg, 1)


def test_cosine_at_key_steps():
    lr = schedule().lr
    assert lr(0) == 0 and lr(5) == pytest.approx(1.0) and lr(10) == pytest.approx(2.0)  # warm-up ends at the peak
    assert lr(60) == pytest.approx(1.25)  # half way: the middle of peak and floor
    assert lr(35) == pytest.approx(0.5 + 1.5 * (1 + math.sqrt(0.5)) / 2)
    assert lr(110) == pytest.approx(0.5)
    rates = [lr(step) for step in range(111)]
    assert rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert schedule(steps=5, warmup=0, peak=1.0).lr(0) == 1.0  # no warm-up
    assert optim.cosine(0, 0, 1.0, 0.0) == 1.0  # nothing left behind a warm-up: no division by zero


def test_step_schedule_drops_to_a_tenth():
    rates = [schedule("step", 80).lr(step) for step in range(80)]
    assert rates[5] == 1 and set(rates[10:70]) == {2.0} and rates[70:] == pytest.approx([0.2] * 10)


def test_parameter_groups_partition_and_exemptions():
    model = mae.MAE(small())
    groups = optim.parameter_groups(model, 0.05)
    placed = [name for group in groups for name in group["names"]]
    assert sorted(placed) == sorted(name for name, _ in model.named_parameters())
    for group in groups:
        assert all(p is dict(model.named_parameters())[n] for n, p in zip(group["names"], group["params"], strict=True))
    decay = {name: group["weight_decay"] for group in groups for name in group["names"]}
    matrices = {name for name, p in model.named_parameters() if name.endswith("weight") and p.dim() > 1}
    assert {name for name, value in decay.items() if value} == matrices  # not one bias, norm, token or table
    assert {"encoder.cls_token", "mask_token"} <= {name for name, value in decay.items() if not value}
    assert all(group["lr_scale"] == 1 for group in groups)


def test_parameter_groups_exempt_learned_positions_and_leave_out_what_is_frozen():
    encoder = models.build("vit_tiny", (32, 32), 8, learn_positions=True)
    decay = {n: g["weight_decay"] for g in optim.parameter_groups(encoder, 0.05) for n in g["names"]}
    assert decay["pos_embed"] == 0 and decay["blocks.0.mlp.fc1.weight"] == 0.05
    encoder.blocks.requires_grad_(False)
    names = [n for g in optim.parameter_groups(encoder, 0.05) for n in g["names"]]
    assert names and not any(name.startswith("blocks.") for name in names)


def test_parameter_groups_hold_a_shared_parameter_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    assert sum(len(g["params"]) for g in optim.parameter_groups(model, 0.1)) == 3


def test_schedule_lengths_and_linear_scaling():
    cfg = small(epochs=10, warmup_epochs=2.5, batch_size=512, lr_batch=256, base_lr=1e-3)
    plain = optim.Schedule(cfg, steps_per_epoch=7)
    assert (plain.steps, plain.warmup_steps, plain.peak_lr) == (70, 18, 2e-3)
    short = optim.Schedule(small(epochs=1, warmup_epochs=40), 100)  # a trial of a long recipe
    assert (short.steps, short.warmup_steps) == (100, 5)


def test_clip_measures_and_scales():
    model = nn.Linear(3, 2)
    for norm, limit in ((5.0, 0), (5.0, 10.0), (5.0, 1.0)):
        model.weight.grad, model.bias.grad = torch.zeros(2, 3), torch.zeros(2)
        model.weight.grad[0, 0], model.bias.grad[1] = 3.0, 4.0
        assert optim.clip(model, limit).item() == pytest.approx(norm)
        after = math.hypot(model.weight.grad.norm().item(), model.bias.grad.norm().item())
        assert after == pytest.approx(min(norm, limit or norm), rel=1e-5)
