"""Steps of tools/gpu.py that are right or wrong: every script in every precision, and what can go wrong in a run.

A step yields (name of a part, what was found; "ok" says whether it is as it should be) and has a process of its own.
`args`: device, dry (tiny sizes, few steps), out (a folder of its own), seconds (its time), cifar (a file, or None).
"""

import contextlib
import hashlib
import io
import itertools
import json
import math
import re
import signal
import subprocess
import sys
import time
from unittest import mock

import torch
import torch.distributed as dist

import data
import fastmim
import finetune
import lut
import mae
import simmim
import um_mae
from common import config
from tools import dense

CLASSES = [str(k) for k in range(10)]
SCRIPTS = {"mae": mae, "simmim": simmim, "um_mae": um_mae, "fastmim": fastmim, "lut": lut, "finetune": finetune,
           "dense": dense}
BUILD = {"mae": mae.MAE, "simmim": simmim.SimMIM, "um_mae": um_mae.UMMAE, "fastmim": fastmim.FastMIM, "lut": lut.LUT,
         "finetune": lambda cfg: finetune.build_classifier(cfg, None, CLASSES),
         "dense": lambda cfg: dense.build_dense(cfg, None, CLASSES)}
TINY = {name: f"configs/{name}_tiny.yaml" for name in SCRIPTS} | {"mae": "configs/tiny.yaml"}
OF_VIT = ["--model", "vit_tiny", "--patch_size", "8"]  # where a recipe leaves the encoder to --init
CAP = 12e9  # bytes, in which 512 images of ViT-B do not fit


# ---------------------------------------- Runs of scripts

def words(args, name, *more):
    """The words of a small run of a script: 640 images of `shapes`, all losses logged."""
    given = OF_VIT if name in ("finetune", "dense") else []
    return ["--config", TINY[name], *given, "--device", args.device, "--log_every", "1", "--picture_epochs", "0",
            *map(str, more)]


def options(name, argv):
    """The Config of a script, with sizes and channels that are left to --init filled in."""
    cfg = config.parse(SCRIPTS[name].Config, "", list(map(str, argv)))
    return SCRIPTS[name].resolve(cfg)[0] if hasattr(SCRIPTS[name], "resolve") else cfg


def few_images():
    """In this process, `shapes` has few images: they are drawn anew by every run."""
    data.SPLITS = {"train": (0, 640), "val": (1_000_000, 64), "test": (2_000_000, 64)}


def losses(out):
    lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def outcome(main, argv):
    """(exit code, what went to stderr) of a script in this process."""
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            main([str(word) for word in argv])
        return 0, stderr.getvalue()
    except SystemExit as stop:
        return stop.code or 0, stderr.getvalue()


def smoke(args, name):
    """20 steps in every precision; a run that was stopped and goes on; the same weights on CPU and GPU."""
    few_images()
    steps = 4 if args.dry else 20
    for precision in ("bf16", "fp32") if args.device == "cpu" else ("bf16", "fp16", "fp32"):
        out = args.out / precision
        SCRIPTS[name].main(words(args, name, "--precision", precision, "--max_steps", steps, "--out", out))
        found = losses(out)
        yield precision, {"ok": len(found) == steps and all(map(math.isfinite, found)), "loss": found[-1]}

    for last in (steps // 2, steps):
        more = ["--precision", "bf16", "--max_steps", last, "--out", args.out / "resumed", "--resume"]
        SCRIPTS[name].main(words(args, name, *more))
    unbroken, resumed = losses(args.out / "bf16"), losses(args.out / "resumed")
    difference = max(abs(a - b) / abs(a) for a, b in zip(unbroken, resumed, strict=True))
    yield "resumed", {"ok": difference < 1e-2, "largest relative difference": difference}
    yield "as on a CPU", as_on_a_cpu(args, name)


def as_on_a_cpu(args, name):
    """Are masks equal, and losses in fp32, or outputs in the mean, to 1e-4 of their size?"""
    torch.set_float32_matmul_precision("highest")  # no TF32
    torch.backends.cudnn.allow_tf32 = False
    cfg = options(name, words(args, name))
    torch.manual_seed(0)
    model = BUILD[name](cfg).train()
    imgs = torch.randn(8, *getattr(model, "input_shape", (3, *cfg.img_size)))
    noise = torch.rand(8, model.num_noise)
    masks = []

    def noted(noise):
        masks.append(type(model).mask(model, noise))
        return masks[-1]

    if hasattr(model, "mask"):
        model.mask = noted
    means = []
    for device in ("cpu", args.device):
        output = model.to(device)(imgs.to(device), noise.to(device))
        means.append(output.float().abs().mean().item())
    difference = abs(means[1] - means[0]) / means[0]
    hashes = {hash_of(mask) for mask in masks}
    return {"ok": len(hashes) < 2 and difference < 1e-4, "on a CPU": means[0], "relative difference": difference}


def hash_of(tensors):
    leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(tensors) if isinstance(leaf, torch.Tensor)]
    return hashlib.sha256(b"".join(leaf.cpu().numpy().tobytes() for leaf in leaves)).hexdigest()


