"""How a run is described: one dataclass a script, its defaults the paper's recipe, then a YAML file, then flags.

    cfg = config.parse(Config, __doc__)  # python mae.py --config configs/tiny.yaml --epochs 5

The comment behind a field is what --help prints. What a user can get wrong ends in one line and exit code 2.
"""

import argparse
import contextlib
import dataclasses
import difflib
import functools
import inspect
import json
import math
import os
import re
import shlex
import subprocess
import sys
import time
import typing
from pathlib import Path

import yaml

Size = tuple[int, int]  # (height, width); written 224 or 96x160
ROOT = Path(__file__).resolve().parent.parent


@dataclasses.dataclass
class RunConfig:
    """Options that belong to no method; every script's `Config` puts its own in front of them."""
    # Data
    data: str = ""  # shapes, cifar10, cifar100, torchvision:NAME, or a folder of images; required
    data_dir: str = "data"  # where cifar10, cifar100 and torchvision:NAME lie
    download: bool = False  # let torchvision fetch them into data_dir
    max_bad: float = 0.01  # share of unreadable images at which a run stops
    drop_last: bool = True  # leave out the images that fill no batch at the end of an epoch
    workers: int = 0  # image-loading processes beside each training process
    value_range: tuple[float, ...] = ()  # black,white in images of more than 8 bits; empty: as in the first images
    mean: tuple[float, ...] = ()  # of each channel, white being 1; empty: as in --init, or ImageNet's for 3, or 0.5
    std: tuple[float, ...] = ()  # of each channel; empty: as in --init, or ImageNet's for 3, or 0.25
    # Run
    out: str = "runs/run"  # folder for config.yaml, log.jsonl, last.pt, encoder.pt, pictures/
    resume: bool = False  # go on from OUT/last.pt, or begin if there is none
    overwrite: bool = False  # replace the run that OUT holds
    schedule: str = "cosine"  # of the learning rate: cosine, or step (to a tenth after 7/8 of the run)
    seed: int = 0  # of weights, order, crops, masks
    device: str = "auto"  # auto, cpu, cuda, mps (the GPU of a Mac); auto is cuda or else cpu
    precision: str = "auto"  # auto, bf16, fp16, fp32; auto is bf16 or else fp16 on a GPU, fp32 on a CPU
    compile: bool = False  # torch.compile
    activation_checkpointing: bool = False  # recompute activations in backward: less memory, about a third more time
    max_steps: int = 0  # stop after this many steps of the full schedule; 0 runs all of it
    save_minutes: float = 15.0  # minutes between checkpoints
    save_epochs: float = 20.0  # epochs between checkpoints
    timeout_minutes: float = 10.0  # a process that waits longer than this for the others gives up
    plan: bool = False  # print parameters, FLOPs and memory per micro_batch, and stop
    # Log
    log_every: int = 50  # steps between lines of log.jsonl
    logger: str = "none"  # beside log.jsonl: tensorboard, wandb or csv
    picture_epochs: float = 20.0  # epochs between pictures of reconstructions
    probe_epochs: float = 0.0  # epochs between k-NN probes of the encoder, which change nothing; 0 for none
    probe_data: str = ""  # labelled data of the probe; --data if empty
    probe_labels: int = 0  # training images that the probe compares with, the same number of every class; 0 for all

    # A script's own options that may differ in a resumed run. (Where there is BatchNorm, this one changes numbers.)
    may_change = ("micro_batch",)
    # Does the script refuse recipes of other scripts? Those that pre-train share configs/tiny.yaml.
    own_recipes = False

    def check(self):
        """ValueError for numbers that make no run; of each script's recipe, too."""
        one_of(self, schedule="cosine step", device="auto cpu cuda mps", precision="auto bf16 fp16 fp32",
               logger="none tensorboard wandb csv")
        positive = "batch_size micro_batch epochs log_every save_minutes save_epochs timeout_minutes"
        not_negative = ("warmup_epochs base_lr min_lr weight_decay clip_grad workers max_steps picture_epochs "
                        "probe_epochs probe_labels")
        in_range(self, **dict.fromkeys(positive.split(), "(0, inf)"), **dict.fromkeys(not_negative.split(), "[0, inf)"))
        in_range(self, flip="[0, 1]", max_bad="[0, 1]", lr_batch="[1, inf)")
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"--crop_scale takes two shares, 0 < smallest <= largest <= 1, not {self.crop_scale}")
        check_channels(self)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"--betas takes two numbers in [0, 1), not {self.betas}")
        if 0 < min(self.img_size) <= getattr(self, "shift", 0):  # not every script shifts images
            raise ValueError(f"--shift {self.shift} must be less than the {min(self.img_size)} pixels of --img_size")
        if abs(self.seed) >= 2**63:
            raise ValueError(f"--seed {self.seed} does not fit 64 bits")
        require_possible(self)

    def evaluates_only(self):
        """Do the options ask for an evaluation alone, without a step of training?"""
        return False

    def next_commands(self):
        """What may be typed after a run, printed at its end, each as a list of words: after pre-training, how to
        fine-tune its encoder, and to see what it reconstructs."""
        recipe, more = self.tuning_recipe()
        words = ["--config", f"configs/{recipe}.yaml"] if recipe else []
        words += ["--init", f"{self.out}/encoder.pt", *more]
        if self.is_fetched() and self.data_dir != "data":
            words += ["--data_dir", self.data_dir]
        return [["finetune.py", *words, "--out", f"{self.out}_tuned"],
                ["-m", "tools.show", "IMAGE", "--init", f"{self.out}/last.pt"]]

    def is_fetched(self):
        """Are the images a data set that torchvision knows, in data_dir?"""
        return self.data in ("cifar10", "cifar100") or self.data.startswith("torchvision:")

    def tuning_recipe(self):
        """(recipe of fine-tuning that fits this run, or None; options that it needs)."""
        recipes = {"shapes": "finetune_tiny", "cifar10": "cifar10_finetune"}
        if self.data in recipes:  # which say --data
            return recipes[self.data], []
        has_labels = self.is_fetched() or any(path.is_dir() for path in Path(self.data).glob("train/*"))
        words = ["--data", self.data if has_labels else "FOLDER_WITH_LABELS"]
        if max(self.img_size) <= 64:  # as small as the images of these recipes
            recipe = "cifar10_finetune" if self.is_fetched() else "finetune_tiny"
            return recipe, [*words, "--labels", "0", "--batch_size", str(min(32, self.batch_size))]
        own = Path(inspect.getfile(type(self))).stem.removesuffix("_mae")
        names = [f"finetune_{own}_{self.model}", f"finetune_{self.model}"]
        return next((name for name in names if (ROOT / "configs" / f"{name}.yaml").exists()), None), words

    def fixed_options(self):
        """The options that a resumed run must share with its beginning: all that can change a number."""
        # Among the options of any run
        tied = {"data", "max_bad", "schedule", "seed", "drop_last", "precision", "value_range", "mean", "std"}
        free = {field.name for field in dataclasses.fields(RunConfig)} - tied
        free.update(self.may_change)
        return {name: value for name, value in to_plain(dataclasses.asdict(self)).items() if name not in free}


