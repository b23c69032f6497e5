"""Checkpoints: written so that a crash, a full disk or a flipped bit costs no more than the last interval, and read so
that a hostile or damaged file is refused before anything of it is used.

They hold tensors and plain data only. `last.pt`, from which a stopped run goes on, is {"model": all of it, "optimizer",
"scaler", "step", "config"}. `encoder.pt` travels: see weights.py.
"""

import contextlib
import os
import pickle
import zipfile
from pathlib import Path

import torch


def write(path, content):
    """Save `content` at `path`; what was there stays beside it as previous.NAME. OSError if the disk is full or not
    writable: `path` and its predecessor are then as they were."""
    write_together({path: content})


def write_together(contents):
    """`write` files of one folder, {path: content}: none takes its place before all are written. The first one is last
    to do so: a run resumes from it, and writes the others again."""
    parts = [(Path(path), Path(f"{path}.tmp"), content) for path, content in contents.items()]
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
    with contextlib.suppress(PermissionError):  # Windows opens no folders
        folder = os.open(parts[0][0].parent, os.O_RDONLY)
        os.fsync(folder)  # makes the renames outlast a power cut
        os.close(folder)


def write_temporary(path, temporary, content):
    """Write, sync and read back the file that will become `path`. OSError if one of these fails."""
    try:
        with open(temporary, "wb") as file:
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
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} holds more than tensors and plain data, and is not opened") from error
    except Exception as error:  # rubbish behind right checksums raises anything
        raise ValueError(f"{path} is not a checkpoint: {type(error).__name__}") from error


def read_newest(path):
    """`read(path)`; if that is damaged or gone, its predecessor, with a line that says so; or None."""
    path = Path(path)
    if not exists(path):
        return None
    try:
        return read(path)
    except (ValueError, FileNotFoundError) as error:
        if not previous(path).exists():
            raise
        print(f"{error}; going on from {previous(path)}", flush=True)
        return read(previous(path))


def exists(path):
    """Is there such a file or, after a kill between two renames, its predecessor alone?"""
    return path.exists() or previous(path).exists()


def require_room(path):
    """FileNotFoundError if there is no such file; ValueError if it is, or claims to be, larger than this machine's
    memory."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    if hasattr(os, "sysconf"):  # Windows has none
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

def require_run(saved, path):
    """ValueError unless `saved`, the content of `path`, has the parts of a last.pt."""
    kinds = {"model": dict, "optimizer": dict, "scaler": dict, "config": dict, "step": int}
    if not isinstance(saved, dict) or not all(isinstance(saved.get(k), kinds[k]) for k in kinds) or saved["step"] < 0:
        raise ValueError(f"{path} is not a last.pt of this project")


def load_exactly(model, tensors, path):
    """Copy `tensors`, a state dict, into `model`. ValueError before anything is copied if a name, shape or dtype
    differs, or if a value is not finite."""
    require_state(model.state_dict(), tensors, path)
    model.load_state_dict(tensors, strict=False)  # a frozen teacher is in no state dict, and stays


def require_state(own, tensors, path):
    """ValueError unless `tensors` has the names of `own`, and for each a finite tensor like it."""
    if own.keys() != tensors.keys():
        missing, unknown = sorted(own.keys() - tensors.keys())[:3], sorted(tensors.keys() - own.keys())[:3]
        raise ValueError(f"{path} is of another architecture: it lacks {missing} and has unknown {unknown}")
    for name, tensor in own.items():
        require_like(tensor, tensors[name], f"{path}, {name}")


def require_like(expected, found, name):
    """ValueError unless `found` is a finite tensor of the shape and dtype of `expected`."""
    wanted = f"{tuple(expected.shape)} {expected.dtype}"
    kind = f"{tuple(found.shape)} {found.dtype}" if isinstance(found, torch.Tensor) else type(found).__name__
    if kind != wanted:
        raise ValueError(f"{name} should be {wanted}, not {kind}")
    if not torch.isfinite(found).all():
        raise ValueError(f"{name} holds values that are not finite")


def load_optimizer(optimizer, state, path):
    """Copy an optimizer's state back. ValueError before anything is copied if it does not fit."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    names = [group["names"] for group in optimizer.param_groups]
    try:
        saved_names = [group.get("names") for group in state["param_groups"]]
        if saved_names != names or not set(state["state"]) <= set(range(len(parameters))):
            raise ValueError(f"{path}: the optimizer was saved with other parameter groups")
        for index, moments in state["state"].items():
            for name, value in moments.items():
                expected = torch.zeros(()) if name == "step" else parameters[index]
                require_like(expected, value, f"{path}, {name} of optimizer parameter {index}")
    except (AttributeError, KeyError, IndexError, TypeError) as error:  # of nonsense
        raise ValueError(f"{path}: the optimizer's state is none: {error!r}") from error
    optimizer.load_state_dict(state)
