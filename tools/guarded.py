"""The process of one question, which tools/grade.py starts: run tests on code that nobody has read.

    `python guarded.py FOLDER`    FOLDER/job.json, on the project in FOLDER/project, to FOLDER/out/report.json
"""

import contextlib
import functools
import importlib
import inspect
import json
import os
import sys
from pathlib import Path

import pytest

try:
    import resource
except ImportError:  # Windows
    resource = None

REFUSED = 97  # exit code of a process that tried what it must not

NEVER = {"os.exec", "os.fork", "os.forkpty", "os.kill", "os.killpg", "os.posix_spawn", "os.spawn", "os.startfile",
         "os.system", "pty.spawn", "signal.pthread_kill", "socket.bind", "socket.connect", "subprocess.Popen"}
# Events, and where among their arguments a path stands, and the open folder in which it begins if it is relative
CHANGES = {"open": [(0, None)], "os.chmod": [(0, 2)], "os.chown": [(0, 3)], "os.link": [(0, 2), (1, 3)],
           "os.mkdir": [(0, 2)], "os.remove": [(0, 1)], "os.rename": [(0, 2), (1, 3)], "os.rmdir": [(0, 1)],
           "os.symlink": [(0, None), (1, 2)], "os.truncate": [(0, None)], "os.utime": [(0, 3)],
           "shutil.move": [(0, None), (1, None)], "shutil.rmtree": [(0, 1)]}


def guard(folder, seconds):
    """Whatever is imported from here on may change files in folder/out alone, start no process, end none, and open no
    connection: the first try ends this process. Memory, size of files and time are limited, too, where the system can.
    This stops mistakes and pranks. It is no wall: native code is not watched."""
    limits = {"RLIMIT_DATA": 6 << 30, "RLIMIT_FSIZE": 8 << 20, "RLIMIT_CPU": 2 * seconds} if resource else {}
    for name, most in limits.items():
        with contextlib.suppress(ValueError):  # it is lower already
            resource.setrlimit(getattr(resource, name), (most, most))
    allowed = os.path.realpath(folder / "out")
    note = os.open(os.path.join(allowed, "refused"), os.O_WRONLY | os.O_CREAT)
    writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

    def refuse(event, *args):
        os.write(note, " ".join([event, *map(str, args)])[:200].encode())
        os._exit(REFUSED)

    def hook(event, args):
        if event in NEVER:
            refuse(event)
        for place, folder_place in CHANGES.get(event, []):
            path, folder = args[place], args[folder_place] if folder_place in range(len(args)) else None
            if isinstance(path, int):  # of a file that is open; where it is written, it was opened for that
                if event in ("open", "os.truncate"):
                    continue
                path = f"/dev/fd/{path}"
            path = os.fsdecode(path)
            is_relative = not os.path.isabs(path)
            leads_up = is_relative and os.pardir in Path(path).parts
            only_reads = event == "open" and not args[2] & writes
            if path == os.devnull or (only_reads and not leads_up and not os.path.isdir(path)):
                continue
            # No folder outside is ever opened, so what begins in an open one lies inside, unless it leads up. `open`
            # does not tell whether a relative path begins in one: there, and in a link, none may lead up.
            begins_inside = is_relative and folder not in (-1, None)
            full = os.path.realpath(path)
            if leads_up or not (begins_inside or os.path.commonpath([full, allowed]) == allowed):
                refuse(event, full)

    sys.addaudithook(hook)


def code_of(code, name):
    """The code of a function in that of its file."""
    for constant in code.co_consts:
        if inspect.iscode(constant):
            found = constant if constant.co_qualname == name else code_of(constant, name)
            if found:
                return found
    return None


@contextlib.contextmanager
def changed(changes):
    """In the functions {"file", "function", "old", "new"}, the text `old` is `new`: in place, whoever holds them."""
    kept = []
    for change in changes:
        text = Path(change["file"]).read_text(encoding="utf-8").replace(change["old"], change["new"])
        module = importlib.import_module(change["file"].removesuffix(".py").replace("/", "."))
        function = inspect.unwrap(functools.reduce(getattr, change["function"].split("."), module))
        kept.append((function, function.__code__))
        function.__code__ = code_of(compile(text, change["file"], "exec"), change["function"])
    try:
        yield
    finally:
        for function, code in kept:
            function.__code__ = code


class Runs:
    """A pytest plugin: runs [{"tests", "changes"}], where tests end at the first failure if there are changes."""

    def __init__(self, runs):
        self.runs, self.reports, self.errors = runs, [], []

    def pytest_runtestloop(self, session):
        for run in self.runs:
            self.report = {"failed": {}, "passed": []}
            self.reports.append(self.report)
            with changed(run["changes"]):
                for item in session.items:
                    name = item.nodeid.partition("[")[0]
                    if run["tests"] is None or name in run["tests"]:
                        item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
                    if run["changes"] and self.report["failed"]:
                        break
        return True

    def pytest_runtest_logreport(self, report):
        name = report.nodeid.partition("[")[0]
        if report.outcome != "passed":
            crash = getattr(report.longrepr, "reprcrash", None)
            self.report["failed"].setdefault(name, crash.message if crash else "skipped")
        elif report.when == "call" and name not in self.report["passed"]:
            self.report["passed"].append(name)

    def pytest_collectreport(self, report):
        if report.failed:
            lines = [line for line in str(report.longrepr).splitlines() if line.startswith("E  ")]
            self.errors.append(lines[-1][1:].strip() if lines else str(report.longrepr)[-200:])


def child(folder):
    """Run folder/job.json; folder/out/report.json is there only if all of it ran to its end."""
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    os.chdir(folder / "project")
    sys.path[0] = str(folder / "project")
    for name in job["imports"]:  # ahead of the guard: libraries ask other programs about the machine
        importlib.import_module(name)
    guard(folder, job["seconds"])
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # what else is installed here has no say
    plugin = Runs(job["runs"])
    pytest.main(["-s", "-p", "no:cacheprovider", "-p", "no:terminal", "-p", "no:unraisableexception", "--rootdir", ".",
                 "-c", os.devnull, f"--basetemp={folder / 'out' / 'tmp'}", "tests"], plugins=[plugin])
    report = {"reports": plugin.reports, "errors": plugin.errors}
    (folder / "out" / "report.json").write_text(json.dumps(report), encoding="utf-8")


if __name__ == "__main__":
    child(Path(sys.argv[1]))
