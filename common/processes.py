"""Who ends with whom: image-loading processes with their run, and a run with torchrun. And what one does for all."""

import multiprocessing
import os
import signal
import threading
import time
from multiprocessing import connection

import torch.distributed as dist

from common import config

GRACE = 20  # seconds that a run whose torchrun is gone may take to save


def end_with_torchrun():
    """Let this process end when torchrun, its parent, is gone: torchrun ends its processes itself, but not if it is
    killed by SIGKILL. The process is asked first, and so it saves. (On Windows a parent's number never changes.)"""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def of_main(function, *words):
    """What a function returns in the main process of a run, and there alone is it called; all processes get a copy. Its
    ValueError or OSError is raised in all of them, too."""
    if not dist.is_initialized():
        return function(*words)
    outcome = None
    if dist.get_rank() == 0:
        try:
            outcome = function(*words)
        except (ValueError, OSError) as error:
            outcome = error
    sent = [outcome]
    dist.broadcast_object_list(sent)
    if isinstance(sent[0], Exception):
        raise sent[0]
    return sent[0]


def united(own):
    """The entries of a dict, and of those of all other processes, which must call this, too."""
    if not dist.is_initialized():
        return own
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, own)
    return {key: value for part in parts for key, value in part.items()}


def ignore_signals(worker):
    """Ctrl-C and SIGTERM reach a whole process group; the main process decides when workers end."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def iterate(batches):
    """The batches of a DataLoader, whose workers end with this generator: they ignore the signal that multiprocessing
    ends them by, and may hang themselves. Exits with code 2 if one of them was killed."""
    before, workers = multiprocessing.active_children(), []
    try:
        with config.user_errors():  # no more processes may be started
            iterator = iter(batches)
        workers = [process for process in multiprocessing.active_children() if process not in before]
        # torch raises as soon as a worker has died, at whatever line its run is: in a save, too. Without that it
        # raises, within five seconds, where the next batch is waited for.
        if workers and threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        yield from iterator
    except (RuntimeError, OSError, EOFError):  # what torch says, or what comes of the connection to one that is gone
        ended = connection.wait([process.sentinel for process in workers], timeout=1)
        if not ended:
            raise
        config.fail("an image-loading process was killed, maybe for want of memory: fewer --workers need less; what "
                    "was saved is intact, and --resume goes on from there", everywhere=True)
    finally:
        end(workers)


def end_workers():
    """End what `iterate` has started, also where an exception keeps it from being closed: in its traceback."""
    end([process for process in multiprocessing.active_children() if process.daemon])


def end(workers):
    for process in workers:
        process.kill()
    for process in workers:
        process.join()