def typed(words, program="python"):
    """A command to type, of words behind `python` or torchrun: with the interpreter that runs, as it was named."""
    python = sys.orig_argv[0]
    if program != "python":
        python = str(Path(python).with_name(program)) if Path(python).name != python else program
    return shlex.join([python, *map(str, words)])


# ---------------------------------------- Checks and errors

def one_of(cfg, **choices):
    """ValueError unless each of these options, as in one_of(cfg, target="pixels norm_pixels"), is one of the words."""
    for name, words in choices.items():
        value = getattr(cfg, name)
        if value not in words.split():
            raise ValueError(f"--{name} is one of {', '.join(words.split())}, not {value!r}")


def in_range(cfg, **ranges):
    """ValueError unless each of these options, as in in_range(cfg, mask_ratio="[0, 1)"), lies in its interval."""
    for name, interval in ranges.items():
        value = getattr(cfg, name)
        low, high = map(float, interval[1:-1].split(","))
        above = value >= low if interval[0] == "[" else value > low
        below = value <= high if interval[-1] == "]" else value < high
        if not (above and below):
            words = {"[0, inf)": "be 0 or more", "[1, inf)": "be 1 or more", "(0, inf)": "be greater than 0"}
            raise ValueError(f"--{name} must {words.get(interval, f'lie in {interval}')}, not {value}")


# More than any machine takes; of what is not listed, 65,536 if it is a size, and a billion if it is no whole number
LARGEST = {"in_chans": 2**10, "workers": 2**10, "decoder_depth": 2**10, "seed": 2**63}
LARGEST |= dict.fromkeys("batch_size micro_batch lr_batch labels probe_labels max_steps log_every".split(), 2**40)
LARGEST_IMAGE = 2**26  # pixels


