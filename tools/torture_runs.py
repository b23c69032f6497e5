"""What tools/torture.py tries: small runs of every script, on images of 16 pixels, and what they must leave behind."""

import json
import re
import shutil
import time

import numpy as np
import torch
from PIL import Image

from common import checkpoint, shapes
from tools import trials

COMMON = ("--model vit_tiny --patch_size 4 --img_size 16 --batch_size 8 --micro_batch 4 --warmup_epochs 1 "
          "--log_every 1 --base_lr 0.03 --device cpu --save_epochs 0.25")
DECODER = "--decoder_depth 1 --decoder_width 32 --decoder_heads 2"
SCRIPTS = {  # script: its own options
    "mae.py": DECODER,
    "simmim.py": "--mask_unit 4",
    "um_mae.py": DECODER + " --unit 4",
    "fastmim.py": "",
    "lut.py": DECODER + " --head_width 32",
    "finetune.py": "--eval_epochs 1000",
    "-m tools.dense": "--eval_epochs 1000 --task segment --head_width 16"}
EPOCHS = 3  # of four steps
STEPS = 4 * EPOCHS


# ---------------------------------------- Images and runs

def write_images(root, count, first=0):
    """Images of `shapes` in root/CLASS/, so many; their paths."""
    paths = []
    for i, pixels in enumerate(shapes.shapes_batch(0, np.arange(first, first + count), dense=False)["image"]):
        paths.append(root / f"class{i % 2}" / f"{i:03d}.png")
        paths[-1].parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[::4, ::4]).save(paths[-1])
    return paths


class Place:
    """The folder of all that is tried: images, and for each script a run that nobody has disturbed."""

    def __init__(self, out):
        self.out, self.images, self.labelled = out, out / "images", out / "labelled"
        self.whole = {}  # {script: (folder of its undisturbed run, how many seconds that took)}
        shutil.rmtree(out, ignore_errors=True)
        for split, count in (("train", 36), ("val", 8)):
            for path in write_images(self.images / split, count):
                for name in ("images", "labels"):
                    (self.labelled / split / name).mkdir(parents=True, exist_ok=True)
                shutil.copy(path, self.labelled / split / "images")
                labels = np.random.default_rng(int(path.stem)).integers(0, 3, (16, 16), dtype=np.uint8)
                Image.fromarray(labels).save(self.labelled / split / "labels" / path.name)
        (self.labelled / "classes.txt").write_text("a\nb\nc\n")

    def words(self, script, out, *more, epochs=EPOCHS):
        """The words behind `python` of a small run in a folder."""
        data = self.labelled if script == "-m tools.dense" else self.images
        return [*script.split(), *COMMON.split(), *SCRIPTS[script].split(), "--data", data, "--out", out,
                "--epochs", epochs, *more]

    def new(self, name):
        """A folder that is not there yet."""
        path = self.out / re.sub(r"\W+", "_", name)
        shutil.rmtree(path, ignore_errors=True)
        return path

    def undisturbed(self, script):
        if script not in self.whole:
            out, begin = self.new(f"whole {script}"), time.monotonic()
            require_end(trials.fork(*self.words(script, out)))
            self.whole[script] = out, time.monotonic() - begin
        return self.whole[script]


class Broke(Exception):
    """The project did not hold."""


def require_end(process):
    """Broke unless a process ends well and says nothing on stderr."""
    code, _, err = trials.finish(process)
    if code or err:
        raise Broke(f"exit code {code}: {err.strip()[-300:]}")


def require_one_line(process, words="", seconds=60):
    """Broke unless a process ends, within seconds, with code 2 and one line of error that holds the words."""
    code, _, err = trials.finish(process, seconds)
    if code != 2 or err.count("\n") != 1 or not err.startswith("error: ") or words not in err:
        raise Broke(f"exit code {code}: {err.strip()[-300:] or 'nothing said'}")


def content(path):
    """What a checkpoint holds, as plain data that can be compared."""
    return plain(checkpoint.read(path))


def plain(value):
    if isinstance(value, torch.Tensor):
        return str(value.dtype), value.shape, value.numpy().tobytes()
    if isinstance(value, dict):
        return [(key, plain(part)) for key, part in value.items()]
    return [plain(part) for part in value] if isinstance(value, (list, tuple)) else value


def require_same(out, whole):
    """Broke unless a run ended as another did, with each step in its log once."""
    for name in ("last.pt", "encoder.pt"):
        if content(out / name) != content(whole / name):
            raise Broke(f"{name} is not that of an unbroken run")
    require_log(out, STEPS)


def require_log(out, steps):
    """Broke unless the log of a run has each step once."""
    lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    found = [line["step"] for line in lines if "loss" in line]
    if found != list(range(1, steps + 1)):
        raise Broke(f"the log has steps {found}")
