"""bench.py: what is timed is what the scripts do, and what is printed is what was measured."""

import inspect
import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import finetune
import mae
from tools import bench, tables

TINY = {"model": "vit_tiny", "patch_size": 8, "in_chans": 3, "img_size": (32, 32), "workers": 0}
MAE_TINY = TINY | {"decoder_depth": 1, "decoder_width": 32, "decoder_heads": 2}


@pytest.fixture
def tiny(monkeypatch):
    """Two tiny cases and pairs of them; no fresh process, which would not know them, measures their peak."""
    cases = {"tiny MAE": (mae.Config, MAE_TINY, mae.MAE),
             "tiny MAE, mask tokens": (mae.Config, MAE_TINY | {"mask_tokens_in_encoder": True}, mae.MAE),
             "tiny fine-tuning": (finetune.Config, TINY | {"mixup": 0.0, "cutmix": 0.0}, finetune.Classifier)}
    monkeypatch.setattr(bench, "CASES", cases)
    monkeypatch.setattr(bench, "PAIRS", {"yardstick": [("tiny fine-tuning", "squeezenet1_1 224", "")],
                                         "ratios": [("tiny MAE", "tiny MAE, mask tokens", "2.8x")]})
    monkeypatch.setattr(bench.subprocess, "check_output", lambda words, **options: "1000000")
    threads = torch.get_num_threads()
    yield cases
    torch.set_num_threads(threads)


# FLOPs of two images through "tiny MAE": a product of (m, k) and (k, n) is 2mkn; 16 patches, 4 of them kept, 1 class.
# Backward does two products for one of forward, but for the first layer's, whose input needs no gradient.
N, KEPT, D, WIDTH, VALUES = 16, 4 + 1, 96, 32, 8 * 8 * 3
EMBED = 2 * 2 * N * VALUES * D


def block(tokens, width):
    return 2 * 2 * tokens * (12 * width**2 + 2 * tokens * width)


FORWARD = (EMBED + 4 * block(KEPT, D) + 2 * 2 * KEPT * D * WIDTH + block(N + 1, WIDTH) + 2 * 2 * N * WIDTH * VALUES)


def shared(precision="fp32"):
    return {"batch_size": 2, "micro_batch": 2, "precision": precision, "device": "cpu", "data": "none"}


def statements(function):
    return [line.split("#")[0].strip() for line in inspect.getsource(function).splitlines()]


@pytest.mark.parametrize("script", [mae, finetune])
def test_step_is_the_one_of_the_scripts(script):
    """Every statement between backward and zero_grad stands in main() and in bench's step, in the same order."""
    ours, theirs = statements(bench.Script.step), statements(script.main)
    first, last = "run.scaler.scale(loss * run.world_size).backward()", "optimizer.zero_grad(set_to_none=True)"
    theirs = theirs[theirs.index(first) : theirs.index(last) + 1]
    assert ours[ours.index(first) : ours.index(last) + 1] == theirs


