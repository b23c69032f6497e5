"""engine.py: the pure functions, the plan against what really happens, and the checks that stop a run."""

import contextlib
import json
import math
import re
import types

import pytest
import torch
import torch.nn as nn

import finetune
import lut
import mae
import models
from common import engine, layers


def small(**options):
    return mae.Config(**{"model": "vit_tiny", "img_size": (32, 32), "patch_size": 8, "decoder_depth": 1,
                         "decoder_width": 32, "decoder_heads": 2, "precision": "fp32", **options})


def test_cosine_at_key_steps():
    def lr(step):
        return engine.schedule("cosine", step, 110, 10, 2.0, 0.5)

    assert lr(0) == 0 and lr(5) == pytest.approx(1.0) and lr(10) == pytest.approx(2.0)  # warm-up ends at the peak
    assert lr(60) == pytest.approx(1.25)  # half way: the middle of peak and floor
    assert lr(35) == pytest.approx(0.5 + 1.5 * (1 + math.sqrt(0.5)) / 2)
    assert lr(110) == pytest.approx(0.5)
    rates = [lr(step) for step in range(111)]
    assert rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert engine.schedule("cosine", 0, 5, 0, 1.0) == 1.0  # no warm-up
    assert engine.schedule("cosine", 3, 3, 3, 1.0) == 1.0  # nothing but warm-up: no division by zero


def test_step_schedule_drops_to_a_tenth():
    rates = [engine.schedule("step", step, 80, 10, 2.0) for step in range(80)]
    assert rates[5] == 1 and set(rates[10:70]) == {2.0} and rates[70:] == pytest.approx([0.2] * 10)


def test_parameter_groups_partition_and_exemptions():
    model = mae.MAE(small())
    groups = engine.parameter_groups(model, 0.05)
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
    decay = {n: g["weight_decay"] for g in engine.parameter_groups(encoder, 0.05) for n in g["names"]}
    assert decay["pos_embed"] == 0 and decay["blocks.0.mlp.fc1.weight"] == 0.05
    encoder.blocks.requires_grad_(False)
    names = [n for g in engine.parameter_groups(encoder, 0.05) for n in g["names"]]
    assert names and not any(name.startswith("blocks.") for name in names)


def test_parameter_groups_hold_a_shared_parameter_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    assert sum(len(g["params"]) for g in engine.parameter_groups(model, 0.1)) == 3


def test_seed_of_is_pure_and_spread():
    assert engine.seed_of(0, "mask", 3) == engine.seed_of(0, "mask", 3) == 4244230323792465521  # on every machine
    places = [(seed, use, step) for seed in range(10) for use in ("mask", "order") for step in range(50)]
    seeds = {engine.seed_of(*place) for place in places}
    assert len(seeds) == len(places) and all(0 <= s < 2**63 for s in seeds)
    assert engine.seed_of(0, 1) != engine.seed_of(1, 0)


def test_noise_depends_on_its_place_alone():
    one = engine.noise(7, 3, 16, 64)
    torch.rand(1000)  # whatever was drawn before
    torch.manual_seed(123)
    assert torch.equal(one, engine.noise(7, 3, 16, 64))
    assert one.shape == (16, 64) and one.dtype == torch.float32 and 0 <= one.min() and one.max() < 1
    others = [engine.noise(8, 3, 16, 64), engine.noise(7, 4, 16, 64), engine.noise(7, 3, 16, 64, use="drop path")]
    assert not any(torch.equal(one, other) for other in others)
    assert len({tuple(row.tolist()) for row in one}) == 16
    state = torch.get_rng_state()
    engine.noise(0, 0, 4, 4)
    assert torch.equal(state, torch.get_rng_state())


def planned(cfg, build, capsys):
    """The numbers that --plan prints: parameters, GFLOPs of an image forward and in a step, MB kept an image,
    {micro_batch: GB}."""
    engine.plan(cfg, build)
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


@pytest.mark.parametrize("changes", [{}, {"activation_checkpointing": True}, {"precision": "bf16"}],
                         ids=["fp32", "checkpointing", "bf16"])
def test_plan_agrees_with_what_happens(changes, capsys, monkeypatch):
    def fused(self, q, k, v, bias=None):  # what a GPU does, and so the plan; a CPU takes another way in bf16
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)

    monkeypatch.setattr(layers.Attention, "attend", fused)
    cfg = small(img_size=(160, 160), decoder_depth=2, decoder_width=64, **changes)
    plan = planned(cfg, mae.MAE, capsys)
    model = mae.MAE(cfg)
    assert plan.count == pytest.approx(sum(p.numel() for p in model.parameters()) / 1e6, abs=0.05)
    dtype = torch.bfloat16 if cfg.precision == "bf16" else torch.float32
    sizes = [really_kept(model, B, torch.randn(B, 3, 160, 160), torch.rand(B, 400), dtype=dtype) for B in (2, 4)]
    assert plan.kept == pytest.approx((sizes[1] - sizes[0]) / 2 / 1e6, rel=0.02, abs=0.06)  # 0.05 by rounding


def test_plan_counts_flops_and_memory(capsys):
    cfg = small(img_size=(64, 64))
    plan, deeper = (planned(small(img_size=(64, 64), decoder_depth=d), mae.MAE, capsys) for d in (1, 3))
    N, keep, D, d = 64, 16, 96, cfg.decoder_width
    def block(tokens, width):  # qkv and proj 4 D^2, MLP 8 D^2, two attention matmuls; a multiply-add is two
        return 2 * tokens * (12 * width**2 + 2 * tokens * width)

    matmuls = 2 * N * 192 * D + 4 * block(1 + keep, D) + 2 * (1 + keep) * D * d + block(1 + N, d) + 2 * N * d * 192
    assert plan.flops == pytest.approx(matmuls / 1e9, rel=0.02, abs=0.005)
    assert plan.step == pytest.approx(3 * matmuls / 1e9, rel=0.06)  # no gradient of the images; two decimals
    assert deeper.flops - plan.flops == pytest.approx(2 * block(1 + N, d) / 1e9, abs=0.011)
    steps = [plan.table[128] - plan.table[64], plan.table[256] - plan.table[128]]
    assert steps == pytest.approx([64 * plan.kept / 1e3, 128 * plan.kept / 1e3], abs=0.02)


