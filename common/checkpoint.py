"""Checkpoints: written so that a crash, a full disk or a flipped bit costs no more than the last interval, and read so
that a hostile or damaged file is refused before anything of it is used.

A checkpoint holds tensors and plain data only. `last.pt`, of which a stopped run goes on, is {"model": all of it,
"optimizer", "scaler", "step", "config"}; `encoder.pt` is what travels: see weights.py.
"""

import argparse
import collections
import contextlib
import os
import pickle
import zipfile
from pathlib import Path

import torch

from common import tensorfile

# What other people's checkpoints hold beside tensors and plain data: their options, here as inert containers.
OPTIONS = [argparse.Namespace, (collections.OrderedDict, "yacs.config.CfgNode")]


def write(path, content):
    """Write `content` to `path` through a temporary file that is flushed, synced and read back first. In a path that
    ends in .safetensors, content is (tensors, {str: str}), else what torch.save takes.

    What `path` held before stays beside it as `previous.<name>`. OSError if the disk is full or not writable: `path`
    and its predecessor are then as they were.
    """
    write_together({path: content})


def write_together(contents):
    """`write` of files of one folder, {path: content}: none takes its place before all of them lie there whole, and the
    first one is the last to do so. A run goes on from that one, so a kill in between is made good by --resume."""
    paths = [Path(path) for path in contents]
    temporaries = [path.with_name(path.name + ".tmp") for path in paths]
    try:
        for path, temporary, content in zip(paths, temporaries, contents.values(), strict=True):
            write_temporary(path, temporary, content)
    except OSError:
        for temporary in temporaries:
            with contextlib.suppress(OSError):
                temporary.unlink()
        raise
    whole = [path.exists() and not how(path)[1](path) for path in paths]
    for path, temporary, keep in reversed(list(zip(paths, temporaries, whole, strict=True))):
        if keep:  # a damaged file must not take the place of its whole predecessor
            os.replace(path, path.with_name("previous." + path.name))
        os.replace(temporary, path)
    directory = os.open(paths[0].parent, os.O_RDONLY)  # the renames are durable only once the directory is, too
    os.fsync(directory)
    os.close(directory)


def how(path):
    """(what writes a file of this name, what says what is wrong with one)."""
    return (tensorfile.save, tensorfile.damage) if path.suffix == ".safetensors" else (torch.save, damage)


def write_temporary(path, temporary, content):
    """Write, sync and read back what is to become `path`. OSError, in one line, if that fails."""
    save, wrong_with = how(path)
    try:
        with open(temporary, "wb") as file:
            save(content, file)
            file.flush()
            os.fsync(file.fileno())
        if wrong := wrong_with(temporary):
            raise OSError(f"it does not read back as it was written: {wrong}")
    except (OSError, RuntimeError) as error:  # RuntimeError: torch's zip writer on a full disk
        raise OSError(f"cannot write {path} ({error}); what was saved before is intact") from error


def read(path, foreign=False):
    """The content of a checkpoint, on the CPU. ValueError (one line) if it is damaged, cut short, or holds anything but
    tensors and plain data: nothing in it is executed. FileNotFoundError if it is not there.

    `foreign`: as other people write them. Then options may lie in it as an argparse.Namespace or a CfgNode, and it may
    be of torch.save's format before 1.6, which has no checksums.
    """
    tensorfile.require_room(path)
    if not (foreign and is_old(path)) and (wrong := damage(path)):
        raise ValueError(f"{path} is not a whole checkpoint: {wrong}")
    try:
        with torch.serialization.safe_globals(OPTIONS if foreign else []):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} holds more than tensors and plain data, and is not opened") from error
    except Exception as error:  # rubbish behind right checksums raises whatever it likes
        raise ValueError(f"{path} is not a checkpoint: {type(error).__name__}") from error


def is_old(path):
    """Is it of torch.save's format before 1.6: pickles in a row, of which the first is a magic number?"""
    start = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)
    with open(path, "rb") as file:
        return file.read(len(start)) == start