@pytest.mark.parametrize("name", ["tiny MAE", "tiny fine-tuning"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_trains_every_parameter(tiny, name, precision):
    side = bench.Script(name, shared(precision))
    before = [p.detach().clone() for p in side.model.parameters()]
    side.step(0)
    side.step(1)  # a zero-initialised layer hides the gradient of what lies below it in the first step
    same = [n for (n, p), old in zip(side.model.named_parameters(), before, strict=True) if torch.equal(p, old)]
    assert not [n for n in same if side.model.get_parameter(n).requires_grad]
    assert all(p.grad is None for p in side.model.parameters())


@pytest.mark.parametrize("what", ["yardstick", "ratios"])
def test_result_file_and_table(tiny, tmp_path, capsys, what):
    path = tmp_path / "results" / "bench.json"
    words = [what, "--rounds", "2", "--batch", "2", "--precision", "both", "--device", "cpu", "--json", str(path)]
    bench.main(words)
    printed, record = capsys.readouterr().out, json.loads(path.read_text())
    rows = record["results"]
    assert [row["precision"] for row in rows] == ["fp32", "bf16"]
    assert {"commit", "date", "machine", "commands", "seeds"} <= record.keys()
    assert {"processor", "bf16_instructions", "torch", "threads"} <= record["machine"].keys()
    assert record["commands"] == [f"python -m tools.bench {' '.join(words)}"]
    for row in rows:
        a, b = row["seconds"]
        assert len(a) == len(b) == 2 and min(a + b) > 0
        assert row["ratios"] == pytest.approx([b[0] / a[0], b[1] / a[1]])
        assert f"**{sum(row['ratios']) / 2:#.3g}** ({min(row['ratios']):#.3g} to {max(row['ratios']):#.3g})" in printed
        assert f"| {row['flops'][1] / row['flops'][0]:.2f} | 1.00 (at 16) |" in printed
    assert rows[0]["flops"] == rows[1]["flops"]
    if what == "ratios":
        assert rows[0]["flops"][0] == 3 * FORWARD - EMBED
    tables.main(["print", str(path)])
    assert capsys.readouterr().out == printed and printed.count("\n|") == 4
    assert ("2.8x" in printed) == (what == "ratios")


def test_a_compiled_step_beside_its_own(tiny, monkeypatch, tmp_path, capsys):
    """B is the same script with --compile; its first step, in which it compiles, is no round."""
    real, compiled = torch.nn.Module.compile, []

    def noted(model):
        compiled.append(type(model))
        real(model, backend="eager")  # without the minutes of generating code

    monkeypatch.setattr(torch.nn.Module, "compile", noted)
    monkeypatch.setattr(bench, "PAIRS", {"compile": [("tiny MAE", "tiny MAE: compiled", "")]})
    path = tmp_path / "bench.json"
    words = ["compile", "--rounds", "2", "--batch", "2", "--precision", "fp32", "--device", "cpu", "--json", str(path)]
    bench.main(words)
    [row] = json.loads(path.read_text())["results"]
    assert compiled == [mae.MAE] and row["peak_bytes"] == [0, 0] and row["flops"] == [3 * FORWARD - EMBED] * 2
    assert row["first_seconds"] > max(row["seconds"][1]) and len(row["ratios"]) == 2
    printed = capsys.readouterr().out
    assert f"| tiny MAE: compiled / tiny MAE, fp32, batch 2 | **{sum(row['ratios']) / 2:#.3g}**" in printed
    torch._dynamo.reset()


def test_stochastic_depth_of_the_yardstick():
    """The third word of a name is the rate of timm's last block."""
    side = bench.Yardstick("timm:vit_tiny_patch16_224 224 0.2", shared())
    rates = [block.drop_path1.drop_prob for block in side.model.blocks if hasattr(block.drop_path1, "drop_prob")]
    assert max(rates) == pytest.approx(0.2) and bench.CASES["fine-tuning ViT-L"][1]["drop_path"] == 0.2


def test_numbers_go_below_runs_unless_asked_for(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bench.main(["--rounds", "1", "--batch", "2", "--precision", "fp32", "--device", "cpu"])
    assert [path.name for path in tmp_path.rglob("*.json")] == ["bench_yardstick_cpu.json"]
    assert (tmp_path / "runs" / "bench_yardstick_cpu.json").exists()


def test_memory_is_left_out_where_the_system_does_not_tell(tiny, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench.subprocess, "check_output", lambda words, **options: "0")
    words = ["--rounds", "1", "--batch", "2", "--precision", "fp32", "--device", "cpu"]
    bench.main([*words, "--json", str(tmp_path / "bench.json")])
    assert "(at " not in capsys.readouterr().out

    class Nowhere(type(ROOT)):
        def exists(self):
            return False
    monkeypatch.setattr(bench, "Path", Nowhere)
    assert bench.resident("VmRSS") == 0


def test_unknown_case_is_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main(["--cases", "no such case"])
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_peak_comes_from_a_fresh_process():
    """At least weight, gradient and two moments of each parameter, and far less than what this process holds."""
    words = [sys.executable, "-m", "tools.bench", "--peak", "squeezenet1_1 64", "--precision", "fp32",
             "--memory_batch", "1", "--device", "cpu"]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    parameters = sum(p.numel() for p in bench.torchvision.models.squeezenet1_1().parameters())
    assert 16 * parameters < int(done.stdout) < 1e9
