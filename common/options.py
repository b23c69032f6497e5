"""How a run is described: one dataclass a script, its defaults the paper's recipe, then a YAML file, then flags.

    cfg = configure(Config, __doc__)          # python mae.py --config configs/tiny.yaml --epochs 5

The comment behind a field is what --help prints. What a user can get wrong ends in one line on stderr and exit code 2.
"""

import contextlib
import dataclasses
import difflib
import inspect
import json
import math
import os
import platform
import re
import subprocess
import sys
import typing
from pathlib import Path

import torch
import yaml

Size = tuple[int, int]  # (height, width); written 224 or 96x160


@dataclasses.dataclass
class RunConfig:
    """Options that belong to no method; every script's `Config` puts its own in front of them."""

    data: str = "shapes"  # shapes, cifar10, cifar100, or a folder of images
    data_dir: str = "data"  # where cifar10 and cifar100 lie
    download: bool = False  # let torchvision fetch cifar into data_dir
    max_bad: float = 0.01  # share of unreadable images at which a run stops
    out: str = "runs/run"  # folder for config.yaml, log.jsonl, last.pt, encoder.pt, pictures/
    resume: bool = False  # go on from OUT/last.pt, or begin if there is none
    overwrite: bool = False  # replace the run that OUT holds
    schedule: str = "cosine"  # of the learning rate: cosine, or step (to a tenth after 7/8 of the run)
    seed: int = 0  # of weights, order, crops, masks
    drop_last: bool = True  # leave out the images that fill no batch at the end of an epoch
    workers: int = 0  # image-loading processes beside each training process
    device: str = "auto"  # auto, cpu, cuda
    precision: str = "auto"  # auto, bf16, fp16, fp32; auto is bf16 or else fp16 on a GPU, fp32 on a CPU
    compile: bool = False  # torch.compile
    activation_checkpointing: bool = False  # recompute activations in backward: less memory, about a third more time
    max_steps: int = 0  # stop after this many steps of the full schedule; 0 runs all of it
    log_every: int = 50  # steps between lines of log.jsonl
    picture_epochs: float = 20.0  # epochs between pictures of reconstructions
    probe_epochs: float = 0.0  # epochs between k-NN probes of the encoder, which change nothing; 0 for none
    probe_data: str = ""  # labelled data of the probe; --data if empty
    probe_labels: int = 0  # training images that the probe compares with, the same number of every class; 0 for all
    save_minutes: float = 15.0  # minutes between checkpoints
    save_epochs: float = 20.0  # epochs between checkpoints
    timeout_minutes: float = 10.0  # a process that waits longer than this for the others gives up
    plan: bool = False  # print parameters, FLOPs and memory per micro_batch, and stop


def fail(message, everywhere=False):
    """Exit with code 2 and one line on stderr, for what a user can put right. Under torchrun all processes fail alike
    on a wrong option and the first one says it; `everywhere=True` is for what only one of them can see."""
    if everywhere or is_main():
        print("error: " + " ".join(str(message).split()), file=sys.stderr, flush=True)
    raise SystemExit(2)


def is_main():
    """Is this the process that prints and writes? As torchrun says, also where no process group is joined yet."""
    return os.environ.get("RANK", "0") == "0"


def say(line):
    """Print a line, once, however many processes say it."""
    if is_main():
        print(line, flush=True)


@contextlib.contextmanager
def user_errors():
    """Turn the ValueErrors and OSErrors that models, data and checkpoints raise about a user's input into `fail`."""
    try:
        yield
    except (ValueError, OSError) as error:
        fail(error)


def describe(config_class):
    """{field name: its comment}, read from the source code of a dataclass and its bases."""
    comments = {}
    for cls in reversed([c for c in config_class.__mro__ if dataclasses.is_dataclass(c)]):
        for line in inspect.getsource(cls).splitlines():
            if found := re.match(r"    (\w+): .*?  # (.*)", line):
                comments[found[1]] = found[2]
    return comments


