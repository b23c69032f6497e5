"""FastMIM-P: pre-training in phases, each on larger images than the one before (FastMIM, 4.2).

    --phase_sizes 128,160,192 --phase_epochs 200,100,100   ->   OUT/phase1_128px, OUT/phase2_160px, OUT/phase3_192px

Every phase is a run of its own, which is stopped and resumed like any other. Its weights start from those that the one
before ends with; OUT/encoder.pt is the encoder of the last one.
"""

import dataclasses
import functools
import os
import sys
import types
from pathlib import Path

import torch

import data
from common import checkpoint, engine, options, protocols, weights


def in_phases(config_class, model_class, doc):
    """Decorator of a script's `main`: with --phase_sizes, `main` runs once for every phase."""
    def decorate(main):
        @functools.wraps(main)
        def run(argv=None):
            cfg = engine.configure(config_class, doc, argv)
            if cfg.phase_sizes == "none":
                if {cfg.phase_epochs, cfg.phase_batches} != {"none"}:
                    options.fail("--phase_epochs and --phase_batches need --phase_sizes")
                return main(argv)
            words = list(sys.argv[1:] if argv is None else argv)
            with engine.user_errors():
                runs = [[*words, *own] for own in phases_of(cfg)]
            configs = [engine.configure(config_class, doc, own) for own in runs]
            with engine.user_errors():  # what does not fit is said before the first one begins
                with torch.device("meta"):
                    for own in configs:
                        engine.check(own, int(os.environ.get("WORLD_SIZE", 1)))
                        model_class(dataclasses.replace(own, plan=True))
                steps = [] if cfg.plan else steps_of(configs)
            one_by_one(main, cfg, runs, configs, steps)
        return run
    return decorate


def phases_of(cfg):
    """The words that every phase adds to the command line. ValueError if the phases are not as many as their epochs."""
    if cfg.phase_epochs == "none":
        raise ValueError("--phase_sizes needs --phase_epochs")
    sizes, epochs = cfg.phase_sizes.split(","), cfg.phase_epochs.split(",")
    batches = [str(cfg.batch_size)] * len(sizes) if cfg.phase_batches == "none" else cfg.phase_batches.split(",")
    if not len(sizes) == len(epochs) == len(batches):
        raise ValueError("--phase_sizes, --phase_epochs and --phase_batches hold one number for every phase, not "
                         f"{cfg.phase_sizes} and {cfg.phase_epochs} and {cfg.phase_batches}")
    if (Path(cfg.out) / "last.pt").exists():
        raise ValueError(f"--out {cfg.out} holds a run without phases: name another")
    sizes = [options.parse_value("phase_sizes", engine.Size, size) for size in sizes]
    if not all(0 < side < 2**16 for size in sizes for side in size):
        raise ValueError(f"--phase_sizes {cfg.phase_sizes}: no such images")
    # DIFF: FastMIM-P's paper does not say what becomes of schedule and optimizer between phases. Here both start anew:
    # resized tables have no moments, batch and learning rate may change, and so every phase ends with a usable encoder.
    outs = [Path(cfg.out) / (f"phase{i + 1}_{h}px" if h == w else f"phase{i + 1}_{h}x{w}px")
            for i, (h, w) in enumerate(sizes)]
    begun = [i for i, out in enumerate(outs) if cfg.resume and checkpoint.either(out / "last.pt")]
    words = []
    for i, ((h, w), length, batch) in enumerate(zip(sizes, epochs, batches, strict=True)):
        init = outs[i - 1] / "last.pt" if i else cfg.init
        if i and begun[-1:] == [i]:
            init = init_of(outs[i] / "last.pt")
        # DIFF: Swin's windows grow with the images (8, 10, 12 at 128, 160, 192 px); the paper resizes those of 14.
        window = max(1, round(cfg.window * min(h, w) / min(sizes[0])))
        seed = engine.seed_of(cfg.seed, "phase", i)  # other orders, crops and masks than in the phase before
        own = {"phase_sizes": "none", "phase_epochs": "none", "phase_batches": "none", "img_size": f"{h}x{w}",
               "window": window, "epochs": length, "batch_size": batch, "out": outs[i], "init": init, "seed": seed}
        words.append([word for name, value in own.items() for word in (f"--{name}", str(value))])
    return words


def init_of(path):
    """What the run that goes on from `path` started from: as it was written then, though --out may have moved."""
    saved = checkpoint.read_newest(path)
    checkpoint.require_run(saved, path)
    return saved["config"].get("init")


