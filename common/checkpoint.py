"""Checkpoints: written so that a crash, a full disk or a flipped bit costs no more than the last interval, and read so
that a hostile or damaged file is refused before anything of it is used.

They hold tensors and plain data only. `last.pt`, from which a stopped run goes on, is {"model": all of it, "optimizer",
"scaler", "step", "config", "images", "steps_per_epoch", "logged_step", "sums"}. `encoder.pt` travels: see weights.py.
"""

import argparse
import contextlib
import errno
import math
import os
import pickle
import re
import zipfile
from pathlib import Path

import torch

from common import config, folder


class OtherRun(ValueError):
    """A last.pt that is whole, and belongs to a run of other options or images. Its predecessor does, too."""


def write(path, content):
    """Save `content` at `path`; what was there stays beside it as previous.NAME. OSError if the disk is full or not
    writable: `path` and its predecessor are then as they were."""
    write_together({path: content})


def write_together(contents):
    """`write` files of one folder, {path: content}: none takes its place before all are written. The first one is last
    to do so: a run resumes from it, and writes the others again."""
    parts = [(Path(path), folder.temporary(Path(path)), content) for path, content in contents.items()]
    try:
        for path, temporary, content in parts:
            write_temporary(path, temporary, content)
    except OSError:
        for _, temporary, _ in parts:
            with contextlib.suppress(OSError):
                temporary.unlink()
        raise

    for path, temporary, _ in reversed(parts):
        if path.exists() and damage(path) is None:  # a damaged file must not take its predecessor's place
            os.replace(path, previous(path))
        os.replace(temporary, path)
    sync_folder(parts[0][0].parent)


def sync_folder(folder):
    """Make renames in a folder outlast a power cut, where the system can: Windows opens no folders, and some disks,
    such as those of other machines, know no sync of one."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.ENOSYS, errno.EACCES, errno.EPERM):
            raise
    finally:
        os.close(descriptor)


def write_temporary(path, temporary, content):
    """Write, sync and read back the file that will become `path`. OSError if one of these fails."""
    try:
        temporary.unlink(missing_ok=True)  # of a process that had the same number and was killed
        with open(temporary, "xb") as file:  # a new file: never through a link
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        if wrong := damage(temporary):
            raise OSError(f"it does not read back as it was written: {wrong}")
    except (OSError, RuntimeError) as error:  # RuntimeError: torch's zip writer on a full disk
        raise OSError(f"cannot write {path} ({error}); what was saved before is intact") from error


def previous(path):
    return path.with_name("previous." + path.name)


# ---------------------------------------- Reading

def read(path, classes=(), has_checksums=True):
    """The content of a checkpoint, on the CPU; nothing in it is executed. ValueError (one line) if it is damaged, or
    holds more than tensors, plain data and objects of `classes`; FileNotFoundError if it is not there."""
    require_room(path)
    if has_checksums and (wrong := damage(path)):
        raise ValueError(f"{path} is not a whole checkpoint: {wrong}")
    try:
        with torch.serialization.safe_globals(list(classes)):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        kind = f" (a {found[1]})" if found else ""
        raise ValueError(f"{path} holds more than tensors and plain data{kind}, and is not opened") from error
    except Exception as error:  # rubbish behind right checksums raises anything
        raise ValueError(f"{path} is not a checkpoint: {type(error).__name__}") from error
    require_small(content, path)
    return content


def require_small(content, path, largest=10**6, deepest=100):
    """ValueError if plain data has more than so many values, each counted as often as it would be printed, or is nested
    deeper: a few hundred bytes may hold a list that doubles itself forty times."""
    waiting, size = [(content, 0)], 0
    while waiting:
        value, depth = waiting.pop()
        if isinstance(value, dict):
            inside = [*value.keys(), *value.values()]
        elif isinstance(value, (list, tuple, set, frozenset)):
            inside = list(value)
        elif isinstance(value, argparse.Namespace):  # other people's options, see weights.py
            inside = [vars(value)]
        else:
            inside = []
        if isinstance(value, (str, bytes)):
            size += len(value) // 10
        elif isinstance(value, int):
            size += value.bit_length() // 10
        size += len(inside)
        if size > largest or depth > deepest:
            raise ValueError(f"{path} is not a checkpoint: its plain data is too large, or nested too deep")
        waiting += [(part, depth + 1) for part in inside]


def read_newest(path, use=lambda content, path: None):
    """The content of `path`, after `use(content, path)`. If that is damaged or gone, or if `use` raises a ValueError
    other than OtherRun, its predecessor's, with a line that says so. None if there is neither."""
    path = Path(path)
    if not exists(path):
        return None
    try:
        return read_and_use(path, use)
    except OtherRun:
        raise
    except (ValueError, FileNotFoundError) as error:
        if not previous(path).exists():
            raise
        wrong = error
    try:
        content = read_and_use(previous(path), use)
    except OtherRun:
        raise
    except ValueError as error:
        raise ValueError(f"{wrong}; and {error}") from error
    config.print_once(f"{wrong}; going on from {previous(path)}")
    return content


