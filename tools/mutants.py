"""Do the tests notice mistakes? Each one in tests/mutants.yaml is made, and its tests run until one fails.

    python -m tools.mutants                         # or: make mutants; to runs/mutants/mutants.json
    python -m tools.mutants --only "simmim loss"    # those whose file, name or tests have all the words

Test files are read once. Each mistake is made in a fork, and its tests run in an order that finds it soon: first those
that saw a mistake in the same file before. A test counts only if it passes without the mistake.
"""

import argparse
import collections
import json
import multiprocessing
import os
import shlex
import shutil
import sys
import tempfile
import time
from multiprocessing import connection
from pathlib import Path

import pytest
import torch
import yaml

from common import config
from tools import guarded, runner, trials

SECONDS = 400  # that a fork may take; one that hangs shows nothing


class Trial:
    """Some of the collected tests, run in a fork on changed code, or with no change to see that they pass."""

    def __init__(self, items, changes, folder):
        self.folder = Path(tempfile.mkdtemp(dir=folder))
        self.late = time.monotonic() + SECONDS
        forks = multiprocessing.get_context("fork")
        self.process = forks.Process(target=run_tests, args=(items, changes, self.folder))
        self.process.start()

    def has_ended(self):
        if self.process.is_alive() and time.monotonic() > self.late:
            self.process.kill()
            self.process.join()
        return not self.process.is_alive()

    def failed(self):
        """{name of a test: its last words}; `None` is the name if there is no report: the fork hung, or died."""
        report = self.folder / "report.json"
        found = json.loads(report.read_text()) if report.exists() else {None: f"exit code {self.process.exitcode}"}
        shutil.rmtree(self.folder)
        return found


def run_tests(items, changes, folder):
    """In a fork: write folder/report.json."""
    os.setsid()
    os.environ["PYTEST_DEBUG_TEMPROOT"] = str(folder)  # of tmp_path
    with open(folder / "output.txt", "w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    trials.COMMANDS = trials.begin()  # two forks must not write to one socket
    session, hooks = items[0].session, items[0].config.pluginmanager
    runs = guarded.Runs([{"tests": None, "changes": changes}])
    hooks.register(runs)
    session.items = items
    runs.pytest_runtestloop(session)
    (folder / "report.json").write_text(json.dumps(runs.report["failed"]))


class Trials:
    """A pytest plugin: makes every mutant once all tests are collected. found: {name of a mutant: (test or None)}."""

    def __init__(self, mutants, jobs, tell):
        self.mutants, self.jobs, self.tell = mutants, jobs, tell
        self.found, self.seen, self.errors = {}, collections.defaultdict(list), []

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session):
        self.items = list(session.items)
        with tempfile.TemporaryDirectory(prefix="mutants_") as folder:
            self.make_all(folder)
        return True

    def pytest_collectreport(self, report):
        if report.failed:
            self.errors.append(f"{report.nodeid} cannot be read: {report.longrepr}")

    def make_all(self, folder):
        waiting, running, passing = list(self.mutants), {}, {}
        while waiting or running:
            while waiting and len(running) < self.jobs:
                mutant = waiting.pop(0)
                change = {key: mutant[key] for key in ("file", "old", "new")}
                change["function"] = mutant["name"].partition(" ")[0]
                running[Trial(self.in_order(mutant), [change], folder)] = mutant
            connection.wait([trial.process.sentinel for trial in running], timeout=5)
            for trial in [trial for trial in running if trial.has_ended()]:
                mutant = running.pop(trial)
                failed = trial.failed()
                test = next(iter(failed), None)
                if test and self.passes_without(test, passing, folder):
                    self.seen[mutant["file"]].insert(0, test)
                elif test:
                    self.errors.append(f"{test} fails without a mistake, too: {passing[test][test]}")
                    test = None
                self.found[mutant["name"]] = {"caught_by": test, "harmless": "harmless" in mutant}
                if None in failed:
                    self.found[mutant["name"]]["ended"] = failed[None]
                self.tell(mutant, self.found[mutant["name"]])

    def in_order(self, mutant):
        """The tests of a mutant: those that saw one in its file, the latest first, then its test files in turn."""
        seen = self.seen[mutant["file"]]

        def place(item):
            name = name_of(item)
            return (0, seen.index(name)) if name in seen else (1, mutant["tests"].index(file_of(item)))

        return sorted([item for item in self.items if file_of(item) in mutant["tests"]], key=place)

    def passes_without(self, test, passing, folder):
        """Does a test pass on the code as it is? It is run once."""
        if test not in passing:
            trial = Trial([item for item in self.items if name_of(item) == test], [], folder)
            while not trial.has_ended():
                connection.wait([trial.process.sentinel], timeout=5)
            passing[test] = trial.failed()
        return not passing[test]


