"""One queue for everything that is measured, one writer of records, one writer of tables.

A job is a command of the project, such as `python mae.py --config configs/tiny.yaml --out runs/mae --resume`. As many
run at a time as there are cores, each with one thread, in a fork of this process: importing torch takes longer than
many a job. What a job prints goes to OUT/output.txt. When it has ended well, OUT/ended.txt holds its command, and it is
not run again unless it says --overwrite. A job that fails ends all others; so does Ctrl-C.
"""

import dataclasses
import json
import multiprocessing
import os
import platform
import re
import shlex
import signal
import statistics
import sys
import time
from multiprocessing import connection
from pathlib import Path

import torch
import yaml

import fastmim
import finetune
import lut
import mae
import simmim
import um_mae
from common import config
from common.folder import read_text
from tools import convert, dense

SCRIPTS = {"mae.py": mae, "simmim.py": simmim, "um_mae.py": um_mae, "fastmim.py": fastmim, "lut.py": lut,
           "finetune.py": finetune, "tools.dense": dense, "tools.convert": convert}
PROCESSES = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")  # elsewhere forks are not safe
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


# ---------------------------------------- The queue

@dataclasses.dataclass(frozen=True)
class Job:
    """A command, the folder of what it prints, and the jobs that must have ended before it begins."""
    words: tuple[str, ...]  # behind `python`: mae.py --config ..., or -m tools.dense --config ...
    out: Path
    needs: tuple["Job", ...] = ()

    @property
    def command(self):
        return shlex.join(self.words)

    def ended_before(self):
        ended = self.out / "ended.txt"
        return "--overwrite" not in self.words and ended.exists() and ended.read_text() == self.command


def training(command, *words, out, needs=(), again="--resume"):
    """The job of a script that trains, in the folder that is its --out."""
    words = [*command.split(), *words, "--out", out, again]
    return Job(tuple(map(str, words)), Path(out), tuple(needs))


def with_needs(jobs):
    """The jobs, each once, every one behind what it needs."""
    found = {}  # a dict keeps the order
    for job in jobs:
        found |= dict.fromkeys([*with_needs(job.needs), job])
    return list(found)


def start(job):
    config.print_once(f"          python {job.command}")
    job.out.mkdir(parents=True, exist_ok=True)
    (job.out / "ended.txt").unlink(missing_ok=True)
    process = PROCESSES.Process(target=call, args=(job,))
    process.start()
    return process


def call(job):
    """In a process of its own: run a job."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    output = open(job.out / "output.txt", "w", buffering=1)
    os.dup2(output.fileno(), 1)  # for what is not written through sys.stdout
    os.dup2(output.fileno(), 2)
    sys.stdout = sys.stderr = output
    sys.argv = [word for word in job.words if word != "-m"]  # config.yaml keeps it
    os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")  # of processes that it starts
    torch.set_num_threads(1)
    SCRIPTS[sys.argv[0]].main(sys.argv[1:])


def log_of(folder):
    """The lines of a run's log.jsonl, but for one that is being written."""
    *lines, _ = (folder / "log.jsonl").read_text().split("\n")
    return [json.loads(line) for line in lines]


def loss_of(job, since):
    """The last loss in the log of a job, as "step 20, loss 2.43"; "" if it has logged none since that time."""
    try:
        is_new = (job.out / "log.jsonl").stat().st_mtime >= since  # an older one is of an earlier run
        steps = [line for line in log_of(job.out) if "loss" in line] if is_new else []
    except FileNotFoundError:
        return ""
    return f"step {steps[-1]['step']}, loss {number(steps[-1]['loss'])}" if steps else ""


def run(jobs, workers=CORES):
    """Run jobs and what they need. Yields each as soon as it has ended; first those that ended in an earlier call. The
    first loss of each is printed, as a sign of life. SystemExit with the last lines of its output if one fails.
    Whatever ends this generator ends the processes."""
    jobs = with_needs(jobs)
    ended = {job for job in jobs if job.ended_before()}
    yield from [job for job in jobs if job in ended]
    waiting = [job for job in jobs if job not in ended]
    running = {}  # {job: process}
    quiet = {}  # {job: when it began}, those whose log has said nothing yet
    begin = time.monotonic()

    # Signals are only noted: an exception between a fork and its entry in `running` would lose a process.
    caught = []

    def note(number, frame):
        caught.append(number)

    handlers = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while waiting or running:
            ready = [job for job in waiting if ended.issuperset(job.needs)]
            for job in ready[: max(1, workers) - len(running)]:
                quiet[job] = time.time()
                running[job] = start(job)
                waiting.remove(job)

            connection.wait([process.sentinel for process in running.values()], timeout=1)
            if caught:
                raise SystemExit(128 + signal.SIGINT)
            for job in list(quiet):
                if loss := loss_of(job, quiet[job]):
                    config.print_once(f"{time.monotonic() - begin:6.0f} s  {job.out}: {loss}")
                    del quiet[job]
            for job in [job for job in running if running[job].exitcode is not None]:
                if running.pop(job).exitcode:
                    last_lines = (job.out / "output.txt").read_text().splitlines()[-15:]
                    raise SystemExit("\n".join([f"{job.command} failed:", *last_lines]))
                (job.out / "ended.txt").write_text(job.command)
                ended.add(job)
                quiet.pop(job, None)
                yield job
    finally:
        for process in running.values():
            process.terminate()  # the script saves, and ends
        for process in running.values():
            process.join(20)
            while process.is_alive():  # a signal in the first moments of a process may be lost
                process.terminate()
                process.join(1)
        for number, handler in handlers.items():
            signal.signal(number, handler)