def read_and_use(path, use):
    content = read(path)
    use(content, path)
    return content


def exists(path):
    """Is there such a file or, after a kill between two renames, its predecessor alone?"""
    return path.exists() or previous(path).exists()


def require_room(path):
    """FileNotFoundError if there is no such file; ValueError if it is, or claims to be, larger than this machine's
    memory."""
    if Path(path).is_dir():
        inside = [str(Path(path) / name) for name in ("encoder.pt", "last.pt") if (Path(path) / name).is_file()]
        meant = f"; {' or '.join(inside)} may be meant" if inside else ", and no checkpoint"
        raise FileNotFoundError(f"{path} is a folder{meant}")
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:  # Windows has none
        memory, size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), os.path.getsize(path)
        if size > memory:
            raise ValueError(f"{path} has {size / 1e9:.0f} GB, more than this machine's memory")


def damage(path):
    """What is wrong with a file of torch.save, in one line, or None. It holds CRC-32 sums, but torch.load does not look
    at them, and misreads entries whose flags were changed."""
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                is_folder = entry.external_attr & 0x10
                if entry.flag_bits & ~0x808 or entry.compress_type or is_folder:
                    return f"{entry.filename} is damaged"
            name = archive.testzip()
    except Exception as error:  # zipfile raises a dozen kinds of errors on a damaged directory
        return f"{type(error).__name__} {' '.join(str(error).split())}"
    return f"{name} is damaged" if name else None


# ---------------------------------------- Checked before anything is copied

RUN = {"model": dict, "optimizer": dict, "scaler": dict, "config": dict, "step": int}  # parts of every last.pt


def is_run(saved):
    """Is it the content of a last.pt, by the names of its parts?"""
    return isinstance(saved, dict) and RUN.keys() <= saved.keys()


def has_encoder(saved):
    """Is it the content of an encoder.pt, by the names of its parts? Other code may have the same names."""
    return isinstance(saved, dict) and {"arch", "model"} <= saved.keys()


def require_run(saved, path):
    """ValueError unless `saved`, the content of `path`, has the parts of a last.pt. Those that files of earlier
    versions lack are not checked where they are missing."""
    later = {"images": dict, "steps_per_epoch": int, "logged_step": int, "sums": dict}

    def is_kind(value, kind):
        return isinstance(value, kind) and not isinstance(value, bool)

    if not is_run(saved) or not all(is_kind(saved[name], kind) for name, kind in RUN.items()) \
            or not all(is_kind(saved[name], kind) for name, kind in later.items() if name in saved) \
            or not 0 <= saved.get("logged_step", 0) <= saved["step"] \
            or not all(is_kind(total, float) and math.isfinite(total) for total in saved.get("sums", {}).values()):
        beside = f"; the last.pt beside it is: {Path(path).with_name('last.pt')}" if has_encoder(saved) else ""
        raise ValueError(f"{path} is not a last.pt of this project{beside}")


def first_not_finite(content, name=""):
    """The name, such as model/head.weight, of a tensor in a nest of dicts that holds a NaN or an infinity; or None."""
    if isinstance(content, torch.Tensor):
        return None if torch.isfinite(content).all() else name
    for key, value in content.items() if isinstance(content, dict) else ():
        if found := first_not_finite(value, f"{name}/{key}" if name else str(key)):
            return found
    return None


def load_exactly(model, tensors, path):
    """Copy `tensors`, a state dict, into `model`. ValueError before anything is copied if a name, shape or dtype
    differs, or if a value is not finite."""
    require_state(model.state_dict(), tensors, path)
    model.load_state_dict(tensors, strict=False)  # a frozen teacher is in no state dict, and stays