def require_possible(cfg):
    """ValueError for numbers that could only end in want of memory, or never."""
    for name, value in vars(cfg).items():
        numbers = value if isinstance(value, tuple) else (value,)
        for number in numbers:
            largest = LARGEST.get(name, 2**16 if isinstance(number, int) else 10**9)
            if isinstance(number, (int, float)) and abs(number) > largest:
                raise ValueError(f"--{name} {number} is more than {largest}")
    if math.prod(cfg.img_size) > LARGEST_IMAGE:
        raise ValueError(f"--img_size {cfg.img_size[0]}x{cfg.img_size[1]} is more than {LARGEST_IMAGE} pixels")


def check_channels(cfg):
    """ValueError unless --mean, --std and --value_range fit the channels, as far as they are known, and each other."""
    for name in ("mean", "std"):
        count = len(getattr(cfg, name))
        if cfg.in_chans and count not in (0, 1, cfg.in_chans):
            raise ValueError(f"--{name} takes a number for each of the {cfg.in_chans} channels, or one for all, not "
                             f"{count}")
    if not all(number > 0 for number in cfg.std):
        raise ValueError(f"--std takes numbers greater than 0, not {cfg.std}")
    if cfg.value_range and not (len(cfg.value_range) == 2 and cfg.value_range[0] < cfg.value_range[1]):
        raise ValueError(f"--value_range takes two numbers, black < white, not {cfg.value_range}")


def is_main():
    """Is this the process that prints and writes? Known before a process group is joined."""
    return os.environ.get("RANK", "0") == "0"


