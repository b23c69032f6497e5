"""folder.py: one run at a time, and no file through a link."""

import contextlib
import json
import os
import signal
import time

import pytest

from common import folder
from tools.trials import finish, fork


@pytest.fixture
def held(tmp_path):
    """A folder that another process holds, which has forked a third one; that process."""
    script = f"""
import os, sys, time
sys.path.insert(0, ".")
from common import folder
with folder.Lock({str(tmp_path / "run")!r}):
    if os.fork():
        print("held", flush=True)
    time.sleep(60)
"""
    (tmp_path / "holder.py").write_text(script)
    process = fork(tmp_path / "holder.py")
    assert process.stdout.readline() == "held\n"
    yield tmp_path / "run", process
    os.killpg(process.pid, signal.SIGKILL)
    process.stdout.close()


def test_a_folder_in_use_is_refused_and_named(held):
    out, _ = held
    before = (out / ".lock").read_bytes()
    host, process = json.loads(before)
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"{out} is in use by another run \(process {process} on {host}\)"):
            folder.Lock(out).take()
    assert (out / ".lock").read_bytes() == before


def test_a_killed_run_holds_nothing_though_its_forks_live_on(held):
    out, _ = held
    _, process = json.loads((out / ".lock").read_bytes())
    os.kill(process, signal.SIGKILL)
    lock, deadline = folder.Lock(out), time.monotonic() + 5
    while lock.finalizer is None and time.monotonic() < deadline:
        with contextlib.suppress(ValueError):
            lock.take()
    assert json.loads(lock.path.read_text())[1] == os.getpid()
    lock.release()
    assert not (out / ".lock").exists()


def other_machine(out, age):
    out.mkdir()
    (out / ".lock").write_text('["elsewhere", 7]')
    os.utime(out / ".lock", (time.time() - age, time.time() - age))


def test_a_run_on_another_machine_is_known_by_its_heartbeat(tmp_path):
    """Which one that was killed no longer has."""
    other_machine(tmp_path / "a", age=folder.STALE - 20)
    with pytest.raises(ValueError, match=r"in use 4\d seconds ago \(process 7 on elsewhere\)"):
        folder.Lock(tmp_path / "a").take()
    other_machine(tmp_path / "b", age=folder.STALE + 1)
    with folder.Lock(tmp_path / "b") as lock:
        assert json.loads(lock.path.read_text())[1] == os.getpid()
        lock.release()


@pytest.mark.parametrize("system", ["Windows", "disk"])
def test_without_locks_the_heartbeat_counts(tmp_path, monkeypatch, system):
    def refuse(*words):
        raise OSError("Function not implemented")

    if system == "Windows":
        monkeypatch.setattr(folder, "fcntl", None)
    else:
        monkeypatch.setattr(folder.fcntl, "lockf", refuse)
    monkeypatch.setattr(folder, "HEARTBEAT", 0.01)
    first, second = folder.Lock(tmp_path), folder.Lock(tmp_path)
    first.take()
    os.utime(first.path, (0, 0))
    deadline = time.monotonic() + 5
    while first.path.stat().st_mtime == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    with pytest.raises(ValueError, match="if that was killed, it is free after 60 seconds"):
        second.take()
    first.release()
    second.take()
    second.release()


def test_a_lock_that_stays_after_its_run_holds_nothing(tmp_path, monkeypatch):
    """Windows knows no os.pread, and removes no file that is open."""
    def refuse(path):
        raise PermissionError("used by another process")

    monkeypatch.setattr(folder, "fcntl", None)
    monkeypatch.delattr(os, "pread")
    first, second = folder.Lock(tmp_path), folder.Lock(tmp_path)
    first.take()
    with pytest.raises(ValueError, match=f"process {os.getpid()}"):
        second.take()
    with monkeypatch.context() as windows:
        windows.setattr(type(first.path), "unlink", refuse)
        first.release()
    assert first.path.exists()
    second.take()
    assert json.loads(second.path.read_text())[1] == os.getpid()
    second.release()


def test_what_is_refused_leaves_no_lock(tmp_path):
    with pytest.raises(KeyError), folder.Lock(tmp_path):
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_a_lock_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError):
        folder.Lock(tmp_path / "run").take()
    assert (tmp_path / "victim").read_text() == "mine"


def test_text_is_written_whole_or_not_at_all_and_through_no_link(tmp_path):
    victim, path = tmp_path / "victim", tmp_path / "a.txt"
    victim.write_text("mine")
    path.symlink_to(victim)
    folder.temporary(path).symlink_to(victim)
    folder.write_text(path, "new")
    assert (path.read_text(), victim.read_text()) == ("new", "mine") and not path.is_symlink()
    with pytest.raises(UnicodeEncodeError):
        folder.write_text(path, "half \ud800")
    assert path.read_text() == "new" and sorted(p.name for p in tmp_path.iterdir()) == ["a.txt", "victim"]


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "file")
    for name in ("file", "link", "missing"):
        folder.require_regular(tmp_path / name)
    for name in ("pipe", "device"):
        with pytest.raises(ValueError, match="not a regular file"):
            folder.require_regular(tmp_path / name)
        with pytest.raises(ValueError, match="not a regular file"):
            folder.read_text(tmp_path / name)
    (tmp_path / "file").write_bytes("é\n".encode())
    assert folder.read_text(tmp_path / "file") == "é\n"
    with pytest.raises(ValueError, match="is a link"):
        folder.require_no_link(tmp_path / "link")


def test_two_processes_have_two_temporary_files(tmp_path):
    script = f"""
import sys
sys.path.insert(0, ".")
from pathlib import Path
from common import folder
print(folder.temporary(Path({str(tmp_path / "a.pt")!r})))
"""
    (tmp_path / "name.py").write_text(script)
    _, out, _ = finish(fork(tmp_path / "name.py"))
    assert out.strip().endswith(".tmp") and out.strip() != str(folder.temporary(tmp_path / "a.pt"))