def require_state(own, tensors, path):
    """ValueError unless `tensors` has the names of `own`, and for each a finite tensor like it."""
    if own.keys() != tensors.keys():
        missing, unknown = own.keys() - tensors.keys(), map(str, tensors.keys() - own.keys())
        raise ValueError(f"{path} is of another architecture: it lacks {sorted(missing)[:3]} and has unknown "
                         f"{sorted(unknown)[:3]}")
    for name, tensor in own.items():
        require_like(tensor, tensors[name], f"{path}, {name}")


def require_like(expected, found, name):
    """ValueError unless `found` is a finite, dense tensor in memory of the shape and dtype of `expected`."""
    wanted = f"{tuple(expected.shape)} {expected.dtype}"
    kind = type(found).__name__
    if isinstance(found, torch.Tensor):
        kind = f"{tuple(found.shape)} {found.dtype}"
        if found.layout != torch.strided or found.device.type != "cpu":
            kind += f" {found.layout} on {found.device}"
    if kind != wanted:
        raise ValueError(f"{name} should be {wanted}, not {kind}")
    if not torch.isfinite(found).all():
        raise ValueError(f"{name} holds values that are not finite")


# What an optimizer keeps of a parameter once it has made a step
MOMENTS = {"AdamW": {"step", "exp_avg", "exp_avg_sq"}, "SGD": {"momentum_buffer"}, "LARS": {"momentum_buffer"}}
# Options of a group that a step sets anew, or that choose its implementation and not what it computes
FREE_OPTIONS = {"lr", "fused", "foreach", "capturable", "differentiable"}


def load_optimizer(optimizer, saved, path, steps=0):
    """Copy an optimizer's state back. ValueError before anything is copied if it does not fit, or cannot be what so
    many steps leave behind (0 if that is not known)."""
    own = optimizer.state_dict()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    try:
        require_groups(own["param_groups"], saved["param_groups"], path)
        state = saved["state"]
        all_indices = set(range(len(parameters)))
        if not set(state) <= all_indices or (steps and set(state) != all_indices):
            raise ValueError(f"{path}: the optimizer's state is not that of these {len(parameters)} parameters")
        for index, moments in state.items():
            if moments.keys() != MOMENTS[type(optimizer).__name__]:
                raise ValueError(f"{path}: the optimizer's state is that of another kind of optimizer")
            for name, value in moments.items():
                what = f"{path}, {name} of optimizer parameter {index}"
                require_like(torch.zeros(()) if name == "step" else parameters[index], value, what)
                is_step_of_run = name != "step" or not steps or 0 < value <= steps
                if not is_step_of_run or (name == "exp_avg_sq" and (value < 0).any()):
                    raise ValueError(f"{what} is out of range")
    except (AttributeError, KeyError, IndexError, TypeError) as error:  # of nonsense
        raise ValueError(f"{path}: the optimizer's state is none: {error!r}") from error

    # The values alone, each in memory of its own; options are those of this run.
    state = {index: {name: value.clone() for name, value in moments.items()} for index, moments in state.items()}
    optimizer.load_state_dict({"state": state, "param_groups": own["param_groups"]})


def require_groups(own, groups, path):
    """ValueError unless saved groups of an optimizer hold the parameters and options of its `own`; an option that the
    version of torch that saved them did not have is not checked."""
    if len(groups) != len(own):
        raise ValueError(f"{path}: the optimizer was saved with other parameter groups")
    for ours, theirs in zip(own, groups, strict=True):
        if theirs["names"] != ours["names"] or theirs["params"] != ours["params"]:
            raise ValueError(f"{path}: the optimizer was saved with other parameter groups")
        for name in ours.keys() & theirs.keys() - FREE_OPTIONS:
            if repr(theirs[name]) != repr(ours[name]):  # True is not 1
                raise ValueError(f"{path}: the optimizer was saved with {name} {theirs[name]!r}, not {ours[name]!r}")


def load_scaler(scaler, saved, path):
    """Copy the state of fp16's loss scaling back; nothing if either ran in another precision, as `auto` may on another
    device. ValueError before anything is copied if it does not fit."""
    own = scaler.state_dict()
    if not own or not saved:
        return
    are_numbers = all(type(value) in (int, float) and 0 <= value < math.inf for value in saved.values())
    if saved.keys() != own.keys() or not are_numbers:
        raise ValueError(f"{path}: the state of the loss scaling is none")
    scaler.load_state_dict(saved)
