"""checkpoint.py: it survives what happens to files, and what happened to a file never reaches the model."""

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
from conftest import equal, snapshot

from common import checkpoint, folder, optim
from tools.trials import finish, fork


def content(seed=0, size=40):
    draw = torch.Generator().manual_seed(seed)
    return {"model": {"a.weight": torch.randn(size, 7, generator=draw), "n": torch.tensor(3)}, "step": seed,
            "config": {"size": [32, 64], "name": "vit", "ratio": 0.75, "on": True, "none": None}}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))


def trained(steps=3):
    model = network()
    optimizer = torch.optim.AdamW(optim.parameter_groups(model, 0.1), lr=0.01)
    for _ in range(steps):
        model(torch.randn(6, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


# Writing


def test_round_trip(tmp_path):
    saved = content()
    checkpoint.write(tmp_path / "a.pt", saved)
    assert equal(checkpoint.read(tmp_path / "a.pt"), saved)
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_the_previous_one_is_kept(tmp_path):
    for seed in range(3):
        checkpoint.write(tmp_path / "a.pt", content(seed))
    assert checkpoint.read(tmp_path / "a.pt")["step"] == 2 and checkpoint.read(tmp_path / "previous.a.pt")["step"] == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pt", "previous.a.pt"]


def test_an_optimizer_makes_the_round_trip(tmp_path):
    model, optimizer = trained()
    checkpoint.write(tmp_path / "a.pt", {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    saved = checkpoint.read(tmp_path / "a.pt")
    other, empty = trained(steps=0)
    checkpoint.load_exactly(other, saved["model"], "a.pt")
    checkpoint.load_optimizer(empty, saved["optimizer"], "a.pt")
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
    checkpoint.write(tmp_path / "a.pt", content(1))
    checkpoint.write(tmp_path / "a.pt", content(2))
    before = snapshot(tmp_path)
    with pytest.raises(OSError, match=r"cannot write .*a\.pt.*intact") as caught:
        checkpoint.write(tmp_path / "a.pt", content(3, size=10_000))
    assert len(str(caught.value).splitlines()) == 1 and snapshot(tmp_path) == before


@pytest.mark.parametrize("after", [0, 1, 700, 50_000])
def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch, after):
    checkpoint.write(tmp_path / "a.pt", content(1))
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
    monkeypatch.setattr(checkpoint, "open", lambda *a, **k: Full(builtins.open(*a, **k)), raising=False)
    with pytest.raises(OSError, match=r"cannot write .*a\.pt"):
        checkpoint.write(tmp_path / "a.pt", content(2, size=3000))
    assert written > after and snapshot(tmp_path) == before


def test_a_failing_fsync_leaves_what_was_there(tmp_path, monkeypatch):
    checkpoint.write(tmp_path / "a.pt", content(1))
    before = snapshot(tmp_path)
    def broken(descriptor):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output error"):
        checkpoint.write(tmp_path / "a.pt", content(2))
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("number,is_known", [(errno.EINVAL, True), (errno.EBADF, True), (errno.EIO, False)])
def test_a_disk_that_cannot_sync_a_folder_keeps_what_was_written(tmp_path, monkeypatch, number, is_known):
    """But a disk that fails is named."""
    sync = os.fsync
    def refuse_folders(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    with contextlib.nullcontext() if is_known else pytest.raises(OSError, match=os.strerror(number)):
        checkpoint.write(tmp_path / "a.pt", content(1))
    assert equal(checkpoint.read(tmp_path / "a.pt"), content(1))


def test_what_does_not_read_back_is_not_kept(tmp_path, monkeypatch):
    """A disk that lies: the bytes on it are not those that were written."""
    checkpoint.write(tmp_path / "a.pt", content(1))
    before, sync = snapshot(tmp_path), os.fsync
    def lie(descriptor):
        for path in tmp_path.glob("a.pt.*.tmp"):
            bad = bytearray(path.read_bytes())
            bad[len(bad) // 3] ^= 1
            path.write_bytes(bad)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", lie)
    with pytest.raises(OSError, match=r"cannot write"):
        checkpoint.write(tmp_path / "a.pt", content(2))
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
    checkpoint.write(tmp_path / "a.pt", content(1))
    checkpoint.write(tmp_path / "a.pt", content(2))
    assert events == ["file", "rename", "directory", "file", "rename", "rename", "directory"]


def test_a_system_that_opens_no_folders_saves_all_the_same(tmp_path, monkeypatch):
    """Windows."""
    real = os.open
    def refuse(path, *rest):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, *rest)

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.delattr(os, "sysconf")
    for seed in (1, 2):
        checkpoint.write(tmp_path / "a.pt", content(seed))
        assert equal(checkpoint.read(tmp_path / "a.pt"), content(seed))


@pytest.mark.parametrize("damaged", [False, True], ids=["whole", "damaged"])
def test_no_crash_between_two_renames_loses_the_last_good_one(tmp_path, monkeypatch, damaged, capsys):
    checkpoint.write(tmp_path / "a.pt", content(1))
    checkpoint.write(tmp_path / "a.pt", content(2))
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
            checkpoint.write(tmp_path / "a.pt", content(3))
        assert count >= 1
        assert checkpoint.read_newest(tmp_path / "a.pt")["step"] in (1, 2, 3)


def test_files_that_belong_together_take_their_places_together(tmp_path, monkeypatch):
    """If the second one cannot be written, the first one is as it was; a kill before that changes neither."""
    names = [tmp_path / "last.pt", tmp_path / "encoder.pt"]
    checkpoint.write_together({name: content(1) for name in names})
    before, real = snapshot(tmp_path), checkpoint.write_temporary
    for error in (OSError, KeyboardInterrupt):
        def fails(path, temporary, content, error=error):
            real(path, temporary, content)
            if path.name == "encoder.pt":
                raise error("no space left")

        monkeypatch.setattr(checkpoint, "write_temporary", fails)
        with pytest.raises(error):
            checkpoint.write_together({name: content(2) for name in names})
        left = snapshot(tmp_path)
        assert {name: left[name] for name in before} == before and (error is KeyboardInterrupt or left == before)
    monkeypatch.setattr(checkpoint, "write_temporary", real)
    checkpoint.write_together({name: content(3) for name in names})
    assert [checkpoint.read(name)["step"] for name in names] == [3, 3] and not list(tmp_path.glob("*.tmp"))


def test_a_directory_that_is_read_only(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root writes everywhere")
    checkpoint.write(tmp_path / "a.pt", content(1))
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(OSError, match="cannot write"):
            checkpoint.write(tmp_path / "a.pt", content(2))
        assert checkpoint.read(tmp_path / "a.pt")["step"] == 1
    finally:
        tmp_path.chmod(0o700)


def test_a_directory_that_is_not_there(tmp_path):
    (tmp_path / "file").write_text("x")
    for missing in (tmp_path / "none", tmp_path / "file"):
        with pytest.raises(OSError, match="cannot write"):
            checkpoint.write(missing / "a.pt", content())


def test_kill_during_saves_always_leaves_a_whole_checkpoint(tmp_path):
    """One process saves as fast as it can, in a child that is killed at a random moment after its second save, twenty
    times over."""
    writer = f"""
import os, signal, sys, time, random
sys.path.insert(0, ".")
import torch
from common import checkpoint
random.seed(0)
content = lambda step: {{"model": {{"w": torch.full((300, 300), float(step))}}, "step": step}}
for attempt in range(20):
    saves, told = os.pipe()
    child = os.fork()
    if child == 0:
        for step in range(10**6):
            checkpoint.write({str(tmp_path / "a.pt")!r}, content(step))
            os.write(told, b".")
    os.read(saves, 1)
    os.read(saves, 1)
    time.sleep(random.random() * 0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    saved = checkpoint.read_newest({str(tmp_path / "a.pt")!r})
    assert saved["model"]["w"].eq(saved["step"]).all()
    print("whole", saved["step"], flush=True)
"""
    (tmp_path / "writer.py").write_text(writer)
    code, out, err = finish(fork(tmp_path / "writer.py"))
    whole = [line for line in out.splitlines() if line.startswith("whole")]
    assert code == 0 and len(whole) == 20, err
    assert all(int(line.split()[1]) > 0 for line in whole)  # the kills did fall between saves that went on


# Reading


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.999])
def test_truncation_is_detected(tmp_path, share):
    path = tmp_path / "a.pt"
    checkpoint.write(path, content())
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match=r"a\.pt") as caught:
        checkpoint.read(path)
    assert len(str(caught.value).splitlines()) == 1


def test_a_zero_tail_is_detected(tmp_path):
    path = tmp_path / "a.pt"
    checkpoint.write(path, content())
    whole = path.read_bytes()
    for n in (20, 100, len(whole) // 2):
        path.write_bytes(whole[:-n] + bytes(n))
        with pytest.raises(ValueError, match=r"a\.pt"):
            checkpoint.read(path)


def test_bit_flips_in_what_is_stored_are_all_detected(tmp_path):
    path, draw = tmp_path / "a.pt", random.Random(0)
    checkpoint.write(path, content(size=400))
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
            checkpoint.read(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_bit_flips_anywhere_are_detected_or_harmless(tmp_path):
    """Dates, names, attributes and padding of the archive have no checksum: there a flip may pass, if it changes
    nothing. (Flag 0x10 of an entry in the central directory makes torch leave its tensor uninitialised.)"""
    path, draw, saved = tmp_path / "a.pt", random.Random(0), content()
    checkpoint.write(path, saved)
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
            found = checkpoint.read(path)
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
        checkpoint.read(path)
    for raw in (pickle.dumps(Hostile(marker)), pickle.dumps({"a": 1})):  # not even an archive
        path.write_bytes(raw)
        with pytest.raises(ValueError, match=r"a\.pt"):
            checkpoint.read(path)
    torch.save({"arch": Hostile(marker)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"a\.pt"):
        checkpoint.read(path)
    assert not marker.exists()


@pytest.mark.parametrize("value", [argparse.Namespace(lr=1), os, len], ids=["Namespace", "module", "function"])
def test_other_objects_are_refused(tmp_path, value):
    try:
        torch.save({"args": value}, tmp_path / "a.pt")
    except TypeError:
        pytest.skip("cannot even be pickled")
    with pytest.raises(ValueError, match=r"a\.pt"):
        checkpoint.read(tmp_path / "a.pt")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_an_archive_with_rubbish_inside_is_refused(tmp_path):
    """Checksums that fit, and nothing else."""
    path, draw = tmp_path / "a.pt", random.Random(0)
    checkpoint.write(path, content())
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
            checkpoint.read(path)
        except ValueError as error:
            assert len(str(error).splitlines()) == 1 and "a.pt" in str(error), (attempt, error)


def test_a_missing_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"a\.pt"):
        checkpoint.read(tmp_path / "a.pt")
    with pytest.raises(FileNotFoundError):
        checkpoint.read(tmp_path)  # a directory
    assert checkpoint.read_newest(tmp_path / "a.pt") is None


def test_the_previous_one_is_used_with_one_line(tmp_path, capsys):
    path = tmp_path / "a.pt"
    checkpoint.write(path, content(1))
    checkpoint.write(path, content(2))
    assert checkpoint.read_newest(path)["step"] == 2 and capsys.readouterr().out == ""
    for damage in (lambda: path.write_bytes(path.read_bytes()[:-50]), lambda: path.write_bytes(b""), path.unlink):
        damage()
        assert checkpoint.read_newest(path)["step"] == 1
        out = capsys.readouterr().out
        assert len(out.splitlines()) == 1 and "previous.a.pt" in out
    path.write_bytes(b"")
    (tmp_path / "previous.a.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"a\.pt"):
        checkpoint.read_newest(path)


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
        checkpoint.load_exactly(model, checkpoint.read(tmp_path / "a.pt")["model"], "a.pt")

    moments = optimizer.state_dict()
    moments["state"] = {i: dict(m) for i, m in moments["state"].items()}
    moments["state"][1]["exp_avg"] = spoil(torch.zeros(3, 5))
    with pytest.raises(ValueError, match=r"a\.pt, exp_avg"):
        checkpoint.load_optimizer(optimizer, moments, "a.pt")
    after = state(model, optimizer)
    assert equal(before[0], after[0]) and before[1] == after[1]


def test_a_giant_tensor_costs_nothing_to_refuse(tmp_path):
    torch.save({"w": torch.zeros(1).as_strided((10**6, 10**6), (0, 0))}, tmp_path / "a.pt")
    assert (tmp_path / "a.pt").stat().st_size < 10_000
    begin = time.monotonic()
    with pytest.raises(ValueError, match="should be"):
        checkpoint.load_exactly(nn.Linear(2, 2), {**nn.Linear(2, 2).state_dict(), "weight":
                             checkpoint.read(tmp_path / "a.pt")["w"]}, "a.pt")
    assert time.monotonic() - begin < 2


def test_missing_and_unknown_names_are_told(tmp_path):
    model = network()
    tensors = {k: v + 1 for k, v in model.state_dict().items()}
    before = {k: v.clone() for k, v in model.state_dict().items()}
    tensors["head.weight"] = tensors.pop("2.weight")
    with pytest.raises(ValueError, match=r"lacks \['2\.weight'\].*unknown \['head\.weight'\]"):
        checkpoint.load_exactly(model, tensors, "a.pt")
    assert equal(dict(model.state_dict()), before)


def test_an_optimizer_of_other_groups_is_refused():
    _, optimizer = trained()
    before = pickle.dumps(optimizer.state_dict())
    changed = optimizer.state_dict()
    changed["param_groups"] = [{**g, "names": g["names"][::-1]} for g in changed["param_groups"]]
    with pytest.raises(ValueError, match="groups"):
        checkpoint.load_optimizer(optimizer, changed, "a.pt")
    fewer = optimizer.state_dict()
    fewer["param_groups"] = fewer["param_groups"][:1]
    with pytest.raises(ValueError, match="groups"):
        checkpoint.load_optimizer(optimizer, fewer, "a.pt")
    assert pickle.dumps(optimizer.state_dict()) == before


@pytest.mark.parametrize("change", [
    {"state": {99: {"step": torch.zeros(())}}}, {"state": {"x": {}}}, {"state": {0: 5}}, {"state": []}, {"state": None},
    {"param_groups": None}, {"param_groups": [1, 2]}, {"param_groups": []}], ids=repr)
def test_an_optimizer_state_that_is_none_is_refused_in_one_line(change):
    _, optimizer = trained()
    before = pickle.dumps(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"a\.pt"):
        checkpoint.load_optimizer(optimizer, {**optimizer.state_dict(), **change}, "a.pt")
    assert pickle.dumps(optimizer.state_dict()) == before


OPTIMIZERS = {  # what a crafted last.pt may hold instead of an optimizer's state of three steps
    "empty": lambda o: {**o, "state": {}}, "one lost": lambda o: {**o, "state": {0: o["state"][0]}},
    "maximize": lambda o: with_option(o, maximize=True), "maximize as 1": lambda o: with_option(o, maximize=1),
    "betas as text": lambda o: with_option(o, betas="0.9,0.95"),
    "other betas": lambda o: with_option(o, betas=(0, 0.9)),
    "tensor": lambda o: with_option(o, eps=torch.ones(3)), "decay": lambda o: with_option(o, weight_decay=-1.0),
    "no params": lambda o: {**o, "param_groups": [{k: v for k, v in g.items() if k != "params"}
                                                  for g in o["param_groups"]]},
    "other params": lambda o: with_option(o, params=[0, 0]),
    "sparse": lambda o: with_moment(o, "exp_avg", lambda m: m.to_sparse()),
    "meta": lambda o: with_moment(o, "exp_avg", lambda m: m.to("meta")),
    "negative": lambda o: with_moment(o, "exp_avg_sq", lambda m: -1 - m),
    "later step": lambda o: with_moment(o, "step", lambda m: m + 1),
    "no step": lambda o: with_moment(o, "step", lambda m: 0 * m),
    "other kind": lambda o: {**o, "state": {i: {"momentum_buffer": m["exp_avg"]} for i, m in o["state"].items()}},
}


def with_option(saved, **changes):
    first, *others = saved["param_groups"]
    return {**saved, "param_groups": [{**first, **changes}, *others]}


def with_moment(saved, name, change):
    state = {index: dict(moments) for index, moments in saved["state"].items()}
    state[1][name] = change(state[1][name])
    return {**saved, "state": state}


@pytest.mark.parametrize("change", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_an_optimizer_that_is_not_that_of_the_run_is_refused(change):
    _, optimizer = trained(steps=3)
    before = pickle.dumps(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"^a\.pt[:,]"):
        checkpoint.load_optimizer(optimizer, change(optimizer.state_dict()), "a.pt", steps=3)
    assert pickle.dumps(optimizer.state_dict()) == before


def test_the_state_of_an_optimizer_gets_memory_of_its_own():
    """Moments that are views of one number would fail in the first step, two that are the same spoil each other."""
    (_, optimizer), (_, other) = trained(), trained()
    saved = optimizer.state_dict()
    saved = with_moment(saved, "exp_avg", lambda m: torch.zeros(1).expand(m.shape))
    checkpoint.load_optimizer(other, saved, "a.pt", steps=3)
    loaded = other.state_dict()["state"][1]["exp_avg"]
    assert loaded.untyped_storage().nbytes() == loaded.nbytes


def test_an_option_that_an_older_torch_did_not_have_is_not_checked():
    _, optimizer = trained()
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        del group["maximize"]
    checkpoint.load_optimizer(optimizer, saved, "a.pt", steps=3)


def doubled(times, kind=list):
    value = kind("ab")
    for _ in range(times):
        value = kind([value, value])
    return value


def deep(times):
    value = []
    for _ in range(times):
        value = [value]
    return value


@pytest.mark.parametrize("value", [doubled(40), doubled(40, tuple), {"a": doubled(40)}, deep(5000), "x" * 10**8,
                                   1 << 10**8], ids=["lists", "tuples", "dict", "deep", "text", "number"])
def test_plain_data_that_grows_is_refused_at_once(tmp_path, value):
    checkpoint.require_small({"a": [1, "b", (2.5, None)], "t": torch.ones(3)}, "a.pt")
    begin = time.monotonic()
    with pytest.raises(ValueError, match=r"a\.pt is not a checkpoint: its plain data"):
        checkpoint.require_small({"config": value}, "a.pt")
    assert time.monotonic() - begin < 5


def test_what_is_not_finite_is_named():
    good = {"model": {"a": torch.ones(2), "n": torch.tensor(3)}, "step": 4, "none": None}
    assert checkpoint.first_not_finite(good) is None
    for value in (torch.nan, torch.inf):
        bad = {**good, "more": {"b": {0: torch.tensor([1, value])}}}
        assert checkpoint.first_not_finite(bad) == "more/b/0"


def test_links_in_the_place_of_temporary_files_are_not_followed(tmp_path):
    (tmp_path / "victim").write_text("mine")
    for name in ("a.pt.tmp", folder.temporary(tmp_path / "a.pt").name, "a.pt", "previous.a.pt"):
        (tmp_path / name).symlink_to(tmp_path / "victim")
    checkpoint.write(tmp_path / "a.pt", content(1))
    checkpoint.write(tmp_path / "a.pt", content(2))
    assert (tmp_path / "victim").read_text() == "mine"
    assert checkpoint.read(tmp_path / "a.pt")["step"] == 2 and checkpoint.read(tmp_path / "previous.a.pt")["step"] == 1