def name_of(item):
    return item.nodeid.partition("[")[0]


def file_of(item):
    return item.nodeid.partition("::")[0]


def summary(found):
    """One line, and {file: "caught of all"} of the mutants that are not harmless."""
    counted = {name: row for name, row in found.items() if not row["harmless"]}
    survivors = [name for name, row in counted.items() if not row["caught_by"]]
    caught = len(counted) - len(survivors)
    line = f"caught {caught} of {len(counted)} that are not harmless; survivors: {', '.join(survivors) or 'none'}"
    if harmful := [name for name, row in found.items() if row["harmless"] and row["caught_by"]]:
        line += f"; called harmless, and caught: {', '.join(harmful)}"
    return line


def by_file(found, mutants):
    """{file: {"caught": "n of m"}} of the mutants that are not harmless."""
    rows = {}
    for mutant in mutants:
        row = found.get(mutant["name"])
        if row and not row["harmless"]:
            rows.setdefault(mutant["file"], []).append(row["caught_by"] is not None)
    return {file: {"caught": f"{sum(caught)} of {len(caught)}"} for file, caught in rows.items()}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="WORDS", help="mutants whose file, name and tests have all")
    parser.add_argument("--jobs", type=int, default=runner.CORES, help="forks at a time")
    parser.add_argument("--json", type=Path, default=Path("runs/mutants/mutants.json"), help="file of the numbers")
    args = parser.parse_args(argv)
    known = yaml.safe_load((config.ROOT / "tests" / "mutants.yaml").read_text(encoding="utf-8"))
    mutants = [mutant for mutant in known if all(word.lower() in " ".join(
        [mutant["file"], mutant["name"], *mutant["tests"]]).lower() for word in args.only.split())]
    if not mutants:
        config.fail(f"--only {args.only}: no mistake in tests/mutants.yaml has all these words")

    path = args.json.resolve()
    command = f"python -m tools.mutants {shlex.join(map(str, sys.argv[1:] if argv is None else argv))}".strip()
    before = json.loads(path.read_text()) if path.exists() and args.only else {"commands": [], "mutants": {}}
    names = [mutant["name"] for mutant in known]
    rows = {name: row for name, row in before["mutants"].items() if name in names}
    record = runner.new_record("mutants", [*before["commands"], command], [], mutants=rows)

    def tell(mutant, row):
        rows[mutant["name"]] = row
        record["results"] = {"mistakes in": by_file(rows, known)}
        runner.write(path, record)
        print(f"{mutant['file']}: {mutant['name']}: {row['caught_by'] or 'not caught'}", flush=True)

    os.chdir(config.ROOT)
    torch.set_num_threads(1)
    trying = Trials(mutants, args.jobs, tell)
    files = dict.fromkeys(test for mutant in mutants for test in mutant["tests"])
    pytest.main(["-s", "-p", "no:cacheprovider", "-p", "no:terminal", *files], plugins=[trying])
    if trying.errors:
        config.fail("; ".join(trying.errors))
    config.print_once(f"\n{summary(trying.found)}\n\nnumbers  {args.json}")


if __name__ == "__main__":
    main()