# ---------------------------------------- Records

@dataclasses.dataclass(frozen=True)
class Cell:
    """A number: its place in a table, its seed, and the job whose result.json holds it under `key`."""
    title: str
    row: str
    column: str
    seed: int
    job: Job
    key: str = "top1"


def machine(threads):
    path = Path("/proc/cpuinfo")  # of Linux
    info = path.read_text() if path.exists() else ""
    name = re.search("model name.*: (.*)", info)
    return {"processor": name[1] if name else platform.processor() or platform.machine(),
            "bf16_instructions": [flag for flag in ("amx_bf16", "avx512_bf16") if flag in info.split()],
            "torch": torch.__version__, "threads": threads}


def new_record(what, commands, seeds, threads=1, **more):
    """What a file under results/ holds: where its numbers come from, and then the numbers."""
    return {"what": what, "commit": config.git_commit(), "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "machine": machine(threads), "seeds": seeds, "commands": commands, **more}


def write(path, record):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(record, indent=1) + "\n")


def read_json(path):
    """What a JSON file holds. ValueError, which names the file, if it is damaged."""
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from error


def measure(what, cells, path, workers, folders=None):
    """Run the jobs of all cells; print each number and write the record at `path` as soon as it is known. Returns the
    record, with results {title: {row: {column: values}}}: one value for each seed, None until it is known. Runs that
    ended in an earlier call may be of other commits: commits_of_runs names all. `folders` {path: name} are of this
    machine, and the record has their names."""
    begin = time.monotonic()
    seeds = list(dict.fromkeys(cell.seed for cell in cells))
    results = {}
    for cell in cells:
        results.setdefault(cell.title, {}).setdefault(cell.row, {})[cell.column] = [None] * len(seeds)
    of_first_seed = with_needs([cell.job for cell in cells if cell.seed == seeds[0]])
    commands = [f"python {job.command}" for job in of_first_seed]
    for folder, name in (folders or {}).items():
        commands = [command.replace(shlex.quote(str(folder)), name) for command in commands]
    record = new_record(what, commands, seeds, results=results)

    for job in run([cell.job for cell in cells], workers):
        for cell in [cell for cell in cells if cell.job == job]:
            value = json.loads((job.out / "result.json").read_text())[cell.key]
            results[cell.title][cell.row][cell.column][seeds.index(cell.seed)] = value
            name = f"{cell.row}, {cell.column}, seed {cell.seed}"
            config.print_once(f"{time.monotonic() - begin:6.0f} s  {name}: {number(value)}")
        record["commits_of_runs"] = sorted({*record.get("commits_of_runs", []), *commit_of(job)})
        write(path, record)
    return record


def commit_of(job):
    """The commit that a job ran at, in a list; an edit of a checkpoint leaves none."""
    path = job.out / "config.yaml"
    return [yaml.safe_load(path.read_text())["run"]["commit"]] if path.exists() else []


# ---------------------------------------- Tables

def number(value):
    """Three digits, as 57.0, 1.13 or 0.0182, but all of those before the point."""
    return f"{value:#.3g}".rstrip(".") if abs(value) < 999.5 else f"{value:,.0f}"


def cell_text(values):
    """The mean over seeds, with the lowest and the highest if there are several. A string stays as it is."""
    if isinstance(values, str):
        return values
    known = [value for value in values if value is not None]
    notes = []
    if len(known) > 1:
        notes.append(f"{number(min(known))} to {number(max(known))}")
    if len(known) < len(values):
        notes.append(f"{len(known)} of {len(values)} seeds")
    mean = number(statistics.mean(known)) if known else ""
    return f"{mean} ({', '.join(notes)})" if notes else mean


def markdown(title, rows):
    """A markdown table of {row: {column: values}}; a cell that is not there stays empty."""
    columns = list(dict.fromkeys(column for cells in rows.values() for column in cells))
    lines = [f"| {title} | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for row, cells in rows.items():
        texts = [cell_text(cells.get(column, "")) for column in columns]
        lines.append(f"| {row} | {' | '.join(texts)} |")
    return "\n".join(lines)


def by_seed(rows, seeds):
    """The same numbers as {"row, column": {"seed 0": values, ..., "mean": values}}."""
    longer = {}
    for row, cells in rows.items():
        for column, values in cells.items():
            each = {f"seed {seed}": [value] for seed, value in zip(seeds, values, strict=True)}
            longer[f"{row}, {column}"] = {**each, "mean": values}
    return longer
