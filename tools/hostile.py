"""Files that are made to harm who reads them, for tools/torture.py: pipes, links, bombs, code, flipped bits.

KINDS holds for each kind of file {name: make}. `make(path, mark, draw)` puts the file in the place of a good one, and
may return another path for it. What is executed in it would make the folder `mark`; `draw` is a random.Random.
"""

import io
import os
import pickle
import zipfile
import zlib

import numpy as np
import torch

PNG = b"\x89PNG\r\n\x1a\n"


class Code:
    """Pickled, it is a call that makes a folder."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def nested(value, times, wrap):
    for _ in range(times):
        value = wrap(value)
    return value


# ---------------------------------------- In the place of any file

def put(make):
    """A maker that first takes the good file away; `make` gives bytes, or makes what is at the path itself."""
    def put_there(path, mark, draw):
        path.unlink()
        content = make(path, mark, draw)
        if content is not None:
            path.write_bytes(content)
    return put_there


def cut(path, mark, draw):
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * draw.uniform(0.05, 0.95))])


def flip(path, mark, draw):
    whole = bytearray(path.read_bytes())
    whole[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
    path.write_bytes(whole)


ANY = {
    "pipe": put(lambda path, *_: os.mkfifo(path)),
    "link to a device": put(lambda path, *_: path.symlink_to("/dev/zero")),
    "link to itself": put(lambda path, *_: path.symlink_to(path)),
    "folder": put(lambda path, *_: path.mkdir()),
    "noise": put(lambda path, mark, draw: draw.randbytes(100_000)),
    "zeros": put(lambda *_: bytes(100_000))}


# ---------------------------------------- last.pt and encoder.pt

def saved(change, **options):
    """A maker of a torch.save file: `change(content, mark)` of the good one."""
    def save(path, mark, draw):
        content = change(torch.load(path), mark)
        path.unlink()
        torch.save(content, path, **options)
    return save


def with_first_tensor(content, change):
    name = next(iter(content["model"]))
    return {**content, "model": {**content["model"], name: change(content["model"][name])}}


def deflated(path, mark, draw):
    """The archive packed: a thousandth of what it unpacks to."""
    with zipfile.ZipFile(path) as old:
        entries = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name, data in entries.items():
            new.writestr(name, bytes(100_000_000) if name.endswith("/data/0") else data)


CHECKPOINT = {
    **ANY, "empty": put(lambda *_: b""), "text": put(lambda *_: b"hello " * 99), "packed": deflated,
    "cut 1": cut, "cut 2": cut, "cut 3": cut, "flip 1": flip, "flip 2": flip, "flip 3": flip,
    "code": put(lambda path, mark, draw: pickle.dumps(Code(mark))),
    "code in an archive": saved(lambda content, mark: {**content, "step": Code(mark)}),
    "code in the old format": saved(lambda content, mark: Code(mark), _use_new_zipfile_serialization=False),
    "list that doubles itself": saved(lambda content, mark: {**content, "step": nested("a", 40, lambda v: [v, v])}),
    "tuple that doubles itself": saved(lambda content, mark: {**content, "arch": nested(1, 40, lambda v: (v, v))}),
    "dict that doubles itself": saved(
        lambda content, mark: {**content, "model": nested(1, 40, lambda v: {"a": v, "b": v})}),
    "deep": saved(lambda content, mark: {**content, "step": nested(1, 150, lambda v: [v])}),
    "long number": saved(lambda content, mark: {**content, "step": 1 << 10**8}),
    "giant tensor": saved(lambda content, mark: with_first_tensor(content, lambda t: torch.ones(1).expand(10**12))),
    "NaN": saved(lambda content, mark: with_first_tensor(content, lambda t: t * torch.nan)),
    "no dict": saved(lambda content, mark: [content])}


# ---------------------------------------- --config

def text(make):
    """A maker of a recipe from a string, which `mark` may stand in."""
    return put(lambda path, mark, draw: make(mark).encode())


def laughs(times):
    """Lists of nine times the list before: a kilobyte stands for more than any memory."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    return "\n".join(lines + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, times)])


