"""Processes for tests, and for tools that try out runs: real ones, and forks, which begin at once.

Importing torch and the scripts takes some five seconds. So one process, forked when this module is imported and before
any test has changed anything, waits for commands and forks itself for each. What runs in a fork is what a shell would
start: a file as __main__, in the project's folder, in a session of its own.
"""

import atexit
import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from multiprocessing import connection
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
FORKS = multiprocessing.get_context("fork")
torch.set_num_threads(1)


def environment():
    """Of a child process: one thread that sleeps while it waits, none of torchrun's variables."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")}
    return {**kept, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT)}


# Real processes


def start(*words):
    """A Python process with these arguments, in the project's folder, output kept; the caller waits for it."""
    return subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT, env=environment(), text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


def torchrun(world, *words):
    """The words that start a script in `world` processes on this machine, on any free port."""
    return ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", world, *words]


def finish(process, timeout=120):
    """(exit code, stdout, stderr) of a process from `start` or `fork`. One that takes too long is made to end; a real
    one is asked first, because torchrun ends its workers, which are in no group of ours, only when it is asked."""
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        if isinstance(process, subprocess.Popen):
            process.terminate()
            try:
                process.communicate(timeout=20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, stdout, stderr


def children(pid):
    """The processes that a process has started, oldest first. (Of Linux.)"""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for(process, line):
    """Read what a process prints up to a line that starts like this. AssertionError if there is none."""
    for found in process.stdout:
        if found.startswith(line):
            return
    raise AssertionError(f"no {line!r}")


def alive(pids):
    """Those that have not ended (a zombie has)."""
    found = []
    for pid in pids:
        try:
            state = open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            continue
        found += [pid] * (state != "Z")
    return found


def ended_within(seconds, pids):
    """Have all of these processes ended, now or in so many seconds?"""
    deadline = time.monotonic() + seconds
    while alive(pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not alive(pids)


# Forks


class Fork:
    """What `fork` returns: as much of subprocess.Popen as the tests use. `pid` is that of its process group."""

    def __init__(self, words, world):
        self.stderr = tempfile.TemporaryFile("w+")
        stdout, write_stdout = os.pipe()
        status, write_status = os.pipe()
        message = json.dumps({"words": [str(word) for word in words], "world": world}).encode()
        given = [write_stdout, self.stderr.fileno(), write_status]
        socket.send_fds(COMMANDS, [len(message).to_bytes(4, "big")], given)
        COMMANDS.sendall(message)
        os.close(write_stdout)
        os.close(write_status)
        self.words = words
        self.stdout = os.fdopen(stdout)
        self.status = os.fdopen(status)
        self.pid = int(self.status.readline())
        self.returncode = None

    def communicate(self, timeout):
        """(stdout, stderr), when all of its processes have ended. When time is up it is killed."""
        late = threading.Event()

        def kill():
            late.set()
            os.killpg(self.pid, signal.SIGKILL)

        timer = threading.Timer(timeout, kill)
        timer.start()
        stdout = self.stdout.read()
        code = self.status.readline()
        timer.cancel()
        if late.is_set():
            raise subprocess.TimeoutExpired(self.words, timeout)
        self.returncode = int(code or -signal.SIGKILL)
        self.stderr.seek(0)
        return stdout, self.stderr.read()


def fork(*words, world=1):
    """As `start`, without a new Python: words are those behind `python`, a file or -m and a module, and their own. With
    world > 1 as many processes run it, and find each other as under torchrun."""
    return Fork(words, world)


def serve(commands):
    """Run what comes, until whoever sends is gone. Each command has a process that starts its own, and waits."""
    os.setsid()  # Ctrl-C is not for this one
    while True:
        length, descriptors, _, _ = socket.recv_fds(commands, 4, 3)
        multiprocessing.active_children()  # reaps those that have ended
        if not length:
            return
        message = commands.recv(int.from_bytes(length, "big"), socket.MSG_WAITALL)
        FORKS.Process(target=watch, kwargs={**json.loads(message), "descriptors": descriptors}).start()
        for descriptor in descriptors:
            os.close(descriptor)


def watch(words, world, descriptors):
    """In the first process of a new session: start a command `world` times, and write the first exit code but 0."""
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # they are for the command, which is in the same group
    stdout, stderr, status = descriptors
    os.write(status, f"{os.getpid()}\n".encode())

    port = free_port()
    ranks = [FORKS.Process(target=command, args=(words, rank, world, port, stdout, stderr)) for rank in range(world)]
    for process in ranks:
        process.start()
    code, running = 0, list(ranks)
    while running:
        connection.wait([process.sentinel for process in running])
        ended = [process for process in running if process.exitcode is not None]
        for process in ended:
            running.remove(process)
            code = code or process.exitcode
        if code:
            for process in running:
                process.terminate()  # they would wait for the one that has failed
    os.write(status, f"{code}\n".encode())


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def command(words, rank, world, port, stdout, stderr):
    """In a process of its own: run a file as __main__. multiprocessing ends this process, with the right code."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", buffering=1, closefd=False)
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(SURROUNDINGS)
    if world > 1:
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world,
               "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in own.items()})

    if words[0] == "-m":
        words = [words[1].replace(".", "/") + ".py", *words[2:]]
    sys.argv = list(words)
    runpy.run_path(words[0], run_name="__main__")


def begin():
    """Fork the process that waits for commands. Returns the socket that they are sent through."""
    ours, its = socket.socketpair()
    server = os.fork()
    if server == 0:
        code = 1
        try:
            ours.close()
            serve(its)
            code = 0
        finally:
            os._exit(code)  # nothing of pytest's
    its.close()

    def end():
        if os.getpid() == owner:
            ours.close()
            os.waitpid(server, 0)

    owner = os.getpid()
    atexit.register(end)
    return ours


SURROUNDINGS = environment()
COMMANDS = begin()
