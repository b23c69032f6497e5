"""Points for what a student hands in, and one line for every failure. It needs the standard library and pytest, because
tools/assign.py copies it, beside an assignment.json, into the folders that it writes. There it is called as

    `python grade.py`                                   by a student: public tests, on the files as they are
    `python grade.py --hand_in DIR [--results FILE]`    by a grader, who has the whole project beside it

The grader reads the files that are to be handed in, and no others. Every question gets a copy of the project, with the
student's functions of that question grafted in: a mistake costs its own points and no others. The last question takes
the files as they are. Every question has a process of its own, which guarded.py watches, and which ends in time.
"""

import argparse
import ast
import concurrent.futures
import contextlib
import functools
import json
import os
import re
import shutil
import signal
import site
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
MAX_SOURCE, MAX_OUTPUT = 500_000, 100_000  # bytes that a hand-in may have, and may print
IMPORTS = (ast.Import, ast.ImportFrom)
REFUSED = 97  # exit code of guarded.py where it stopped a process


class Unreadable(ValueError):
    """Says in a line why a hand-in cannot be graded."""


# ---------------------------------------- The student's functions in the project's file

def definitions(tree, prefix=""):
    """{name: node} of all functions and classes; those of a class have its name in front, as in MAE.mask."""
    found = {}
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[prefix + node.name] = node
            if isinstance(node, ast.ClassDef):
                found |= definitions(node, f"{prefix}{node.name}.")
    return found


def span(node):
    """(first, last): lines[first:last] are the node, with its decorators."""
    first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
    return first - 1, node.end_lineno


def made_by(node):
    """Names of the function, class or variables that a statement makes."""
    if isinstance(node, ast.Assign):
        return {ast.unparse(target) for target in node.targets}
    if isinstance(node, ast.AnnAssign):
        return {ast.unparse(node.target)}
    return {node.name} if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else set()


def additions(ours, theirs, end, holes, prefix=""):
    """[(place, column, node)] of functions, classes and variables that the body `theirs` alone has, last first. They go
    in front of the line `place`, the next definition that both have, or `end`: they may be needed there, and may need
    what stands above."""
    known = {node.name: node for node in ours if hasattr(node, "name")}
    names, place, found = set().union(*map(made_by, ours)), end, []
    for node in reversed(theirs):
        if not made_by(node) & names:
            found += [(place, ours[0].col_offset, node)] * bool(made_by(node))
        elif getattr(node, "name", None) in known:
            own, name = known[node.name], prefix + node.name
            place = span(own)[0]
            if isinstance(own, ast.ClassDef) and isinstance(node, ast.ClassDef) and name not in holes:
                found += additions(own.body, node.body, own.end_lineno, holes, f"{name}.")
    return found


def moved(lines, old, new):
    """Lines of a statement that began in column `old`, for column `new`. What stands further left stays there."""
    return [line if line[:old].strip() or not line.strip() else " " * new + line[old:] for line in lines]


def graft(solution, hand_in, holes):
    """The text `solution` with the functions `holes` of the text `hand_in`, and with imports, helpers and variables
    that only the student has. Unreadable if a hole is gone; SyntaxError."""
    ours, theirs = ast.parse(solution), ast.parse(hand_in)
    known, given = definitions(ours), definitions(theirs)
    lines, new = solution.split("\n"), hand_in.split("\n")  # splitlines would count form feeds, too
    edits = []  # (first, last, what comes in their place)
    for hole in holes:
        if hole not in given:
            raise Unreadable(f"there is no {hole} any more")
        first, last = span(given[hole])
        edits.append((*span(known[hole]), moved(new[first:last], given[hole].col_offset, known[hole].col_offset)))

    imports = [node for node in ours.body if isinstance(node, IMPORTS)]
    extra = [(imports[-1].end_lineno, 0, node) for node in theirs.body
             if isinstance(node, IMPORTS) and getattr(node, "module", "") != "__future__"]
    inserted = {}  # {place: lines}
    for place, column, node in extra + additions(ours.body, theirs.body, len(lines), holes)[::-1]:
        first, last = span(node)
        inserted.setdefault(place, []).extend(moved(new[first:last], node.col_offset, column))
    edits += [(place, place, text) for place, text in inserted.items()]
    for first, last, text in sorted(edits, key=lambda edit: edit[:2], reverse=True):  # a hole, then what precedes it
        lines[first:last] = text
    text = "\n".join(lines) + "\n"
    ast.parse(text)
    return text