RECIPE = {
    **ANY, "laughs": text(lambda mark: laughs(30)),
    "merged": text(lambda mark: "a: &a {b: 1}\nc: {<<: [*a, *a]}\n"),
    "recursive": text(lambda mark: "a: &a [*a]"), "deep list": text(lambda mark: "seed: " + "[" * 100_000),
    "deep dict": text(lambda mark: "a: " + "{a: " * 10_000),
    "long list": text(lambda mark: "a: [" + "1," * 10**6 + "1]"),
    "call": text(lambda mark: f"seed: !!python/object/apply:os.mkdir ['{mark}']"),
    "object": text(lambda mark: f"seed: !!python/object/new:os.mkdir ['{mark}']"),
    "name": text(lambda mark: "seed: !!python/name:os.system"), "tag": text(lambda mark: "seed: !code 3"),
    "module": text(lambda mark: "!!python/module:antigravity"), "binary": put(lambda *_: b"seed: \x00\x01\x02"),
    "long number": text(lambda mark: "seed: " + "9" * 100_000), "long name": text(lambda mark: "a" * 100_000 + ": 1"),
    "long hexadecimal": text(lambda mark: "seed: 0x" + "f" * 100_000), "no UTF-8": put(lambda *_: b"seed: \xff\xfe"),
    "cut": text(lambda mark: 'seed: "3'), "list": text(lambda mark: "- seed: 3"),
    "two documents": text(lambda mark: "seed: 3\n---\nseed: 4")}


# ---------------------------------------- Images

def chunk(kind, data):
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def png(width, height, *chunks):
    """A PNG that says it has this size, 8 bits of grey."""
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 0, 0, 0, 0])
    return PNG + chunk(b"IHDR", header) + b"".join(chunks) + chunk(b"IEND", b"")


def npy(header="", array=None):
    """A maker of a .npy file: a header of our own, or an array that may hold objects."""
    def write(path, mark, draw):
        path.unlink()
        path = path.with_suffix(".npy")
        if array is not None:
            np.save(path, array(mark), allow_pickle=True)
        else:
            line = header.replace("MARK", str(mark)).encode() + b"\n"
            path.write_bytes(b"\x93NUMPY\x01\x00" + len(line).to_bytes(2, "little") + line)
        return path
    return write


def npz(mark):
    buffer = io.BytesIO()
    np.savez(buffer, a=np.array([Code(mark)], dtype=object))
    return buffer.getvalue()


IMAGE = {
    **ANY, "empty": put(lambda *_: b""), "cut 1": cut, "cut 2": cut, "cut 3": cut,
    "signature": put(lambda *_: PNG), "nothing inside": put(lambda *_: png(16, 16)),
    "bomb": put(lambda *_: png(60_000, 60_000, chunk(b"IDAT", zlib.compress(bytes(10**8))))),
    "no size": put(lambda *_: png(0, 0)), "more than it holds": put(
        lambda *_: png(9_000, 9_000, chunk(b"IDAT", zlib.compress(bytes(100))))),
    "comment that unpacks": put(lambda *_: png(
        16, 16, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**8))), chunk(b"IDAT", zlib.compress(bytes(16 * 17))))),
    "PostScript": put(lambda path, mark, draw: (
        f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n({mark}) (w) file closefile\n").encode()),
    "entities": put(lambda *_: b'<!DOCTYPE a [<!ENTITY b "bbb"><!ENTITY c "&b;&b;">]><svg>&c;</svg>'),
    "objects": npy(array=lambda mark: np.array([[Code(mark)]], dtype=object)),
    "archive of objects": put(lambda path, mark, draw: npz(mark)),
    "header of code": npy("__import__('os').mkdir('MARK')"),
    "header without end": npy("{'descr': '|u1', 'fortran_order': False, 'shape': ("),
    "giant array": npy("{'descr': '|u1', 'fortran_order': False, 'shape': (1000000, 1000000, 3), }"),
    "deep header": npy("(" * 9_000), "many axes": npy(array=lambda mark: np.ones((2, 2, 2, 2, 2)))}

RESULT = {
    **ANY, "empty": put(lambda *_: b""), "deep list": text(lambda mark: "[" * 100_000),
    "long number": text(lambda mark: "9" * 100_000), "list": text(lambda mark: "[1]"),
    "NaN": text(lambda mark: '{"confusion": [[NaN]], "per_class": {"a": NaN}}')}

KINDS = {"last.pt": CHECKPOINT, "encoder.pt": CHECKPOINT, "--config": RECIPE, "image": IMAGE, "result.json": RESULT}
ALL = [(kind, name) for kind, makers in KINDS.items() for name in makers]


def damage_image(path, draw):
    """Make an image file one that cannot be decoded."""
    whole = path.read_bytes()
    path.write_bytes(draw.choice([whole[: int(len(whole) * draw.uniform(0, 0.6))], b"", PNG, draw.randbytes(500),
                                  bytes(len(whole)), b"no image"]))