def printable(text):
    """A text, such as the name of a file, with escapes for what a terminal would obey or cannot show."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def print_once(line):
    """Print a line, or several, on the main process."""
    if is_main():
        print("\n".join(map(printable, line.split("\n"))), flush=True)


def fail(message, everywhere=False):
    """Exit with code 2 and one line on stderr, for what a user can put right. All processes fail alike and the main one
    prints; `everywhere=True` is for what only one of them can see."""
    if everywhere or is_main():
        line = printable(" ".join(str(message).split()))
        if len(line) > 2000:
            line = line[:2000] + " ..."
        print(f"error: {line}", file=sys.stderr, flush=True)
        show_in_torchrun(f"error: {line}")
    else:
        time.sleep(2)  # torchrun ends all processes as soon as one has failed, before the main one may have printed
    raise SystemExit(2)


def show_in_torchrun(line):
    """Let torchrun, which prints a traceback of its own and then a table of what failed, end that table with a line.
    (torch's format: torch/distributed/elastic/multiprocessing/errors.)"""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        content = {"message": {"message": line, "extraInfo": {"timestamp": str(int(time.time()))}}}
        with contextlib.suppress(OSError):  # it was printed in any case
            Path(path).write_text(json.dumps(content))


@contextlib.contextmanager
def user_errors():
    """Turn ValueErrors and OSErrors, raised about a user's input, into `fail`."""
    try:
        yield
    except (ValueError, OSError) as error:
        fail(error)


# ---------------------------------------- From words to a Config

def parse(config_class, doc, argv=None, presets=None):
    """Defaults, overridden by `--config FILE.yaml`, overridden by flags: an instance of the dataclass `config_class`.
    `presets`, {value of --mode: {option: value}}, are other defaults. Exits with code 2 on an unknown key, a wrong type
    or an unreadable file."""
    words = sys.argv[1:] if argv is None else argv
    if argv is None and not words:
        fail("no options, and the defaults are a paper's recipe: days on many GPUs; the first lines of --help have a "
             "command for a CPU")
    kinds = typing.get_type_hints(config_class)
    found, rest = make_parser(config_class, kinds, doc).parse_known_args(join_values(words))
    if rest and rest[0].startswith("--"):
        name = rest[0][2:].partition("=")[0]
        fail(f"unknown option --{name}{nearest(name, ['config', *kinds])}")
    if rest:
        is_recipe = rest[0].endswith((".yaml", ".yml"))
        fail(f"did not expect {rest[0]!r}: " + (f"a recipe is written --config {rest[0]}" if is_recipe else
                                                "options are written --key value; --help lists them"))

    values, flags = {}, vars(found)
    for path in flags.pop("config", []):
        if path is None:
            fail("--config takes a recipe, as in --config configs/tiny.yaml, and none is given")
        if config_class.own_recipes and (other := of_another_script(path, config_class)):
            fail(f"--config {path}{other}")
        for key, value in read_yaml(path, Path(inspect.getfile(config_class)).stem).items():
            if key not in kinds:
                fail(f"unknown option {path}: {key}{of_another_script(path, config_class) or nearest(key, kinds)}")
            values[key] = parse_value(key, kinds[key], value)
    for key, value in flags.items():
        if value is False and kinds[key] is not bool:  # what argparse puts for a name without a value
            kind, example = KINDS.get(kinds[key], "numbers"), written(key, config_class)
            fail(f"--{key} takes {kind}, as in --{key} {example}, and none is given")
        values[key] = value
    defaults = (presets or {}).get(values.get("mode"), {})
    return config_class(**{**defaults, **values})


KINDS = {int: "a whole number", float: "a number", str: "a value"}


def written(name, config_class):
    """The default of an option as it is written on the command line; VALUE if it is empty."""
    default = getattr(config_class, name)
    if isinstance(default, tuple):
        joint = "x" if typing.get_type_hints(config_class)[name] == Size else ","
        default = joint.join(map(str, default))
    return default if str(default) else "VALUE"


def of_another_script(path, config_class):
    """The end of an error message about a recipe: what it is for, if the command in its comment is of another one."""
    try:
        text = Path(path).read_text(encoding="utf-8") if Path(path).is_file() else ""
    except (OSError, UnicodeDecodeError):  # read_yaml says what is wrong with it
        return ""
    found = re.search(r"^# +(?:python|torchrun) .*?(?:-m )?([\w.]+?)(?:\.py)? --config", text, re.M) or \
        re.search(r"^  command: .*?([\w.]+?)(?:\.py)? --", text, re.M)  # in a run's own config.yaml
    own = Path(inspect.getfile(config_class)).stem
    other = found[1].rpartition(".")[2] if found else own
    if other == own or not is_script(other):
        return ""
    script = f"{found[1]}.py" if "." not in found[1] else f"python -m {found[1]}"
    return f"; this is a recipe of {script}, and here {own}.py is running"


def is_script(name):
    """Is there a script, or a tool, of this name?"""
    return any((ROOT / room / f"{name}.py").exists() for room in (".", "tools"))


def join_values(words):
    """--learning-rate as --learning_rate, and --name -1,1 as --name=-1,1, which argparse would take for two options."""
    joined = []
    for word in words:
        word = re.sub(r"^--[\w-]+", lambda name: "--" + name[0][2:].replace("-", "_"), word)
        if joined and re.match(r"-[\d.]", word) and re.fullmatch(r"--\w+", joined[-1]):
            joined[-1] += "=" + word
        else:
            joined.append(word)
    return joined


def without(words, names):
    """The words of a command without options of these names, however they are written, and without their values."""
    kept, is_dropped = [], False
    for word in join_values(words):
        if word.startswith("-"):
            name = word[2:].partition("=")[0]
            is_dropped = name in names or name.removeprefix("no_") in names
        elif is_dropped:  # this is the value: an option has one at most
            is_dropped = False
            continue
        if not is_dropped:
            kept.append(word)
    return kept


def nearest(key, known):
    """The end of an error message: which option may have been meant."""
    key, known = str(key), sorted(known)
    ending = [name for name in known if key in name.split("_")]  # --lr leads to --base_lr
    close = ending or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"; did you mean --{close[0]}?" if close else "; --help lists all options"


def make_parser(config_class, kinds, doc):
    """An argparse parser of a dataclass; an option that is not given is not in what it returns."""
    formatter = functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=40, width=240)
    parser = argparse.ArgumentParser(description=doc, formatter_class=formatter, argument_default=argparse.SUPPRESS,
                                     usage="%(prog)s [--config FILE.yaml] [--option value ...]", allow_abbrev=False)
    parser.error = fail  # one line, without the usage
    parser.add_argument("--config", action="append", nargs="?", metavar="FILE.yaml",
                        help="recipe that sets any of the options below; flags override it")
    groups = {}
    for name, (heading, comment) in describe(config_class).items():
        if heading not in groups:
            groups[heading] = parser.add_argument_group(heading)
        kind, default = kinds[name], written(name, config_class)
        groups[heading].add_argument(f"--{name}", type=functools.partial(parse_value, name, kind), nargs="?",
                                     const=kind is bool, metavar=str(default), help=comment.replace("%", "%%"))
        if kind is bool:
            groups[heading].add_argument(f"--no_{name}", dest=name, action="store_false", help=argparse.SUPPRESS)
    return parser


