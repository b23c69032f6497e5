"""A run's folder: one run at a time writes to it, and never through a link that leads out of it."""

import contextlib
import json
import os
import platform
import threading
import time
import weakref
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None

HEARTBEAT = 10  # seconds between signs of life of a run that holds a folder
STALE = 60  # seconds without one, after which a run on another machine counts as killed


class Lock:
    """OUT/.lock, held by the process of one run until it ends, however that is. As a context it is taken, and released
    again if what is inside is refused.

    The system knows who holds it. On a disk that several machines share it may not know of other machines: so the file
    names host and process, and is touched every HEARTBEAT seconds.
    """

    def __init__(self, folder):
        self.path = Path(folder) / ".lock"
        self.finalizer = None  # while it is held; runs when this object or the process ends

    def __enter__(self):
        if self.finalizer is None:
            self.take()
        return self

    def __exit__(self, kind, error, traceback):
        if error is not None:
            self.release()

    def take(self):
        """Make the folder and the lock. ValueError if another run holds it, OSError if that cannot be written."""
        folder = self.path.parent
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"--out {folder} is a file")
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            require_free(folder, descriptor)
            if not is_at(descriptor, self.path):  # whoever held it has just released and removed it
                raise ValueError(f"--out {folder} was in use by another run until now: try again")
            os.ftruncate(descriptor, 0)
            os.lseek(descriptor, 0, os.SEEK_SET)
            os.write(descriptor, json.dumps([platform.node(), os.getpid()]).encode())
        except (OSError, ValueError):
            os.close(descriptor)
            raise
        released = threading.Event()
        threading.Thread(target=beat, args=(self.path, released), daemon=True).start()
        self.finalizer = weakref.finalize(self, release, self.path, descriptor, released)

    def release(self):
        if self.finalizer is not None:
            self.finalizer()
        self.finalizer = None


def require_free(folder, descriptor):
    """Lock the open file. ValueError if another process has, or if one on another machine was alive just now."""
    try:
        is_locked = lock(descriptor)
    except BlockingIOError:
        host, process = holder(descriptor)
        raise ValueError(f"--out {folder} is in use by another run (process {process} on {host})") from None
    host, process = holder(descriptor)
    age = time.time() - os.fstat(descriptor).st_mtime
    is_here = is_locked and host == platform.node()  # then it was killed, or else it would have the lock
    if process and not is_here and age < STALE:
        raise ValueError(f"--out {folder} was in use {age:.0f} seconds ago (process {process} on {host}); "
                         f"if that was killed, it is free after {STALE} seconds")


def beat(path, released):
    while not released.wait(HEARTBEAT):
        with contextlib.suppress(OSError):  # a disk that is away for a moment
            os.utime(path)


def release(path, descriptor, released):
    released.set()
    with contextlib.suppress(OSError):  # the folder may be gone
        if is_at(descriptor, path):
            os.ftruncate(descriptor, 0)  # it names nobody, where it stays: Windows removes no open file
            path.unlink()
    os.close(descriptor)


def lock(descriptor):
    """Lock an open file, unless its disk knows no locks: does it? BlockingIOError if another process has. (By lockf:
    other than with flock, processes that this one has forked do not hold it any longer than this one.)"""
    if fcntl is None:
        return False
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # the systems differ
        raise BlockingIOError from None
    except OSError:
        return False
    return True


def holder(descriptor):
    """(host, process) that the file of a lock names, or two Nones."""
    try:
        os.lseek(descriptor, 0, os.SEEK_SET)
        host, process = json.loads(os.read(descriptor, 1000))
        return str(host), int(process)
    except (ValueError, TypeError):  # empty, or somebody else's
        return None, None


def is_at(descriptor, path):
    return path.exists() and os.path.samestat(os.fstat(descriptor), path.stat())


# ---------------------------------------- Files

def require_regular(path):
    """ValueError if this is there and no regular file: reading a pipe or a device may never end."""
    if os.path.lexists(path) and not os.path.isfile(path):
        raise ValueError(f"{path} is not a regular file")


def read_text(path):
    """A text file in UTF-8. ValueError if it is none, or no regular file; OSError."""
    require_regular(path)
    return Path(path).read_text(encoding="utf-8")


def require_no_link(path):
    """ValueError if this is a link, which leads anywhere, or a pipe, a device, a socket."""
    if path.is_symlink() or (path.exists() and not path.is_dir() and not path.is_file()):
        raise ValueError(f"{path} is a link, or no regular file; a run writes to files of its own")


def no_links(path, flags):
    """An `opener` of `open` that follows no link."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def temporary(path):
    """The name, which no other process takes, of a file that will become `path`."""
    return path.with_name(f"{path.name}.{platform.node()}-{os.getpid()}.tmp")


@contextlib.contextmanager
def replacing(path):
    """The name of a new file that takes the place of `path` at the end of this context, unless that fails."""
    part = temporary(Path(path))
    part.unlink(missing_ok=True)
    try:
        yield part
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_text(path, text):
    """Write a file whole or not at all."""
    with replacing(path) as part, open(part, "x", encoding="utf-8") as file:  # never through a link
        file.write(text)