@contextlib.contextmanager
def readable(name):
    """What Python's parser refuses in a file of this name becomes Unreadable."""
    try:
        yield
    except SyntaxError as error:
        raise Unreadable(f"{name}: line {error.lineno} is not Python: {error.msg}") from None
    except (RecursionError, MemoryError):
        raise Unreadable(f"{name}: what is in it is nested too deeply") from None


def read(hand_in, name):
    """The text of a file of the hand-in, in its folder or, as an upload may have it, without. Unreadable, if it is."""
    for path in (hand_in / name, hand_in / Path(name).name):
        if path.is_file() and not path.is_symlink():
            if path.stat().st_size > MAX_SOURCE:
                raise Unreadable(f"{name} is larger than {MAX_SOURCE // 1000} kB")
            try:
                return path.read_text(encoding="utf-8-sig")  # some editors begin a file with a mark
            except UnicodeDecodeError:
                raise Unreadable(f"{name} is not UTF-8 text") from None
    raise Unreadable(f"{name} is not there")


def prepare(assignment, question, hand_in, folder):
    """The project in folder/project, as this question wants it. Unreadable about the hand-in."""
    whole = HERE / "project"  # a student has none, and this folder instead
    skipped = shutil.ignore_patterns(".*", "__pycache__", "runs", "data")
    shutil.copytree(whole if whole.exists() else HERE, folder / "project", ignore=skipped)
    for name in assignment["hand_in"]:
        path, holes = folder / "project" / name, question.get("holes", {}).get(name, [])
        grafts = whole.exists() and "holes" in question
        # A file that has nothing of this question, and cannot be read, is the solution's.
        with contextlib.suppress(*[Unreadable] * (grafts and not holes)), readable(name):
            text = read(hand_in, name)
            ast.parse(text)
            text = graft(path.read_text(encoding="utf-8"), text, holes) if grafts else text
            path.write_text(text, encoding="utf-8")
    (folder / "out").mkdir()
    shutil.copy(Path(__file__).with_name("guarded.py"), folder)
    job = {"runs": question["runs"], **{name: assignment[name] for name in ("seconds", "imports")}}
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")


# ---------------------------------------- In the grader

@functools.cache
def nobody():
    """How Popen gives up root's rights, which no hand-in is to have; {} without them, or if nobody cannot run this."""
    if os.name != "posix" or os.geteuid() != 0:
        return {}
    rights = {"user": "nobody", "group": "nogroup" if sys.platform == "linux" else "nobody", "extra_groups": []}
    try:
        subprocess.run([sys.executable, "-c", "import pytest"], check=True, cwd="/", capture_output=True, **rights)
    except (OSError, KeyError, ValueError, subprocess.CalledProcessError):
        if (HERE / "project").exists():  # a student grades what is his own
            print("note: hand-ins run with the rights of root, because user nobody cannot run this Python")
        return {}
    return rights