def describe(config_class):
    """{field name: (heading, comment)}, read from the source of a dataclass; fields of its bases come behind."""
    comments = {}
    for cls in filter(dataclasses.is_dataclass, config_class.__mro__):
        heading = "Options"
        for line in inspect.getsource(cls).splitlines():
            if found := re.match(r"    # (The method|The recipe|Data|Run|Log)$", line):
                heading = found[1]
            elif found := re.match(r"    (\w+): .*?  # (.*)", line):
                comments.setdefault(found[1], (heading, found[2]))
    return comments


def parse_value(name, kind, value):
    """One option of type `kind` from a YAML value or a command-line word; exits with code 2 if it does not fit."""
    if typing.get_origin(kind) is tuple:
        return parse_tuple(name, kind, value)
    if kind is bool and str(value).lower() in ("true", "false"):
        return str(value).lower() == "true"
    if kind is str and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return str(value)
    wrong = isinstance(value, bool) or (kind is int and isinstance(value, float))
    if kind in (int, float) and not wrong:
        with contextlib.suppress(TypeError, ValueError, OverflowError):  # falls through to the one message below
            if math.isfinite(kind(value)):
                return kind(value)
    if kind is bool:
        fail(f"--{name} is a switch: alone, or with true or false, and not {value!r}")
    fail(f"--{name} takes {kind.__name__} and not {value!r}")


def parse_tuple(name, kind, value):
    """Several numbers in one option, such as 96x160 or 0.2,1; one number stands for all of them."""
    kinds = typing.get_args(kind)
    parts = re.split("[x,]", value) if isinstance(value, str) else value
    if not isinstance(parts, list):
        parts = [parts]
    if kinds[-1] is Ellipsis:  # as many as there are
        parts = [] if value == "" else parts
        kinds = kinds[:1] * len(parts)
    elif len(parts) == 1:
        parts = parts * len(kinds)
    if len(parts) != len(kinds):
        fail(f"--{name} takes {len(kinds)} numbers such as 96x160 or 0.2,1 and not {value!r}")
    return tuple(parse_value(name, part_kind, part) for part_kind, part in zip(kinds, parts, strict=True))


def read_yaml(path, script):
    """A recipe file as {key: value}. A section named like a script, such as `mae:`, counts for that script alone; the
    section `run` of a run's own config.yaml is passed over. Exits with code 2 if the file holds something else."""
    try:
        if not Path(path).is_file():  # reading a pipe or a device may never end
            raise FileNotFoundError("no such file, or no regular one")
        text = Path(path).read_text(encoding="utf-8")
        require_small_yaml(text)
        content = yaml.safe_load(text) or {}
    except Exception as error:  # what is no YAML raises anything: `2001-99-99` a ValueError, `!!bool x` a KeyError
        fail(f"--config {path}: {type(error).__name__} {error}")
    if not isinstance(content, dict):
        fail(f"--config {path} should hold lines of `key: value`")
    values, section = {}, {}
    for key, value in content.items():
        if not isinstance(value, dict):
            values[key] = value
        elif key == script:
            section = value
        elif key != "run" and not is_script(key):
            fail(f"--config {path}: the section {key!r} is not named like a script, such as mae")
    return {**values, **section}


def require_small_yaml(text, largest=10_000, deepest=20):
    """ValueError if a text is longer than any recipe, nested deeper, or, with every *alias counted as what it stands
    for, of more values: ten lines may stand for more than a memory holds."""
    if len(text) > 10 * largest:
        raise ValueError(f"{len(text)} characters are no recipe")
    sizes, sums, names = {}, [0], []  # {anchor: values}; of the collections that are open: values so far, anchors
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            sums.append(1)
            names.append(event.anchor)
        elif isinstance(event, yaml.CollectionEndEvent):
            size = sums.pop()
            sizes[names.pop()] = size
            sums[-1] += size
        elif isinstance(event, yaml.AliasEvent):
            sums[-1] += sizes.get(event.anchor, largest)  # unknown: it stands for what it is a part of
        elif isinstance(event, yaml.ScalarEvent):
            sizes[event.anchor] = 1
            sums[-1] += 1
        if len(sums) > deepest or sums[-1] > largest:
            raise ValueError("its values are too many, or nested too deep, for a recipe")


def to_plain(value):
    """Tuples as lists, so that YAML, JSON and checkpoints hold plain data only."""
    return json.loads(json.dumps(value))


def git_commit():
    """The git commit of this code, with -dirty if it was edited; "unknown" outside a git checkout."""
    try:
        return subprocess.check_output(["git", "-C", str(ROOT), "describe", "--always", "--dirty"], text=True,
                                       stderr=subprocess.DEVNULL).strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