def damage(path):
    """What is wrong with a file as torch.save's archive, in one line, or None. torch.save writes CRC-32 sums, but
    torch.load does not look at them, and reads entries whose flags or compression were changed as something else."""
    try:
        with zipfile.ZipFile(path) as archive:
            odd = [i.filename for i in archive.infolist()
                   if i.flag_bits & ~0x808 or i.compress_type or i.external_attr & 0x10]  # 0x10: "is a folder"
            wrong = odd[0] if odd else archive.testzip()
    except Exception as error:  # zipfile raises a dozen kinds of errors on a damaged directory
        return f"{type(error).__name__} {' '.join(str(error).split())}"
    return f"{wrong} is damaged" if wrong else None


def either(path):
    """Is there such a file, or, after a kill between two renames, its predecessor alone?"""
    return path.exists() or path.with_name("previous." + path.name).exists()


def read_newest(path):
    """`read(path)`, or, with a line that says so, its predecessor if `path` is damaged or gone; None without either."""
    path = Path(path)
    previous = path.with_name("previous." + path.name)
    if not either(path):
        return None
    try:
        return read(path)
    except (ValueError, FileNotFoundError) as error:
        if not previous.exists():
            raise
        print(f"{error}; going on from {previous}", flush=True)
        return read(previous)


def require_run(saved, where):
    """ValueError unless `saved` has the parts that a last.pt has."""
    kinds = {"model": dict, "optimizer": dict, "scaler": dict, "config": dict, "step": int}
    whole = isinstance(saved, dict) and all(isinstance(saved.get(name), kind) for name, kind in kinds.items())
    if not whole or saved["step"] < 0:
        raise ValueError(f"{where} is not a last.pt of this project")


def load_exactly(model, tensors, where):
    """Copy `tensors` (a state dict) into `model`. ValueError before anything is copied if a name, shape or dtype
    differs, or if a value is not finite."""
    require_state(model.state_dict(), tensors, where)
    model.load_state_dict(tensors)


def require_state(own, tensors, where):
    """ValueError unless `tensors` has the names of `own`, and a finite tensor of the same shape and dtype for each."""
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or extra:
        raise ValueError(f"{where} is of another architecture: it lacks {missing[:3]} and has unknown {extra[:3]}")
    for name, tensor in own.items():
        require_like(tensor, tensors[name], f"{where}, {name}")


def load_optimizer(optimizer, state, where):
    """Copy an optimizer's state dict back. ValueError before anything is copied if groups, shapes or dtypes differ."""
    try:
        check_optimizer(optimizer, state, where)
    except (AttributeError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{where}: the optimizer's state is none: {error!r}") from error
    optimizer.load_state_dict(state)


def check_optimizer(optimizer, state, where):
    """ValueError, or an error of its kind for nonsense, unless `state` fits the optimizer."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    groups = [group["names"] for group in optimizer.param_groups]
    saved = [group.get("names") for group in state["param_groups"]]
    if groups != saved or not set(state["state"]) <= set(range(len(params))):
        raise ValueError(f"{where}: the optimizer was saved with other parameter groups")
    for index, moments in state["state"].items():
        for name, value in moments.items():
            expected = torch.zeros(()) if name == "step" else params[index]
            require_like(expected, value, f"{where}, {name} of optimizer parameter {index}")


def ordinary(value):
    """Is it a dense tensor in memory that is as large as it says? A file may hold a view of one number that claims to
    be a terabyte."""
    return isinstance(value, torch.Tensor) and value.layout == torch.strided and value.device.type == "cpu" \
        and not value.is_quantized and value.numel() * value.itemsize <= value.untyped_storage().nbytes()


def all_ordinary(tensors):
    """Is it {name: ordinary tensor}, and not empty?"""
    named = isinstance(tensors, dict) and len(tensors) > 0
    return named and all(isinstance(name, str) and ordinary(tensor) for name, tensor in tensors.items())


def require_like(expected, found, where):
    """ValueError unless `found` is a finite tensor of the shape and dtype of `expected`."""
    if not isinstance(found, torch.Tensor) or (found.shape, found.dtype) != (expected.shape, expected.dtype):
        kind = f"{tuple(found.shape)} {found.dtype}" if isinstance(found, torch.Tensor) else type(found).__name__
        raise ValueError(f"{where} should be {tuple(expected.shape)} {expected.dtype}, not {kind}")
    if not torch.isfinite(found).all():
        raise ValueError(f"{where} holds values that are not finite")