# ---------------------------------------- What goes wrong, and several processes

def torchrun(args):
    """What a user types, and a process group of one: averaged gradients, and LUT's rows of all processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", "mae.py"]
    command += words(args, "mae", "--max_steps", "3", "--out", args.out / "run")
    done = subprocess.run(command, cwd=config.ROOT, capture_output=True, text=True)
    yield "torchrun", {"ok": done.returncode == 0, "error": done.stderr[-300:] if done.returncode else ""}

    backend = "nccl" if args.device == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    model = mae.MAE(options("mae", words(args, "mae"))).to(args.device)
    imgs, noise = torch.randn(4, 3, 64, 64, device=args.device), torch.rand(4, model.num_noise, device=args.device)
    model(imgs, noise).backward()
    alone = [p.grad.clone() for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    net = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    net(imgs, noise).backward()
    same = all(torch.allclose(a, p.grad, 1e-3, 1e-5) for a, p in zip(alone, model.parameters(), strict=True))
    rows = torch.randn(4, 8, device=args.device, requires_grad=True)
    gathered = lut.AllGather.apply(rows)
    gathered.sum().backward()
    yield backend, {"ok": same and torch.equal(gathered, rows) and bool((rows.grad == 1).all())}
    dist.destroy_process_group()


def sigterm(args):
    """A run that gets SIGTERM saves, exits with 143, and goes on."""
    out = args.out / "run"
    command = [sys.executable, "mae.py", *words(args, "mae", "--out", out)]
    with open(args.out / "first.txt", "w") as output:
        process = subprocess.Popen(command, cwd=config.ROOT, stdout=output, stderr=output)
    while process.poll() is None and not (out / "log.jsonl").exists():
        time.sleep(0.2)
    process.terminate()
    code = process.wait()
    steps = len(losses(out))
    yield "SIGTERM", {"ok": code == 128 + signal.SIGTERM and (out / "last.pt").exists(), "code": code, "steps": steps}
    done = subprocess.run([*command, "--resume", "--max_steps", str(steps + 3)], cwd=config.ROOT, capture_output=True)
    yield "goes on", {"ok": done.returncode == 0 and len(losses(out)) == steps + 3}


def nan(args):
    """A loss that is not finite ends a run in one line, before the optimizer."""
    few_images()
    real, calls = mae.MAE.loss, itertools.count()

    def loss(model, *inputs):
        return real(model, *inputs) * (math.nan if next(calls) > 5 else 1.0)

    with mock.patch.object(mae.MAE, "loss", loss):
        code, stderr = outcome(mae.main, words(args, "mae", "--out", args.out / "run"))
    yield "NaN", {"ok": code == 2 and "loss nan" in stderr, "line": last_line(stderr)}


def out_of_memory(args):
    """The advice of the line that a full GPU ends in, followed until the run fits."""
    few_images()
    if args.device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(CAP / total)
        micro_batch, more = 512, ["--config", "configs/mae_vit_b.yaml"]
        little_memory = contextlib.nullcontext()
    else:
        micro_batch, more = 8, []
        little_memory = mock.patch.object(mae.MAE, "encode", encode_two(mae.MAE.encode))
    for attempt in range(5):
        sizes = ["--batch_size", micro_batch * 2**attempt, "--micro_batch", micro_batch, "--max_steps", 2]
        argv = words(args, "mae", *more, "--data", "shapes", "--workers", 0, *sizes, "--out", args.out / str(attempt))
        with little_memory:
            code, stderr = outcome(mae.main, argv)
        advice = re.search(r"try --micro_batch (\d+)", stderr)
        line = last_line(stderr) if code else ""
        yield f"--micro_batch {micro_batch}", {"ok": code == 0 or bool(advice), "line": line}
        if not advice:
            return
        micro_batch = int(advice[1])


def encode_two(real):
    """In the place of a GPU that is full: an encoder that takes two images at once."""
    def encode(model, imgs, *rest):
        if len(imgs) > 2 and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("as if")
        return real(model, imgs, *rest)

    return encode


def last_line(text):
    return (text.splitlines() or [""])[-1][:300]
