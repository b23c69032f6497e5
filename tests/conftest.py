"""What several test files share: a small folder of images, the smallest options, and three ways to run a script."""

import json
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)


def flags(**options):
    """{name: value} as command-line words; None leaves an option out."""
    return [word for k, v in options.items() if v is not None for word in (f"--{k}", str(v))]


def snapshot(folder):
    """{path below folder: its bytes}, to see that nothing was written or overwritten."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def log_of(out):
    """The lines of OUT/log.jsonl that belong to training steps."""
    return [line for line in map(json.loads, (Path(out) / "log.jsonl").read_text().splitlines()) if "loss" in line]


def equal(a, b):
    """Are two nests of dicts, lists, tensors and plain values the same, bit for bit?"""
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    return type(a) is type(b) and a == b


def environment():
    """Of a child process: one thread that sleeps while it waits, none of torchrun's variables."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")}
    return {**kept, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT)}


def start(*words):
    """A Python process with these arguments, in the project's folder, output kept; the caller waits for it."""
    return subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT, env=environment(), text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


def finish(process, timeout=120):
    """(exit code, stdout, stderr) of a process from `start`. If it takes too long it is told to end, and then made to:
    torchrun ends its workers, which are in no group of ours, only when it is told."""
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.terminate()
        try:
            process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, stdout, stderr


def batch(model, B=3, seed=0):
    """(imgs (B, C, H, W), noise) such as the model of a method takes, a function of the seed."""
    draw = torch.Generator().manual_seed(seed)
    shape = (B, model.cfg.in_chans, *model.cfg.img_size)
    return torch.randn(shape, generator=draw), torch.rand(B, model.num_noise, generator=draw)


def gradients(model, imgs, noise):
    """(loss, {name: gradient}) of a model on whose parameters there were none."""
    loss = model(imgs, noise)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def torchrun(world, *words):
    """The words that start a script in `world` processes on this machine, on any free port."""
    return ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", world, *words]


def paint(path, seed, size=(16, 16)):
    """A small picture that depends on `seed` alone: noise over a gradient."""
    draw = np.random.default_rng(seed)
    ramp = np.linspace(0, 120, size[1]) * draw.uniform(0, 1, 3)[:, None, None]
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = (ramp + draw.uniform(0, 120, (3, *size))).transpose(1, 2, 0)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Class folders of 16-px images: 3 classes, 36 for training, 15 for validation."""
    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", 12), ("val", 5)):
        for label, name in enumerate(("ant", "bee", "cat")):
            for i in range(count):
                paint(root / split / name / f"{i}.png", seed=1000 * label + i + 100 * (split == "val"))
    return root


@pytest.fixture(scope="session")
def tiny(folder):
    """`tiny(**changes)`: words for mae.py, a run of 12 steps of 8 images in two micro-batches."""
    def words(**changes):
        return flags(**{
            "data": folder, "model": "vit_tiny", "patch_size": 4, "img_size": 16, "decoder_depth": 1,
            "decoder_width": 32, "decoder_heads": 2, "batch_size": 8, "micro_batch": 4, "epochs": 3,
            "warmup_epochs": 1, "base_lr": 0.03, "log_every": 1, "device": "cpu", "picture_epochs": 1000, **changes})
    return words


@pytest.fixture(scope="session")
def tuned(folder):
    """`tuned(**changes)`: words for finetune.py, a run of 12 steps of 8 images in two micro-batches."""
    def words(**changes):
        return flags(**{
            "data": folder, "model": "vit_tiny", "patch_size": 4, "img_size": 16, "batch_size": 8, "micro_batch": 4,
            "epochs": 3, "warmup_epochs": 1, "base_lr": 0.03, "log_every": 1, "device": "cpu", **changes})
    return words


@pytest.fixture
def call(capfd):
    """`call(main, words)` runs a script in this process: a namespace of code, out, err. Signal handlers, and the random
    numbers of the caller, are put back afterwards."""
    def run(main, words):
        handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
        capfd.readouterr()
        try:
            with torch.random.fork_rng(devices=[]):
                code = main([str(w) for w in words]) or 0
        except SystemExit as stop:
            code = stop.code or 0
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return types.SimpleNamespace(code=code, **dict(zip(("out", "err"), capfd.readouterr(), strict=True)))
    return run
