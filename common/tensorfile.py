"""The file format of the safetensors library, with torch alone: the length of the header in 8 bytes, the header as JSON
({name: dtype, shape, place}, and metadata), then the tensors' bytes; little-endian. It can execute nothing, and has no
checksums: a flipped bit goes unseen, a wrong length does not.
"""

import json
import math
import os
from pathlib import Path

import torch

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
          "BOOL": torch.bool}


def save(content, file):
    """Write content, ({name: tensor}, metadata {str: str}), to an open file."""
    tensors, about = content
    codes = {dtype: code for code, dtype in DTYPES.items()}
    header, end = {"__metadata__": about}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": codes[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors.values():
        file.write(tensor.flatten().view(torch.uint8).numpy())


def read(path):
    """({name: tensor}, metadata) of a file. ValueError (one line) unless the tensors of which its header tells fill it
    without gap or overlap; FileNotFoundError if it is not there."""
    require_room(path)
    tensors = {}
    with open(path, "rb") as file:
        try:
            places, about = read_header(file)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} is not a whole checkpoint: {type(error).__name__} {str(error)[:80]}") from error
        for name, shape, dtype in places:
            tensors[name] = torch.empty(shape, dtype=dtype)
            file.readinto(tensors[name].flatten().view(torch.uint8).numpy())
    return tensors, about


def require_room(path):
    """FileNotFoundError if there is no such file; ValueError if it is larger than this machine's memory, as a file of a
    few blocks may say it is."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if os.path.getsize(path) > memory:
        raise ValueError(f"{path} has {os.path.getsize(path) / 1e9:.0f} GB, more than this machine's memory")


def read_header(file):
    """([(name, shape, dtype)] in the order of the data, to whose start the file is moved; metadata). ValueError, or an
    error of its kind for nonsense, unless the data are as long as their places, which follow each other."""
    size, length = os.fstat(file.fileno()).st_size, int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, 100_000_000):  # the limit of the library
        raise ValueError(f"a header of {length} bytes in a file of {size}")
    header, end, places = json.loads(file.read(length), object_pairs_hook=unique), 0, []
    about = header.pop("__metadata__", {})
    if not isinstance(about, dict):
        raise ValueError("metadata")
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        shape, dtype, (begin, stop) = entry["shape"], DTYPES[entry["dtype"]], entry["data_offsets"]
        if not all(type(n) is int and 0 <= n < 2**48 for n in (begin, stop, *shape)) or len(shape) > 8 \
                or math.prod(max(1, n) for n in shape) > 2**48:
            raise ValueError(f"shape or place of {name}")
        if begin != end or stop - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"place of {name}")
        places.append((name, shape, dtype))
        end = stop
    if end != size - 8 - length:
        raise ValueError(f"{size - 8 - length} bytes for tensors of {end}")
    return places, about


def unique(pairs):
    """A JSON object as a dict; ValueError if a name comes twice."""
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a name comes twice")
    return dict(pairs)


def damage(path):
    """What is wrong with a file, in one line, or None."""
    try:
        read(path)
    except ValueError as error:
        return str(error)
