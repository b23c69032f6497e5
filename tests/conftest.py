"""What several test files share: a small folder of images, the smallest options, and a way to run a script
in this process. (tools/trials.py starts others.)"""

import itertools
import json
import os
import random
import signal
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common import transforms
from tools import runner
from tools.trials import ROOT

# The order of the tests, and who runs them


def pytest_collection_modifyitems(items):
    """The longest files first, so that two processes end at about the same time; or, with TEST_ORDER_SEED=1 or another
    number, files and the tests of each in random order. A file stays in one piece, because its fixtures are shared."""
    files = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    paths = sorted(files, key=lambda path: -path.stat().st_size)
    if seed := os.environ.get("TEST_ORDER_SEED"):
        draw = random.Random(int(seed))
        draw.shuffle(paths)
        for tests in files.values():
            draw.shuffle(tests)
    items[:] = [item for path in paths for item in files[path]]


def is_ours(path):
    """Processes that share a folder TEST_CLAIMS share the work: who is the first to make a mark runs the file."""
    try:
        Path(os.environ["TEST_CLAIMS"], "-".join(path.relative_to(ROOT).parts)).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def pytest_runtestloop(session):
    """Of processes that share the work: file by file, everything of which is torn down before the next one."""
    if "TEST_CLAIMS" not in os.environ or session.config.option.collectonly or session.testsfailed:
        return None  # pytest's own loop
    for path, tests in itertools.groupby(session.items, lambda item: item.path):
        tests = list(tests)
        for item, following in zip(tests, [*tests[1:], None], strict=True) if is_ours(path) else ():
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if session.shouldstop:
                raise session.Interrupted(session.shouldstop)
    return True


@pytest.fixture(autouse=True)
def same_random_numbers():
    """A test that draws without a seed draws the same in any order: a run in this process leaves others behind."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


# What tests take


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


def batch(model, B=3, seed=0):
    """(imgs (B, C, H, W), noise) such as the model of a method takes, a function of the seed."""
    draw = torch.Generator().manual_seed(seed)
    shape = (B, model.cfg.in_chans, *model.cfg.img_size)
    return torch.randn(shape, generator=draw), torch.rand(B, model.num_noise, generator=draw)


def dimmed(imgs, hidden):
    """Normalised images (B, 3, H, W) as pictures show a prediction: with less contrast where it is not hidden."""
    return transforms.denormalize(torch.where(hidden, imgs, 0.3 * imgs))


def gradients(model, imgs, noise):
    """(loss, {name: gradient}) of a model on whose parameters there were none."""
    loss = model(imgs, noise)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


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


@pytest.fixture
def made_up(monkeypatch, tmp_path):
    """`made_up()` lists the commands that tools/runner.py has run. They are made up: each leaves the files of a run,
    and 50 %, or 40 % from scratch. Seed 13 fails. What is written goes to a temporary folder."""
    commands = []
    commit = "1111111"

    class Process:
        """In place of one of multiprocessing. It ends before it has begun."""

        def __init__(self, target, args):
            [self.job] = args
            self.sentinel = open(os.devnull)  # to wait for it takes no time

        def start(self):
            out = self.job.out
            top1 = 40 if "scratch" in str(out) else 50
            (out / "result.json").write_text(json.dumps({"top1": top1, "miou": 30 + top1, "rmse": top1 / 40,
                                                                "pck": 20 + top1}))
            (out / "config.yaml").write_text(f"run: {{commit: '{commit}'}}")
            (out / "log.jsonl").write_text('{"step": 100, "loss": 2.0}\n{"step": 1250, "loss": 1.0}\n')
            (out / "pictures").mkdir(exist_ok=True)
            (out / "pictures" / "step.png").touch()
            (out / "output.txt").write_text("no such luck")
            commands.append(self.job.command)
            self.exitcode = int(" --seed 13 " in self.job.command)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner, "PROCESSES", types.SimpleNamespace(Process=Process))
    return lambda: list(commands)