def goes_on(cfg):
    """Will the run find its weights in its own folder, so that it needs none to start from?"""
    return cfg.resume and checkpoint.either(Path(cfg.out) / "last.pt")


def one_by_one(main, cfg, runs, configs, steps):
    """Run all phases, or plan them. A signal ends the command in the phase it comes in, or behind it if that was in its
    last step; --max_steps counts the `steps` of all of them."""
    left = cfg.max_steps
    # The first phase replaces the later ones, too: stopped in it, a run must not go on with the second of another run.
    later = [Path(own.out) / name for own in [cfg, *configs[1:]] for name in options.FILES]
    for i, (words, own) in enumerate(zip(runs, configs, strict=True)):
        ended = not cfg.plan and any(map(goes_on, configs[i + 1 :]))
        engine.say(f"phase {i + 1} of {len(runs)}: {own.img_size[0]}x{own.img_size[1]} px, {own.epochs:g} epochs, "
                   f"batch {own.batch_size}{', has ended' * ended}")
        if cfg.max_steps and not cfg.plan:
            if left <= 0:
                return
            words, left = [*words, "--max_steps", str(left)], left - steps[i]
        with options.replacing(later if i == 0 else []):
            told = None if ended else main(words)
        if told and i + 1 < len(runs):
            engine.say(f"stopped after phase {i + 1}; add --resume to go on")
            raise SystemExit(128 + told)
    if options.is_main() and not cfg.plan and left >= 0:
        with engine.user_errors():
            checkpoint.write(Path(cfg.out) / "encoder.pt", checkpoint.read(Path(configs[-1].out) / "encoder.pt"))


def steps_of(configs):
    """Optimizer steps of every phase. ValueError if one of them makes none, ValueError or OSError if there are no
    images."""
    n, one = len(data.pretrain_set(configs[0])), types.SimpleNamespace(rank=0, world=1)
    steps = [engine.lengths(own, data.global_batches(n, own, one).steps_per_epoch)[0] for own in configs]
    if min(steps) < 1:
        raise ValueError(f"phase {1 + steps.index(min(steps))} of {len(steps)} makes no step: more --phase_epochs")
    return steps


def start_from(model, path):
    """Copy all weights of the last.pt of an earlier run into `model`, which may be of another image size: learned
    positions and bias tables are resized, a fixed table is computed. ValueError if it is another model."""
    saved = checkpoint.read(path)
    checkpoint.require_run(saved, path)
    then, now, encoder = saved["config"], engine.plain(engine.fixed(model.cfg)), model.encoder
    sizes = [then.get(name) for name in ("window", "patch_size", "decoder_heads", "decoder_width")]
    if not (isinstance(then.get("img_size"), list) and len(then["img_size"]) == 2
            and all(type(n) is int and 0 <= n < 2**16 for n in [*then["img_size"], *sizes])
            and checkpoint.all_ordinary(saved["model"])):
        raise ValueError(f"{path} is of another script's run")
    then, now = ({**of, "decoder_heads": of["decoder_heads"] or max(1, of["decoder_width"] // 32)}
                 for of in (then, now))  # heads of another number have weights of the same shapes
    for name in ("model", "in_chans", "target", "teacher", "decoder_heads"):
        if then.get(name) != now[name]:
            raise ValueError(f"{path} is of a run with --{name} {then.get(name)}, not {now[name]}")
    window = {"window": then["window"]} if "window" in encoder.arch["options"] else {}
    with torch.device("meta"):
        old = protocols.rebuild(encoder.arch, img_size=tuple(then["img_size"]), patch_size=then["patch_size"], **window)
    if old.arch["patch_size"] != encoder.arch["patch_size"]:
        raise ValueError(f"{path} is of a run with patches of {old.arch['patch_size']}, not "
                         f"{encoder.arch['patch_size']} pixels")
    inner = {k.removeprefix("encoder."): v for k, v in saved["model"].items() if k.startswith("encoder.")}
    notes = weights.adapt_bias_tables(inner, old.arch, encoder, path, "bicubic")  # FastMIM, A.3.2
    if "pos_embed" in dict(encoder.named_buffers()):
        inner["pos_embed"] = encoder.pos_embed
    elif "pos_embed" in inner and old.grid != encoder.grid:
        inner["pos_embed"] = weights.resize_positions(inner["pos_embed"], old.grid, encoder.grid, encoder.num_prefix)
    checkpoint.load_exactly(model, {**saved["model"], **{f"encoder.{k}": v for k, v in inner.items()}}, path)
    engine.say("; ".join([f"weights start from {path}, step {saved['step']}", *notes]))