def test_plan_of_finetuning(capsys):
    cfg = finetune.Config(model="vit_tiny", patch_size=8, img_size=(160, 160), in_chans=3, precision="fp32")
    def build(cfg):
        return finetune.build_classifier(cfg, None, list("abcde"))

    plan, model = planned(cfg, build, capsys), build(cfg)
    assert plan.count == pytest.approx(sum(p.numel() for p in model.parameters()) / 1e6, abs=0.05)
    sizes = [really_kept(model, B, torch.randn(B, 3, 160, 160), torch.rand(B, model.num_noise)) for B in (2, 4)]
    assert plan.kept == pytest.approx((sizes[1] - sizes[0]) / 2 / 1e6, rel=0.02, abs=0.06)


def test_a_plan_knows_what_does_not_go_backward(capsys):
    """The teacher of LUT, which takes more than half of the forward, and a frozen encoder."""
    cfg = lut.Config(model="vit_tiny", patch_size=8, img_size=(160, 160), precision="fp32", decoder_depth=1,
                     decoder_width=32)
    plan = planned(cfg, lut.LUT, capsys)
    assert plan.flops < plan.step < 2 * plan.flops
    cfg = finetune.Config(model="vit_tiny", patch_size=8, img_size=(160, 160), in_chans=3, precision="fp32",
                          mode="linear", head_norm="batch")
    plan = planned(cfg, lambda cfg: finetune.build_classifier(cfg, None, list("abcde")), capsys)
    assert plan.step == plan.flops > 0


def fake_run(tmp_path, **changes):
    import tqdm
    return types.SimpleNamespace(**{
        "rank": 0, "world": 1, "main": True, "device": torch.device("cpu"), "dtype": torch.float32, "out": tmp_path,
        "scaler": torch.amp.GradScaler("cpu", enabled=False), "signal": 0, "first": 0, "logged": 0, "last": 10,
        "images": 0, "loss": 0.0, "wait": 0.0, "began": 0.0, "since": 0.0, "saved": 0.0, "bar": tqdm.tqdm(disable=True),
        **changes})


def test_log_averages_over_its_interval(tmp_path, capsys):
    run, cfg = fake_run(tmp_path), small(log_every=4)
    for step in range(10):
        engine.log(cfg, run, step, (step + 1) / 5, 8, float(step), 0.1, 2.0)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 8, 10]  # and the last step, whatever log_every
    assert [line["loss"] for line in lines] == [1.5, 5.5, 8.5]
    assert [line["epoch"] for line in lines] == [0.8, 1.6, 2.0] and lines[0]["grad_norm"] == 2.0
    assert "step 4/10" in capsys.readouterr().out


def test_log_is_silent_on_other_processes(tmp_path, capsys):
    run = fake_run(tmp_path, main=False)
    engine.log(small(log_every=1), run, 0, 0.1, 8, 1.0, 0.1, 1.0)
    assert not (tmp_path / "log.jsonl").exists() and capsys.readouterr().out == ""


def test_due_and_save_due(tmp_path):
    run = fake_run(tmp_path)
    assert [step + 1 for step in range(10) if engine.due(run, step, 3)] == [3, 6, 9, 10]
    assert [step + 1 for step in range(10) if engine.due(run, step, 2.6)] == [3, 6, 9, 10]
    assert all(engine.due(run, step, 0.1) for step in range(10))
    import time
    run.saved = time.monotonic()
    assert not engine.save_due(small(save_epochs=100), run, 3, 5)
    run.saved -= 61
    assert engine.save_due(small(save_epochs=100, save_minutes=1), run, 3, 5)


def test_agree_in_one_process(tmp_path):
    run = fake_run(tmp_path)
    assert engine.agree(run, torch.tensor(1.5), torch.tensor(2.0)) == (1.5, 2.0, False)
    engine.interrupt(run, 15)
    assert engine.agree(run, torch.tensor(1.5), torch.tensor(2.0))[2] is True


@pytest.mark.parametrize("loss,norm", [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)])
def test_check_finite_names_the_step(tmp_path, capsys, loss, norm):
    engine.check_finite(fake_run(tmp_path), 3, 0.1, 1.0, 1.0)
    with pytest.raises(SystemExit) as stop:
        engine.check_finite(fake_run(tmp_path), 1234, 0.125, loss, norm)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and len(err.splitlines()) == 1
    assert all(word in err for word in ("1234", str(loss), str(norm), "1.250e-01"))


def test_fp16_takes_an_infinite_gradient_but_no_nan_loss(tmp_path):
    run = fake_run(tmp_path, scaler=types.SimpleNamespace(is_enabled=lambda: True))
    engine.check_finite(run, 0, 0.1, 1.0, math.inf)  # GradScaler skips the step and lowers its scale
    with pytest.raises(SystemExit):
        engine.check_finite(run, 0, 0.1, math.nan, 1.0)


def test_timed_counts_waiting():
    import time
    run = types.SimpleNamespace(wait=0.0)
    def slow():
        for i in range(3):
            time.sleep(0.02)
            yield i

    assert list(engine.timed(run, slow())) == [0, 1, 2] and 0.06 <= run.wait < 1