def parse_value(name, kind, value):
    """One option of type `kind` from a YAML value or a command-line word; exits with code 2 if it does not fit."""
    if kind == tuple[str, ...]:
        return tuple(str(v) for v in (value if isinstance(value, list) else [value]) if v != "")
    if typing.get_origin(kind) is tuple:
        parts = re.split("[x,]", value) if isinstance(value, str) else value if isinstance(value, list) else [value]
        parts = parts * len(kind.__args__) if len(parts) == 1 else parts
        if len(parts) != len(kind.__args__):
            fail(f"--{name} takes {len(kind.__args__)} numbers such as 96x160 or 0.2,1 and not {value!r}")
        return tuple(parse_value(name, k, part) for k, part in zip(kind.__args__, parts, strict=True))
    if kind is bool and str(value).lower() in ("true", "false"):
        return str(value).lower() == "true"
    if kind is str and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return str(value)
    wrong = isinstance(value, bool) or (kind is int and isinstance(value, float))
    if kind in (int, float) and not wrong:
        with contextlib.suppress(TypeError, ValueError):  # falls through to the one message below
            if math.isfinite(kind(value)):
                return kind(value)
    fail(f"--{name} takes {kind.__name__} and not {value!r}")


def read_yaml(path, script):
    """A recipe file as {key: value}. A section named like a script, such as `mae:`, counts for that script alone, so
    that one recipe can serve all; the section `run` of a run's own config.yaml is passed over. Exits with code 2 if the
    file cannot be read or holds something else."""
    try:
        content = yaml.safe_load(Path(str(path)).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        fail(f"--config {path}: {error}")
    if not isinstance(content or {}, dict):
        fail(f"--config {path} should hold lines of `key: value`")
    values, own = {}, {}
    for key, value in (content or {}).items():
        if not isinstance(value, dict):
            values[key] = value
        elif key == script:
            own = value
        elif key != "run" and not script_exists(key):
            fail(f"--config {path}: the section {key!r} is not named like a script, such as mae")
    return {**values, **own}


def script_exists(name):
    root = Path(__file__).resolve().parent.parent
    return (root / f"{name}.py").exists() or (root / "tools" / f"{name}.py").exists()


def read_flags(words, lists=()):
    """`--key value`, `--key=value`, or a bare `--key` for true, as ({key: value}, [--config files]). A key among
    `lists` takes all words up to the next option."""
    flags, files = {}, []
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            fail(f"did not expect {word!r}: options are written --key value; --help lists them")
        key, has_value, value = word[2:].partition("=")
        if not has_value:
            value = words.pop(0) if words and not words[0].startswith("--") else True
        if key in lists:
            value = [] if value is True else [value]
            while words and not words[0].startswith("--"):
                value.append(words.pop(0))
            if not value:
                fail(f"--{key} takes one or more words behind it")
        if key == "config":
            files.append(value)
        else:
            flags[key] = value
    return flags, files


def configure(config_class, doc, argv=None, presets=None):
    """Defaults, overridden by `--config FILE.yaml`, overridden by flags: an instance of the dataclass `config_class`.
    `presets`, {value of --mode: {option: value}}, are other defaults.

    Exits with code 2 on an unknown key (naming the nearest), a wrong type or an unreadable file; with 0 after --help.
    """
    kinds = typing.get_type_hints(config_class)
    words = list(sys.argv[1:] if argv is None else argv)
    if "--help" in words or "-h" in words:
        own = [f for f in dataclasses.fields(config_class) if f.name in config_class.__annotations__]
        comments = describe(config_class)
        print(doc.strip(), "\n\nOptions (--config FILE.yaml sets any of them, flags override it):")
        for f in own + [f for f in dataclasses.fields(config_class) if f not in own]:  # the method's fields first
            joint = "x" if kinds[f.name] == Size else ","
            default = joint.join(map(str, f.default)) if isinstance(f.default, tuple) else f.default
            print(f"  --{f.name} {default}".ljust(40), comments.get(f.name, ""))
        raise SystemExit(0)

    if argv is None and not words:
        fail("no options, and the defaults are a paper's recipe: days on many GPUs; the first lines of --help have a "
             "command for a CPU")
    flags, files = read_flags(words, [name for name, kind in kinds.items() if kind == tuple[str, ...]])
    values, script = {}, Path(inspect.getfile(config_class)).stem
    for source, given in [*((f"{f}: ", read_yaml(f, script)) for f in files), ("--", flags)]:
        for key, value in given.items():
            if key not in kinds:
                near = difflib.get_close_matches(str(key), kinds, n=1, cutoff=0.5)
                fail(f"unknown option {source}{key}; " + (f"did you mean {near[0]}?" if near else "--help lists them"))
            values[key] = parse_value(key, kinds[key], value)
    return config_class(**{**(presets or {}).get(values.get("mode"), {}), **values})


def check(cfg, world):
    """Refuse options that make no run, each with the way out."""
    for name in ("batch_size", "micro_batch", "epochs", "log_every", "save_minutes", "save_epochs", "timeout_minutes"):
        if getattr(cfg, name) <= 0:
            fail(f"--{name} must be greater than 0, not {getattr(cfg, name)}")
    if cfg.schedule not in ("cosine", "step"):
        fail(f"--schedule is cosine or step, not {cfg.schedule!r}")
    check_ranges(cfg)
    if cfg.device not in ("auto", "cpu", "cuda"):
        fail(f"--device is auto, cpu or cuda, not {cfg.device!r}")
    if cfg.device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda, but torch sees no GPU; --device cpu runs everywhere")
    if cfg.precision not in ("auto", "bf16", "fp16", "fp32"):
        fail(f"--precision is auto, bf16, fp16 or fp32, not {cfg.precision!r}")
    if cfg.precision == "fp16" and (cfg.device == "cpu" or not torch.cuda.is_available()):
        fail("--precision fp16 needs a GPU; a CPU takes bf16 or fp32")
    if not 0 <= cfg.max_bad <= 1 or cfg.workers < 0 or cfg.max_steps < 0:
        fail("--max_bad is a share from 0 to 1; --workers and --max_steps are 0 or more")
    if judges(cfg):
        return
    share, rest = divmod(cfg.batch_size, world)
    if rest:
        fail(f"--batch_size {cfg.batch_size} is not divisible by {world} processes")
    if share % min(cfg.micro_batch, share):
        fits = max(m for m in range(1, min(cfg.micro_batch, share) + 1) if share % m == 0)
        fail(f"--micro_batch {cfg.micro_batch} does not divide the {share} images of --batch_size that each of {world} "
             f"process(es) holds; --micro_batch {fits} does")


def judges(cfg):
    """Do the options ask for an evaluation alone, without a step of training?"""
    return bool(getattr(cfg, "eval", False) or getattr(cfg, "predict", ()) or getattr(cfg, "mode", "") == "knn")


def one_of(cfg, **choices):
    """ValueError unless each of these options, as in one_of(cfg, target="pixels norm_pixels"), is one of the words."""
    for name, words in choices.items():
        if getattr(cfg, name) not in words.split():
            raise ValueError(f"--{name} is one of {', '.join(words.split())}, not {getattr(cfg, name)}")


def check_ranges(cfg):
    """Refuse numbers that make no sense; a script's Config need not have all of them."""
    given = vars(cfg)
    for name in ("base_lr", "min_lr", "weight_decay", "clip_grad", "warmup_epochs", "mixup", "cutmix", "color_jitter",
                 "shift", "labels", "picture_epochs", "probe_epochs", "probe_labels", "eval_epochs", "context_weight",
                 "pixel_weight", "teacher_weight"):
        if given.get(name, 0) < 0:
            fail(f"--{name} must be 0 or more, not {given[name]}")
    for name in ("flip", "random_erasing", "smoothing", "layer_decay", "ema_decay"):
        if not 0 <= given.get(name, 0) <= 1:
            fail(f"--{name} must lie in [0, 1], not {given[name]}")
    for name in ("drop_path", "target_mask_ratio"):
        if not 0 <= given.get(name, 0) < 1:
            fail(f"--{name} must lie in [0, 1), not {given[name]}")
    for name in ("lr_batch", "head_width"):
        if given.get(name, 1) < 1:
            fail(f"--{name} must be 1 or more, not {given[name]}")
    if not 0 < cfg.crop_scale[0] <= cfg.crop_scale[1] <= 1:
        fail(f"--crop_scale takes two shares, 0 < smallest <= largest <= 1, not {cfg.crop_scale}")
    if not all(0 <= beta < 1 for beta in cfg.betas):
        fail(f"--betas takes two numbers in [0, 1), not {cfg.betas}")
    if 0 < min(cfg.img_size) <= given.get("shift", 0):
        fail(f"--shift {cfg.shift} must be less than the {min(cfg.img_size)} pixels of --img_size")
    if abs(cfg.seed) >= 2**63:
        fail(f"--seed {cfg.seed} does not fit 64 bits")


def commit():
    """The git commit of this code, with -dirty if it was edited; "unknown" outside a git checkout."""
    words = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def plain(value):
    """Tuples as lists, so that YAML, JSON and checkpoints hold plain data only."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def fixed(cfg):
    """The options that a resumed run must share with its beginning: all but those that cannot change a number, as far
    as BatchNorm, which sees what is held at once, leaves --micro_batch among these."""
    tied = {"data", "max_bad", "schedule", "seed", "drop_last", "precision"}  # among the options of any run
    free = {f.name for f in dataclasses.fields(RunConfig)} - tied
    free |= {"micro_batch", "eval_epochs", "confusion", "corruptions", "neighbours"}
    return {name: value for name, value in dataclasses.asdict(cfg).items() if name not in free}


def step_of(line):
    """The step that a line of log.jsonl tells of; infinite for half a line, as a power cut leaves it."""
    try:
        return json.loads(line)["step"]
    except json.JSONDecodeError:
        return math.inf


FILES = ("config.yaml", "log.jsonl", "result.json", "last.pt", "encoder.pt", "previous.last.pt", "previous.encoder.pt")
REPLACED = []  # files elsewhere that belong to what a run replaces


@contextlib.contextmanager
def replacing(paths):
    """Within it, a run that claims its --out claims these files, too: they forbid it, or are removed with the rest."""
    REPLACED[:] = paths
    try:
        yield
    finally:
        REPLACED.clear()


def claim(cfg, run, saved, about):
    """Make --out this run's folder and write config.yaml: the resolved options, versions and git commit.

    ValueError if it holds a run that neither --resume nor --overwrite says what to do with, or weights that would be
    lost: those that this run starts from, or any, if it evaluates alone. OSError if it cannot be written. Nothing is
    removed before all of that is known.
    """
    if run.out.exists() and not run.out.is_dir():
        raise ValueError(f"--out {run.out} is a file")
    used = [path for path in [*(run.out / name for name in FILES), *REPLACED] if path.exists()]
    trained = any(path.suffix == ".pt" for path in used)  # --resume does not begin anew over weights
    if used and not (saved or cfg.overwrite or (cfg.resume and not trained)):
        raise ValueError(f"--out {used[0].parent} holds a run: --resume goes on, --overwrite replaces it, or name "
                         "another")
    if trained and judges(cfg):
        raise ValueError(f"--out {run.out} holds the weights of a run, and an evaluation has none: name another")
    sources = [Path(getattr(cfg, name, "none")).resolve() for name in ("init", "teacher")]
    if not saved and any(path.resolve() in sources for path in used):
        raise ValueError(f"--out {run.out} holds what this run starts from, or would replace it: name another")
    run.out.mkdir(parents=True, exist_ok=True)
    (run.out / ".writable").write_text("yes")
    (run.out / ".writable").unlink()
    if saved:  # what the log holds beyond the checkpoint will be done and written again
        log = run.out / "log.jsonl"
        lines = log.read_text().splitlines(keepends=True) if log.exists() else []
        log.write_text("".join(line for line in lines if step_of(line) <= saved["step"]))
    else:
        for path in used:
            path.unlink()
    origin = {"command": " ".join(sys.argv), "commit": commit(), "torch": str(torch.__version__),
              "python": platform.python_version(), "device": str(run.device), "dtype": str(run.dtype),
              "processes": run.world}
    record = plain({**dataclasses.asdict(cfg), "run": {**origin, **about}})
    (run.out / "config.yaml").write_text(yaml.safe_dump(record, sort_keys=False))
