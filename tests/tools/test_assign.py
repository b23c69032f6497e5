"""tools/assign.py: assignments that are cut from the files of the project. Their holes, what is left out beside them,
the tests that give points, and the mistakes that these catch.

Everything runs in forks of this process, which has imported torch. Mistakes take minutes, and are left to
`make assignments-check`, but for those of one assignment.
"""

import ast
import difflib
import json
import os
import re
import shutil
import sys
import traceback
import zipfile

import pytest
import yaml
from conftest import ROOT

from tools import assign, grade, guarded

MUTANTS = yaml.safe_load((ROOT / "tests" / "mutants.yaml").read_text())
NUMBERS = range(1, 11)
WITH_HOLES = range(1, 9)
THOROUGH = WITH_HOLES if os.environ.get("ASSIGNMENTS") == "all" else []


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """`built(number)` is the folder of an assignment."""
    folders = {}

    def folder(number):
        if number not in folders:
            folders[number] = tmp_path_factory.mktemp("assignment") / f"{number:02d}"
            assign.build(number, folders[number])
        return folders[number]
    return folder


def python_files(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*.py")}


# Forks


def in_fork(log, function, *arguments):
    """Call a function in a fork, in a session of its own, that knows nothing of this project; what it prints goes to
    the file `log`. Returns the process id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setsid()
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        sys.stdout = sys.stderr = open(1, "w", closefd=False)
        files = [*ROOT.glob("*.py"), *ROOT.glob("tests/**/*.py")]
        rooms = {"common", "tools", *(path.stem for path in files)}
        for name in [name for name in sys.modules if name.partition(".")[0] in rooms]:
            del sys.modules[name]
        sys.path[:] = ["", *(path for path in sys.path if not path.startswith(str(ROOT)) or ".venv" in path)]
        function(*arguments)
        sys.stdout.flush()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def reports(folder, runs):
    """What guarded.py says of runs on the project in folder/project."""
    (folder / "out").mkdir(parents=True)
    (folder / "job.json").write_text(json.dumps({"runs": runs, "seconds": 1000, "imports": []}))
    with open(folder / "log", "w+") as log:
        status = os.waitpid(in_fork(log, guarded.child, folder), 0)[1]
        log.seek(0)
        assert status == 0, log.read()
    report = json.loads((folder / "out" / "report.json").read_text())
    assert not report["errors"], report["errors"]
    return report["reports"]


# Mistakes


def test_every_mutant_is_one_change_of_one_place():
    """Its text is found exactly once, what comes in its place is Python, and its tests exist."""
    sources = {name: (ROOT / name).read_text() for name in {mutant["file"] for mutant in MUTANTS}}
    functions = {name: grade.definitions(ast.parse(source)) for name, source in sources.items()}
    names = [mutant["name"] for mutant in MUTANTS]
    assert len(set(names)) == len(names) > 200
    for mutant in MUTANTS:
        source = sources[mutant["file"]]
        assert source.count(mutant["old"]) == 1 and mutant["new"] != mutant["old"], mutant["name"]
        ast.parse(source.replace(mutant["old"], mutant["new"]))
        assert mutant["tests"] and all((ROOT / path).is_file() for path in mutant["tests"]), mutant["name"]
        first, last = grade.span(functions[mutant["file"]][mutant["name"].partition(" ")[0]])
        assert mutant["old"] in "\n".join(source.splitlines()[first:last]), mutant["name"]


def change(file, function, old, new):
    return {"file": file, "function": function, "old": old, "new": new}


def mistakes_in(holes):
    """The mutants of {file: functions} that a test can see."""
    found = [(mutant, mutant["name"].partition(" ")[0]) for mutant in MUTANTS]
    return [(mutant["name"], change(mutant["file"], function, mutant["old"], mutant["new"]))
            for mutant, function in found
            if function in holes.get(mutant["file"], []) and "harmless" not in mutant]


@pytest.mark.parametrize("number", WITH_HOLES)
def test_each_test_of_a_question_fails_with_its_hole_and_passes_without(number, tmp_path):
    """And of all its tests together, one at least fails with every mistake."""
    assignment = assign.read(number)
    assign.write_project(tmp_path / "project")
    assign.write_tests(assignment, assign.tests_of(assignment, ["public", "hidden"]), tmp_path / "project" / "tests")
    runs, expected = [], []  # names of tests that pass, or None where one must fail
    for question in assignment["questions"]:
        tests = assign.runs_of(assignment, question, ["public", "hidden"])[0]["tests"]
        holes = assign.holes_of(assignment, question)
        empty = []
        for file, names in holes.items():
            text = (ROOT / file).read_text()
            empty += [change(file, name, text, assign.cut(text, [name])) for name in names]
        if empty:
            runs += [{"tests": [test], "changes": empty} for test in tests]
            expected += [(f"{test} without {question['name']}", None) for test in tests]
        if number in THOROUGH:
            mistakes = mistakes_in(holes)
            runs += [{"tests": tests, "changes": []}, *({"tests": tests, "changes": [each]} for _, each in mistakes)]
            expected += [(question["name"], tests), *((name, None) for name, _ in mistakes)]
    wrong = []
    for (name, tests), report in zip(expected, reports(tmp_path, runs), strict=True):
        is_right = bool(report["failed"]) if tests is None else sorted(report["passed"]) == sorted(tests)
        if not is_right or (tests is not None and report["failed"]):
            wrong.append((name, report["failed"]))
    assert not wrong


# What is left out of a student's folder


def words(lines):
    return re.findall(r"\w+|[^\w\s]", "\n".join(lines))


def long_lines(lines):
    return {line for line in lines if len(line) > 30}


def twins_of(holes):
    """{"file:function"} of the project that share a long line with one of the holes, or are like it: six words of ten
    in the same order."""
    functions = {}
    for file, text in python_files(ROOT).items():
        if re.match(r"(common/)?\w+\.py$", file):
            functions |= {(file, name): assign.solution_lines(text, node)
                          for name, node in grade.definitions(ast.parse(text)).items()
                          if isinstance(node, ast.FunctionDef) and name != "main"}
    answers = [functions[file, name] for file, names in holes.items() for name in names]
    found = set()
    for (file, name), lines in functions.items():
        for answer in answers if name not in holes.get(file, []) else ():
            likeness = difflib.SequenceMatcher(None, words(answer), words(lines), autojunk=False)
            is_like = len(words(lines)) > 12 and likeness.quick_ratio() >= 0.6 and likeness.ratio() >= 0.6
            if is_like or long_lines(answer) & long_lines(lines):
                found.add(f"{file}:{name}")
    return found


def all_holes(assignment):
    found = {}
    for question in assignment["questions"]:
        for file, names in assign.holes_of(assignment, question).items():
            found.setdefault(file, []).extend(names)
    return found


@pytest.mark.parametrize("number", WITH_HOLES)
def test_twins_are_left_out(number):
    """Those that are found, and no file in which there is none."""
    assignment = assign.read(number)
    found = twins_of(all_holes(assignment))
    left_out = set(assignment["twins"])
    assert {twin for twin in found if twin not in left_out and twin.partition(":")[0] not in left_out} == set()
    assert left_out <= found | {twin.partition(":")[0] for twin in found}


@pytest.mark.parametrize("number", WITH_HOLES)
def test_no_line_of_the_solution_is_left(number, built):
    """Of more than 30 characters; and there is neither history nor results, nor a hidden test."""
    assignment, student = assign.read(number), built(number) / "student"
    answers = set()
    for file, names in all_holes(assignment).items():
        text = (ROOT / file).read_text()
        known = grade.definitions(ast.parse(text))
        answers |= {line for name in names for line in long_lines(assign.solution_lines(text, known[name]))}
    assert answers
    for file, text in python_files(student).items():
        lines = {line.partition("  # ")[0].strip() for line in text.splitlines()}
        assert not lines & answers, file
    assert not {path.name for path in student.iterdir()} & {".git", "results", "assignments", "tools", "docs"}
    files = {f"tests/{path.name}": path.read_text() for path in (student / "tests").glob("*.py")}
    given = {f"{file}::{name}" for file, text in files.items() for name in re.findall(r"^def (\w+)\(", text, re.M)}
    public, hidden = (assign.tests_of(assignment, [kind]) for kind in ("public", "hidden"))
    assert public <= given and not (hidden - public) & given


@pytest.mark.parametrize("number", THOROUGH or [2])
def test_a_solved_folder_passes_its_public_tests(number, built, tmp_path):
    """Without the twins, that is, and in the place where a student works."""
    assignment = assign.read(number)
    shutil.copytree(built(number) / "student", tmp_path / "project")
    for file in assignment["hand_in"]:
        left_out = [twin.partition(":")[2] for twin in assignment["twins"] if twin.startswith(f"{file}:")]
        (tmp_path / "project" / file).write_text(assign.cut((ROOT / file).read_text(), left_out))
    runs = [run for question in assignment["questions"] for run in assign.runs_of(assignment, question, ["public"])]
    for run, report in zip(runs, reports(tmp_path, runs), strict=True):
        assert not report["failed"] and sorted(report["passed"]) == sorted(run["tests"])


def test_what_a_hole_keeps():
    text = (ROOT / "mae.py").read_text()
    left = assign.cut(text, ["MAE.loss"])
    function = grade.definitions(ast.parse(left))["MAE.loss"]
    assert ast.unparse(function) == (
        "def loss(self, pred, target, mask):\n"
        '    """Mean squared error over all hidden patches, fp32 (MAE, 3); 0 if none is hidden."""\n'
        "    raise NotImplementedError('loss')")
    first, last = grade.span(function)
    comments = [line.strip() for line in left.splitlines()[first:last] if line.strip().startswith("#")]
    assert comments == ["# error: (B, N)", "# 2 lines in the solution"]
    with pytest.raises(KeyError):
        assign.cut(text, ["MAE.lose"])


@pytest.mark.parametrize("number", NUMBERS)
def test_an_assignment_is_complete(number, built, capsys):
    """What every one has: points, five questions with answers, and files without a word that was to be filled in."""
    assignment, out = assign.read(number), built(number)
    assert {"title", "goal", "read", "hours", "hand_in"} <= assignment.keys() and len(assignment["oral"]) == 5
    points = sum(question["points"] for question in assignment["questions"]) or assignment["total"]
    assert points in (15, 20, 25)
    pages = [(out / name).read_text() for name in ("instructor.md", "student/README.md", "student/AGENTS.md")]
    assert not any(re.findall(r"\{[a-z]+\}", page) for page in pages)
    assert all(f"{points} points" in page for page in pages[:2])
    assert all(each["answer"] in (out / "instructor.md").read_text() for each in assignment["oral"])
    assert not any(each["answer"][:40] in text.read_text() for each in assignment["oral"]
                   for text in (out / "student").rglob("*.md"))
    assert not [question["name"] for question in assignment["questions"]
                if not question.get("public") and "hunt" not in question]
    if assignment["questions"]:
        with zipfile.ZipFile(out / "gradescope.zip") as file:
            modes = {name: file.getinfo(name).external_attr >> 16 for name in ("setup.sh", "run_autograder")}
            assert all(mode & 0o111 for mode in modes.values())
            assert {"grade.py", "guarded.py", "assignment.json"} <= set(file.namelist())


def test_only_what_is_there_can_be_made(call, tmp_path):
    done = call(assign.main, [11, "--out", tmp_path])
    assert done.code == 2 and done.err == "error: there is no assignment 11; there are 1 to 10\n"
    assert call(assign.main, [2, "--out", tmp_path]).code == 0
    assert sorted(path.name for path in (tmp_path / "02").iterdir()) == ["gradescope.zip", "instructor.md", "student"]