def start(folder, output):
    """The process of a question, in a session of its own."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "SYSTEMROOT") if name in os.environ}
    out = str(folder / "out")
    env = {**kept, "HOME": out, "TMPDIR": out, "TEMP": out, "PYTHONUSERBASE": site.getuserbase(),
           "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, str(folder / "guarded.py"), str(folder)], env=env, cwd=folder,
                            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
                            **nobody())


def run(folder, seconds):
    """(report, None), or (None, what the process did wrong) if it did not come to its end."""
    with open(folder / "output", "wb") as output:
        process = start(folder, output)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL) if os.name == "posix" else process.kill()
            process.wait()
    printed = (folder / "output").stat().st_size
    if code is None:
        return None, f"it took longer than {seconds} seconds: a loop that never ends?"
    if printed > MAX_OUTPUT:
        return None, f"it printed {printed // 1000} kB, and may print {MAX_OUTPUT // 1000}: remove the print"
    if code == REFUSED:
        return None, f"stopped, because it must not do this: {(folder / 'out' / 'refused').read_text(errors='replace')}"
    try:
        return json.loads((folder / "out" / "report.json").read_text(encoding="utf-8")), None
    except (OSError, ValueError):
        return None, f"Python ended before the tests did, with code {code}: exit, or too much memory?"


def friendly(name, message, hidden):
    """One line for a failed test: its name in words and, of one that students have, the first line of what it said."""
    title = re.sub(r"^test_", "", name.rpartition("::")[2]).replace("_", " ")
    if name in hidden:
        return f"{title} (a hidden test)"
    first = (message.splitlines() or [""])[0].removeprefix("AssertionError: ")
    return f"{title}: {first[:120]}"


def points(question, report):
    """(points, lines). All tests of a question must pass; in a bug hunt the share of mistakes that are found counts,
    but a test that fails because it runs again finds nothing."""
    if report["errors"]:
        return 0, [f"the file cannot be imported: {report['errors'][0][:150]}"]
    runs = list(zip(question["runs"], report["reports"], strict=True))
    right, *again = [found for run, found in runs if not run["changes"]]
    wrong = [found for run, found in runs if run["changes"]]
    messages = right["failed"].values()
    if messages and all("NotImplementedError" in message for message in messages):
        names = set(re.findall(r"NotImplementedError\W*(\w+)", " ".join(messages)))
        own = {hole.rpartition(".")[2] for holes in question.get("holes", {}).values() for hole in holes}
        others = ", ".join(sorted(names - own))
        return 0, [f"not written yet, or in need of {others}, which is not" if others else "not written yet"]
    lines = [friendly(name, message, question.get("hidden", [])) for name, message in right["failed"].items()]
    expected, ran = question["runs"][0]["tests"], {*right["passed"], *right["failed"]}
    lines += [f"{name} did not run" for name in expected or [] if name not in ran]
    if not right["passed"] and not lines:
        lines.append("there is no test in it")
    if not lines and any(found["failed"] for found in again):
        lines.append("your tests fail on right code when they run again")
    if lines or not wrong:
        return 0 if lines else question["points"], lines
    caught = sum(bool(mistake["failed"]) for mistake in wrong)
    note = [] if caught == len(wrong) else [f"{len(wrong) - caught} of {len(wrong)} mistakes pass your tests"]
    return question["points"] * caught // len(wrong), note


def mark(assignment, question, hand_in):
    """What Gradescope wants to know of a question: {"name", "score", "max_score", "output"}."""
    folder, score = Path(tempfile.mkdtemp(prefix="grade_")), 0
    try:
        prepare(assignment, question, hand_in, folder)
        if nobody():  # of whom it must be readable, and out be writable
            folder.chmod(0o755)
            shutil.chown(folder / "out", "nobody")
        report, line = run(folder, assignment["seconds"])
        if report is None:
            lines = [line]
        else:
            score, lines = points(question, report)
    except Unreadable as error:
        lines = [str(error)]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {"name": question["name"], "score": score, "max_score": question["points"], "output": "\n".join(lines)}


def grade(assignment, hand_in, workers=2):
    """The marks of all questions, `workers` at a time."""
    nobody()  # once, ahead of the threads
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        return list(pool.map(lambda question: mark(assignment, question, hand_in), assignment["questions"]))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hand_in", type=Path, default=HERE, help="folder of what was handed in")
    parser.add_argument("--results", type=Path, help="write them here, as Gradescope wants them")
    args = parser.parse_args(argv)
    began = time.time()
    assignment = json.loads((HERE / "assignment.json").read_text(encoding="utf-8"))
    marks = grade(assignment, args.hand_in.resolve())
    for each in marks:
        lines = each["output"].splitlines() or [""]
        print(f"{each['name']:<26} {each['score']:>3} of {each['max_score']:<3} {lines[0]}")
        print(*(f"{'':<37} {line}\n" for line in lines[1:]), sep="", end="")
    total, most = (sum(each[key] for each in marks) for key in ("score", "max_score"))
    print(f"{'total':<26} {total:>3} of {most:<3} {assignment['note']}")
    if args.results:
        result = {"tests": marks, "execution_time": round(time.time() - began), "stdout_visibility": "hidden"}
        args.results.write_text(json.dumps(result, indent=1), encoding="utf-8")
    raise SystemExit(0 if args.results or total == most else 1)


if __name__ == "__main__":
    main()
