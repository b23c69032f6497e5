"""weights.py: a checkpoint survives what happens to files, and what happened to a file never reaches the model."""

import argparse
import contextlib
import errno
import os
import pickle
import random
import resource
import stat
import time
import zipfile

import pytest
import torch
import torch.nn as nn
from conftest import equal, finish, snapshot, start

import engine
import models
import weights


def content(seed=0, size=40):
    draw = torch.Generator().manual_seed(seed)
    return {"model": {"a.weight": torch.randn(size, 7, generator=draw), "n": torch.tensor(3)}, "step": seed,
            "config": {"size": [32, 64], "name": "vit", "ratio": 0.75, "on": True, "none": None}}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))


def trained(steps=3):
    model = network()
    optimizer = torch.optim.AdamW(engine.parameter_groups(model, 0.1), lr=0.01)
    for _ in range(steps):
        model(torch.randn(6, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


# Writing


def test_round_trip(tmp_path):
    saved = content()
    weights.write(tmp_path / "a.pt", saved)
    assert equal(weights.read(tmp_path / "a.pt"), saved)
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_the_previous_one_is_kept(tmp_path):
    for seed in range(3):
        weights.write(tmp_path / "a.pt", content(seed))
    assert weights.read(tmp_path / "a.pt")["step"] == 2 and weights.read(tmp_path / "previous.a.pt")["step"] == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pt", "previous.a.pt"]


def test_an_optimizer_makes_the_round_trip(tmp_path):
    model, optimizer = trained()
    weights.write(tmp_path / "a.pt", {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    saved = weights.read(tmp_path / "a.pt")
    other, empty = trained(steps=0)
    weights.load_exactly(other, saved["model"], "a.pt")
    weights.load_optimizer(empty, saved["optimizer"], "a.pt")
    assert equal(dict(other.state_dict()), dict(model.state_dict()))
    assert equal(empty.state_dict(), optimizer.state_dict())


@pytest.fixture
def small_files():
    """No file of this process may grow beyond 100 kB: writing more raises, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_that_cannot_grow_leaves_what_was_there(tmp_path, small_files):
    weights.write(tmp_path / "a.pt", content(1))
    weights.write(tmp_path / "a.pt", content(2))
    before = snapshot(tmp_path)
    with pytest.raises(OSError, match=r"cannot write .*a\.pt.*intact") as caught:
        weights.write(tmp_path / "a.pt", content(3, size=10_000))
    assert len(str(caught.value).splitlines()) == 1 and snapshot(tmp_path) == before


@pytest.mark.parametrize("after", [0, 1, 700, 50_000])
def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch, after):
    weights.write(tmp_path / "a.pt", content(1))
    before, written = snapshot(tmp_path), 0

    class Full:
        def __init__(self, file):
            self.file = file

        def write(self, data):
            nonlocal written
            written += len(data)
            if written > after:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(data)

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

    import builtins
    monkeypatch.setattr(weights, "open", lambda *a, **k: Full(builtins.open(*a, **k)), raising=False)
    with pytest.raises(OSError, match=r"cannot write .*a\.pt"):
        weights.write(tmp_path / "a.pt", content(2, size=3000))
    assert written > after and snapshot(tmp_path) == before


def test_a_failing_fsync_leaves_what_was_there(tmp_path, monkeypatch):
    weights.write(tmp_path / "a.pt", content(1))
    before = snapshot(tmp_path)
    def broken(descriptor):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output error"):
        weights.write(tmp_path / "a.pt", content(2))
    assert snapshot(tmp_path) == before


def test_what_does_not_read_back_is_not_kept(tmp_path, monkeypatch):
    """A disk that lies: the bytes on it are not those that were written."""
    weights.write(tmp_path / "a.pt", content(1))
    before, sync = snapshot(tmp_path), os.fsync
    def lie(descriptor):
        path = tmp_path / "a.pt.tmp"
        if path.exists():
            bad = bytearray(path.read_bytes())
            bad[len(bad) // 3] ^= 1
            path.write_bytes(bad)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", lie)
    with pytest.raises(OSError, match=r"cannot write"):
        weights.write(tmp_path / "a.pt", content(2))
    assert snapshot(tmp_path) == before


def test_the_file_and_its_directory_are_synced_in_this_order(tmp_path, monkeypatch):
    events, sync, replace = [], os.fsync, os.replace
    def note_sync(descriptor):
        events.append("directory" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        sync(descriptor)

    def note_replace(old, new):
        events.append("rename")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", note_replace)
    weights.write(tmp_path / "a.pt", content(1))
    weights.write(tmp_path / "a.pt", content(2))
    assert events == ["file", "rename", "directory", "file", "rename", "rename", "directory"]


@pytest.mark.parametrize("damaged", [False, True], ids=["whole", "damaged"])
def test_no_crash_between_two_renames_loses_the_last_good_one(tmp_path, monkeypatch, damaged, capsys):
    weights.write(tmp_path / "a.pt", content(1))
    weights.write(tmp_path / "a.pt", content(2))
    if damaged:  # the run goes on from previous.a.pt, and saves
        (tmp_path / "a.pt").write_bytes((tmp_path / "a.pt").read_bytes()[:-99])
    real, count = os.replace, 0
    for crash_at in (1, 2):
        def crashing(old, new, crash_at=crash_at):
            nonlocal count
            count += 1
            if count >= crash_at:
                raise KeyboardInterrupt
            real(old, new)

        count = 0
        monkeypatch.setattr(os, "replace", crashing)
        with contextlib.suppress(KeyboardInterrupt):  # where there is no second rename, nothing is interrupted
            weights.write(tmp_path / "a.pt", content(3))
        assert count >= 1
        assert weights.read_newest(tmp_path / "a.pt")["step"] in (1, 2, 3)


def test_a_directory_that_is_read_only(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root writes everywhere")
    weights.write(tmp_path / "a.pt", content(1))
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(OSError, match="cannot write"):
            weights.write(tmp_path / "a.pt", content(2))
        assert weights.read(tmp_path / "a.pt")["step"] == 1
    finally:
        tmp_path.chmod(0o700)


def test_a_directory_that_is_not_there(tmp_path):
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "none", tmp_path / "file"):
        with pytest.raises(OSError, match="cannot write"):
            weights.write(folder / "a.pt", content())


def test_kill_during_saves_always_leaves_a_whole_checkpoint(tmp_path):
    """One process saves as fast as it can, in a child that is killed at a random moment, twenty times over."""
    writer = f"""
import os, signal, sys, time, random
sys.path.insert(0, ".")
import torch, weights
random.seed(0)
content = lambda step: {{"model": {{"w": torch.full((300, 300), float(step))}}, "step": step}}
for attempt in range(20):
    child = os.fork()
    if child == 0:
        for step in range(10**6):
            weights.write({str(tmp_path / "a.pt")!r}, content(step))
    time.sleep(0.05 + random.random() * 0.1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    saved = weights.read_newest({str(tmp_path / "a.pt")!r})
    assert saved["model"]["w"].eq(saved["step"]).all()
    print("whole", saved["step"], flush=True)
"""
    code, out, err = finish(start("-c", writer))
    whole = [line for line in out.splitlines() if line.startswith("whole")]
    assert code == 0 and len(whole) == 20, err
    assert sum(int(line.split()[1]) > 0 for line in whole) >= 15  # the kills did fall between saves that went on


# Reading


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.999])
def test_truncation_is_detected(tmp_path, share):
    path = tmp_path / "a.pt"
    weights.write(path, content())
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match=r"a\.pt") as caught:
        weights.read(path)
    assert len(str(caught.value).splitlines()) == 1


def test_a_zero_tail_is_detected(tmp_path):
    path = tmp_path / "a.pt"
    weights.write(path, content())
    whole = path.read_bytes()
    for n in (20, 100, len(whole) // 2):
        path.write_bytes(whole[:-n] + bytes(n))
        with pytest.raises(ValueError, match=r"a\.pt"):
            weights.read(path)


def test_bit_flips_in_what_is_stored_are_all_detected(tmp_path):
    path, draw = tmp_path / "a.pt", random.Random(0)
    weights.write(path, content(size=400))
    whole, inside = path.read_bytes(), []
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            begin = info.header_offset + 30 + len(info.filename)
            begin += int.from_bytes(whole[info.header_offset + 28 : info.header_offset + 30], "little")  # extra field
            inside += range(begin, begin + info.file_size)
    for _ in range(100):
        flipped = bytearray(whole)
        flipped[draw.choice(inside)] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match=r"a\.pt is (damaged|not a whole)"):
            weights.read(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_bit_flips_anywhere_are_detected_or_harmless(tmp_path):
    """Dates, names, attributes and padding of the archive have no checksum: there a flip may pass, if it changes
    nothing. (Flag 0x10 of an entry in the central directory makes torch leave its tensor uninitialised.)"""
    path, draw, saved = tmp_path / "a.pt", random.Random(0), content()
    weights.write(path, saved)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        directory = archive.start_dir
    flips = [(where, bit) for where in range(directory, len(whole)) for bit in range(8)]
    flips += [(draw.randrange(directory), draw.randrange(8)) for _ in range(1500)]
    for where, bit in flips:
        flipped = bytearray(whole)
        flipped[where] ^= 1 << bit
        path.write_bytes(flipped)
        try:
            found = weights.read(path)
        except ValueError as error:
            assert len(str(error).splitlines()) == 1 and "a.pt" in str(error), (where, bit)
        else:
            assert equal(found, saved), (where, bit)


class Hostile:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_a_hostile_pickle_is_not_executed(tmp_path):
    path, marker = tmp_path / "a.pt", tmp_path / "executed"
    torch.save({"model": {}, "arch": Hostile(marker)}, path)
    with pytest.raises(ValueError, match=r"a\.pt holds more than tensors"):
        weights.read(path)
    for raw in (pickle.dumps(Hostile(marker)), pickle.dumps({"a": 1})):  # not even an archive
        path.write_bytes(raw)
        with pytest.raises(ValueError, match=r"a\.pt"):
            weights.read(path)
    torch.save({"arch": Hostile(marker)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"a\.pt"):
        weights.read(path)
    assert not marker.exists()


@pytest.mark.parametrize("value", [argparse.Namespace(lr=1), os, len], ids=["Namespace", "module", "function"])
def test_other_objects_are_refused(tmp_path, value):
    try:
        torch.save({"args": value}, tmp_path / "a.pt")
    except TypeError:
        pytest.skip("cannot even be pickled")
    with pytest.raises(ValueError, match=r"a\.pt"):
        weights.read(tmp_path / "a.pt")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_an_archive_with_rubbish_inside_is_refused(tmp_path):
    """Checksums that fit, and nothing else."""
    path, draw = tmp_path / "a.pt", random.Random(0)
    weights.write(path, content())
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    pickled = next(name for name in parts if name.endswith("data.pkl"))
    for attempt in range(300):
        bad = bytearray(parts[pickled])
        for _ in range(draw.choice((1, 3, 30))):
            bad[draw.randrange(len(bad))] = draw.randrange(256)
        bad = b"" if attempt == 0 else bytes(bad)
        with zipfile.ZipFile(path, "w") as archive:
            for name, value in parts.items():
                archive.writestr(name, bad if name == pickled else value)
        try:
            weights.read(path)
        except ValueError as error:
            assert len(str(error).splitlines()) == 1 and "a.pt" in str(error), (attempt, error)


def test_a_missing_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"a\.pt"):
        weights.read(tmp_path / "a.pt")
    with pytest.raises(FileNotFoundError):
        weights.read(tmp_path)  # a directory
    assert weights.read_newest(tmp_path / "a.pt") is None


def test_the_previous_one_is_used_with_one_line(tmp_path, capsys):
    path = tmp_path / "a.pt"
    weights.write(path, content(1))
    weights.write(path, content(2))
    assert weights.read_newest(path)["step"] == 2 and capsys.readouterr().out == ""
    for damage in (lambda: path.write_bytes(path.read_bytes()[:-50]), lambda: path.write_bytes(b""), path.unlink):
        damage()
        assert weights.read_newest(path)["step"] == 1
        out = capsys.readouterr().out
        assert len(out.splitlines()) == 1 and "previous.a.pt" in out
    path.write_bytes(b"")
    (tmp_path / "previous.a.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"a\.pt"):
        weights.read_newest(path)


# Loading


def state(model, optimizer):
    return {k: v.clone() for k, v in model.state_dict().items()}, pickle.dumps(optimizer.state_dict())


SPOIL = {
    "shape": lambda t: torch.zeros(9, 9), "transposed": lambda t: torch.zeros_like(t).T.contiguous(),
    "double": lambda t: t.double(), "half": lambda t: t.half(), "nan": lambda t: t.clone().fill_(float("nan")),
    "inf": lambda t: torch.where(t == t.max(), torch.inf, t), "number": lambda t: 1.0, "list": lambda t: t.tolist(),
    "giant": lambda t: torch.zeros(1).as_strided((10**6, 10**6), (0, 0)),  # 4 bytes on disk, 4 TB if touched
}


@pytest.mark.parametrize("spoil", SPOIL.values(), ids=SPOIL)
def test_a_wrong_tensor_is_refused_before_anything_is_copied(tmp_path, spoil):
    model, optimizer = trained()
    before = state(model, optimizer)
    tensors = {k: v + 1 for k, v in model.state_dict().items()}
    tensors["2.weight"] = spoil(tensors["2.weight"])  # the last matrix: the others would have been copied by then
    torch.save({"model": tensors}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt, 2\.weight"):
        weights.load_exactly(model, weights.read(tmp_path / "a.pt")["model"], "a.pt")

    moments = optimizer.state_dict()
    moments["state"] = {i: dict(m) for i, m in moments["state"].items()}
    moments["state"][1]["exp_avg"] = spoil(torch.zeros(3, 5))
    with pytest.raises(ValueError, match=r"a\.pt, exp_avg"):
        weights.load_optimizer(optimizer, moments, "a.pt")
    after = state(model, optimizer)
    assert equal(before[0], after[0]) and before[1] == after[1]


def test_a_giant_tensor_costs_nothing_to_refuse(tmp_path):
    torch.save({"w": torch.zeros(1).as_strided((10**6, 10**6), (0, 0))}, tmp_path / "a.pt")
    assert (tmp_path / "a.pt").stat().st_size < 10_000
    begin = time.monotonic()
    with pytest.raises(ValueError, match="should be"):
        weights.load_exactly(nn.Linear(2, 2), {**nn.Linear(2, 2).state_dict(), "weight":
                             weights.read(tmp_path / "a.pt")["w"]}, "a.pt")
    assert time.monotonic() - begin < 2


def test_missing_and_unknown_names_are_told(tmp_path):
    model = network()
    tensors = {k: v + 1 for k, v in model.state_dict().items()}
    before = {k: v.clone() for k, v in model.state_dict().items()}
    tensors["head.weight"] = tensors.pop("2.weight")
    with pytest.raises(ValueError, match=r"lacks \['2\.weight'\].*unknown \['head\.weight'\]"):
        weights.load_exactly(model, tensors, "a.pt")
    assert equal(dict(model.state_dict()), before)


def test_an_optimizer_of_other_groups_is_refused():
    _, optimizer = trained()
    before = pickle.dumps(optimizer.state_dict())
    changed = optimizer.state_dict()
    changed["param_groups"] = [{**g, "names": g["names"][::-1]} for g in changed["param_groups"]]
    with pytest.raises(ValueError, match="groups"):
        weights.load_optimizer(optimizer, changed, "a.pt")
    fewer = optimizer.state_dict()
    fewer["param_groups"] = fewer["param_groups"][:1]
    with pytest.raises(ValueError, match="groups"):
        weights.load_optimizer(optimizer, fewer, "a.pt")
    assert pickle.dumps(optimizer.state_dict()) == before


@pytest.mark.parametrize("change", [
    {"state": {99: {"step": torch.zeros(())}}}, {"state": {"x": {}}}, {"state": {0: 5}}, {"state": []}, {"state": None},
    {"param_groups": None}, {"param_groups": [1, 2]}, {"param_groups": []}], ids=repr)
def test_an_optimizer_state_that_is_none_is_refused_in_one_line(change):
    _, optimizer = trained()
    before = pickle.dumps(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"a\.pt"):
        weights.load_optimizer(optimizer, {**optimizer.state_dict(), **change}, "a.pt")
    assert pickle.dumps(optimizer.state_dict()) == before


# encoder.pt


def encoder_file(encoder, **changes):
    return {"arch": encoder.arch, "model": encoder.state_dict(), "step": 3, "method": "MAE", **changes}


def test_an_encoder_makes_the_round_trip(tmp_path, capsys):
    one, two = (models.build("vit_tiny", (32, 64), 8) for _ in range(2))
    weights.write(tmp_path / "encoder.pt", encoder_file(one))
    weights.load_encoder(two, weights.read_encoder(tmp_path / "encoder.pt"), "encoder.pt")
    imgs = torch.randn(2, 3, 32, 64)
    assert torch.equal(one(imgs), two(imgs))
    assert "loaded" in capsys.readouterr().out


@pytest.mark.parametrize("name,value", [("num_heads", 8), ("depth", 5), ("width", 100), ("patch_size", 4),
                                        ("in_chans", 1), ("model", "vit_s")])
def test_an_encoder_of_another_architecture_is_refused(name, value):
    """Heads above all: the weights of 4 heads have the shapes of 8, and would load without a word."""
    encoder, other = (models.build("vit_tiny", (32, 32), 8) for _ in range(2))
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    with pytest.raises(ValueError, match=rf"encoder\.pt.*{name} {value}"):
        weights.load_encoder(encoder, encoder_file(other, arch={**other.arch, name: value}), "encoder.pt")
    assert equal(dict(encoder.state_dict()), before)


@pytest.mark.parametrize("changes", [
    {"arch": None}, {"arch": {}}, {"model": None}, {"model": {}}, {"arch": {"model": "vit_tiny"}},
    {"arch.img_size": [32]}, {"arch.img_size": ["a", "b"]}, {"arch.img_size": [None, 32]}, {"arch.img_size": 32},
    {"arch.img_size": {"a": 1, "b": 2}}, {"arch.img_size": [10**9, 10**9]}, {"arch.img_size": [-32, 32]},
    {"arch.img_size": [0, 0]}, {"arch.patch_size": 0}, {"arch.patch_size": -8}, {"arch.patch_size": 8.0},
    {"arch.model": 7}], ids=repr)
def test_a_file_that_only_looks_like_an_encoder_is_refused_in_one_line(tmp_path, changes):
    encoder = models.build("vit_tiny", (32, 32), 8)
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    nested = {k.removeprefix("arch."): v for k, v in changes.items() if k.startswith("arch.")}
    saved = encoder_file(encoder, arch={**encoder.arch, **nested})
    torch.save({**saved, **{k: v for k, v in changes.items() if "." not in k}}, tmp_path / "encoder.pt")
    with pytest.raises(ValueError, match=r"encoder\.pt") as caught:
        weights.load_encoder(encoder, weights.read_encoder(tmp_path / "encoder.pt"), tmp_path / "encoder.pt")
    assert len(str(caught.value).splitlines()) == 1
    assert equal(dict(encoder.state_dict()), before)


@pytest.mark.parametrize("value", [[1, 2], 3, "text", torch.zeros(3), {}], ids=repr)
def test_a_checkpoint_of_something_else_is_no_encoder(tmp_path, value):
    torch.save(value, tmp_path / "encoder.pt")
    with pytest.raises(ValueError, match=r"encoder\.pt"):
        weights.read_encoder(tmp_path / "encoder.pt")


def test_an_encoder_for_another_image_size_has_its_positions_resized(capsys):
    learned = {"learn_positions": True}
    old, new = (models.build("vit_tiny", size, 8, **learned) for size in ((32, 32), (32, 64)))
    with torch.no_grad():
        old.pos_embed.normal_()
    saved = encoder_file(old)
    weights.load_encoder(new, saved, "encoder.pt")
    assert "positions resized from 4x4 to 4x8" in capsys.readouterr().out
    assert torch.equal(new.pos_embed, weights.resize_positions(old.pos_embed, (4, 4), (4, 8)))
    assert saved["model"]["pos_embed"].shape == old.pos_embed.shape  # the caller's tensors are as they were


def test_resize_positions_to_the_same_grid_is_the_identity():
    table = torch.randn(1, 1 + 12, 8)
    torch.testing.assert_close(weights.resize_positions(table, (3, 4), (3, 4)), table, rtol=0, atol=1e-6)


def test_resize_positions_keeps_what_stands_in_front():
    table = torch.randn(1, 2 + 12, 8)
    assert torch.equal(weights.resize_positions(table, (3, 4), (6, 8), num_prefix=2)[:, :2], table[:, :2])
    assert weights.resize_positions(table, (3, 4), (6, 8), num_prefix=2).shape == (1, 2 + 48, 8)
    assert weights.resize_positions(table[:, 2:], (3, 4), (6, 8), num_prefix=0).shape == (1, 48, 8)


def test_resize_positions_is_told_the_grid_and_does_not_guess_it():
    table = torch.randn(1, 64, 8)  # 64 tokens: 8x8, or 4x16
    square, flat = (weights.resize_positions(table, grid, (8, 8), num_prefix=0) for grid in ((8, 8), (4, 16)))
    torch.testing.assert_close(square, table, rtol=0, atol=1e-6)
    assert (flat - table).abs().max() > 0.1


def test_resize_positions_interpolates_rows_and_columns_alike():
    ramp = torch.arange(8.0)
    table = torch.stack([ramp[:, None].expand(8, 6), ramp[:6].expand(8, 6)], dim=2).view(1, 48, 2)  # (row, column)
    big = weights.resize_positions(table, (8, 6), (16, 12), num_prefix=0).view(16, 12, 2)[4:-4, 4:-4]
    # bicubic interpolation with torch's a = -0.75 keeps a ramp to about 0.05 only
    torch.testing.assert_close(big[:, 0, 0], (torch.arange(4, 12) + 0.5) / 2 - 0.5, rtol=0, atol=0.1)
    torch.testing.assert_close(big[0, :, 1], (torch.arange(4, 8) + 0.5) / 2 - 0.5, rtol=0, atol=0.1)

