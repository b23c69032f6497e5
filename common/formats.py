"""Files of weights, of our own and of other code: .pt, .pth, .bin, .safetensors, and the .index.json of several parts.
Opened without executing anything of them, and what is no such file is called what it is."""

import argparse
import collections
import contextlib
import json
import os
import pickle
import re
import zipfile
from pathlib import Path, PurePosixPath

import numpy as np
import torch

from common import checkpoint, folder, layouts


def option_classes():
    """What other people's files hold beside weights, and checkpoint.read may open: their options, which become
    containers that do nothing; numbers and arrays of numpy; paths."""
    kinds = {type(np.dtype(letter)) for letter in np.typecodes["All"] if letter not in "OV"}
    scalar, array = np.float64(0).__reduce__()[0], np.array(0).__reduce__()[0]  # what a pickle of one calls
    classes = [argparse.Namespace, (collections.OrderedDict, "yacs.config.CfgNode"), np.dtype, np.ndarray, *kinds]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):  # before and since version 2
        classes += [(scalar, f"{module}.scalar"), (array, f"{module}._reconstruct")]
    for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"):
        classes += [(PurePosixPath, f"pathlib.{name}"), (PurePosixPath, f"pathlib._local.{name}")]
    return classes


def read_any(path):
    """(content, notes) of a file of weights, or of all parts that an index.json names."""
    path = Path(path)
    if path.name.endswith(".index.json"):
        return read_parts(path)
    if re.search(r"-\d+-of-\d+\.", path.name):
        raise ValueError(f"{path} is one part of an encoder: --init takes the .index.json beside it, which names all")
    if path.suffix == ".safetensors":
        return unpack(*read_safetensors(path)), []
    return read_pickled(path)


def read_parts(path):
    """(tensors of all parts together, notes), for the index.json that Hugging Face's code writes. ValueError if a part
    lies elsewhere, is not there, or has not what the index says."""
    try:
        places = json.loads(folder.read_text(path))["weight_map"]
        parts = {name: path.with_name(name) for name in sorted(set(places.values()))}
        is_here = all(name == Path(name).name for name in parts)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        is_here = False
    if not is_here:
        raise ValueError(f"{path} is not an index of weights in the same folder")
    tensors, notes = {}, []
    for name, part in parts.items():
        content, said = (read_safetensors(part)[0], []) if part.suffix == ".safetensors" else read_pickled(part)
        if not layouts.is_state_dict(content) or any(places.get(key) != name for key in content):
            raise ValueError(f"{part} does not hold what {path} says")
        tensors |= content
        notes += [line for line in said if line not in notes]
    if lacking := sorted(places.keys() - tensors.keys())[:3]:
        raise ValueError(f"{path} names {', '.join(lacking)}, which no part holds")
    return tensors, notes


# First bytes of files that are taken for weights, and what they are.
OTHER_FILES = {
    b"\x89HDF": "HDF5, as Keras writes it",
    b"version https://git-lfs": "a pointer of git-lfs: git lfs pull fetches the file",
    b"<": "a web page",
    b"{": "JSON",
    b"\x1f\x8b": "compressed by gzip",
    b"\x93NUMPY": "an array of numpy",
    b"\x08": "ONNX",
}


def what_else(path):
    """What a file is, in words, if it is something else than weights saved by torch; else None."""
    with open(path, "rb") as file:
        start = file.read(64)
    if found := [words for first, words in OTHER_FILES.items() if start.startswith(first)]:
        return found[0]
    if not start:
        return "empty"
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < os.path.getsize(path):
        return "a safetensors file: rename it to .safetensors"
    if not zipfile.is_zipfile(path):
        return None
    with contextlib.suppress(Exception), zipfile.ZipFile(path) as archive:  # a damaged one is named later
        names = archive.namelist()
        if any("/code/" in name or name.startswith("code/") for name in names):
            return "a TorchScript program: save the state_dict() of what torch.jit.load makes of it"
        if not any(name.endswith("data.pkl") for name in names):
            return f"an archive of {', '.join(names[:3])}"
    return None


def read_pickled(path):
    """(content, notes) of a file of torch.save, be it other people's: it may hold their options, and be of the format
    before 1.6, pickles in a row, of which the first is a magic number. Errors as of checkpoint.read."""
    checkpoint.require_room(path)
    if what := what_else(path):
        raise ValueError(f"{path} is no file of weights that torch saved, but {what}")
    start = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)
    with open(path, "rb") as file:
        is_old = file.read(len(start)) == start
    content = checkpoint.read(path, option_classes(), has_checksums=not is_old)
    return content, ["a file this old has no checksums"] * is_old


def read_safetensors(path):
    """({name: tensor}, metadata {str: str}) of a file; it has no checksums. ValueError (one line) if it is damaged, or
    without the library."""
    checkpoint.require_room(path)
    safetensors = safetensors_library()
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except Exception as error:  # of the library, and of what Python thinks of a shape
        raise ValueError(f"{path} is not a whole checkpoint: {' '.join(str(error).split())[:200]}") from error


def safetensors_library():
    try:
        import safetensors.torch
    except ImportError as error:
        raise ValueError("a .safetensors file needs the safetensors library: pip install safetensors") from error
    return safetensors


def unpack(tensors, metadata):
    """The encoder.pt that tools/convert.py packed into a safetensors file; of somebody else's the tensors alone."""
    try:
        saved = json.loads(metadata["encoder"])
        head = {name: tensors[name] for name in tensors if name.startswith(("head.", "fc_norm."))}
        saved["model"] = {name: tensor for name, tensor in tensors.items() if name not in head}
        if "classifier" in saved:
            saved["classifier"]["tensors"] = head
        return saved
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return tensors
