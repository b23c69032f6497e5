"""tools/grade.py: what costs points and what does not, whatever a hand-in does; and the forms in which it is called."""

import ast
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from test_assign import THOROUGH, WITH_HOLES, in_fork, mistakes_in

from tools import assign, grade, guarded

# Grafting

OURS = """import math


class Model:
    def one(self):
        return 1

    @staticmethod
    def two():
        return 2


def main():
    return Model().one()
"""
THEIRS = """import math
import os

ONE = 10


def helper():
    return os.path.sep, math.pi


class Model:
    def one(self):
        return ONE, helper(), self.more()

    def more(self):
        return "more"

    def two():
        return "twenty"


def main():
    return "another"
"""


def test_only_the_hole_and_what_it_may_need_are_taken():
    """Imports, helpers, constants; the other functions stay ours."""
    text = grade.graft(OURS, THEIRS, ["Model.one"])
    space = {}
    exec(text, space)
    assert space["main"]() == (10, (os.path.sep, 3.141592653589793), "more") and space["Model"].two() == 2
    assert grade.graft(OURS, OURS, ["Model.one", "Model.two"]).split() == OURS.replace(
        "import math", "import math import math", 1).split()
    with pytest.raises(ValueError, match=r"no Model\.one any more"):
        grade.graft(OURS, "import math", ["Model.one"])


def test_a_helper_stands_where_the_student_put_it():
    """It may need what stands above, and be needed below, both when it is made."""
    theirs = """import math
LARGE: float = 1e3
SMALL, TINY = 0.1, 0.01


class Base:
    pass


class Model(Base):
    scale = 3
    shift: int = 4

    def one(self, by=scale):
        return by, self.shift, LARGE, TINY, bounded(self).other

    @staticmethod
    def two():
        return 2

    def three(self):
        return "three"


class Other(Model):
    pass


def kept(model: Model, kind=Other) -> Other:
    return kind()


def main():
    return 1


def bounded(model, of=kept):
    model = of(model)
    model.other = "\f"
    return model
"""
    space = {}
    exec(grade.graft(OURS, theirs, ["Model.one"]), space)
    assert space["main"]() == (3, 4, 1e3, 0.01, "\f") and space["Model"]().three() == "three"


@pytest.mark.parametrize("indent", ["  ", "\t", "   "])
def test_an_indentation_of_its_own(indent):
    theirs = THEIRS.replace("    ", indent)
    assert ("\n" + indent + "def one") in theirs
    space = {}
    exec(grade.graft(OURS, theirs, ["Model.one"]), space)
    assert space["main"]() == (10, (os.path.sep, 3.141592653589793), "more") and space["Model"].two() == 2


# A made-up project, and hand-ins that do what they should not

HARMFUL = {  # the body of a function: what is said
    "while True: time.sleep(1)": "longer than 8 seconds",
    "print('x' * 1_000_000); return 1": "printed 1000 kB",
    "os._exit(0)": "ended before the tests did, with code 0",
    "sys.exit(0)": "SystemExit: 0",
    "shutil.rmtree('PRECIOUS', ignore_errors=True); return 1": "must not do this: shutil.rmtree",
    "shutil.rmtree('.', ignore_errors=True); return 1": "must not do this: shutil.rmtree",
    "os.rename('PRECIOUS/file', 'here'); return 1": "must not do this: os.rename",
    "subprocess.Popen('true'); return 1": "must not do this: subprocess.Popen",
    "os.kill(os.getppid(), 9); return 1": "must not do this: os.kill",
    "os.open('PRECIOUS', os.O_RDONLY); return 1": "must not do this: open",
    "os.open('mine', os.O_WRONLY | os.O_CREAT, dir_fd=os.open('..', os.O_RDONLY)); return 1": "must not do this: open",
    "here = OUT; os.makedirs(here + '/a/b'); os.chdir(here + '/a/b'); "
    "os.open('..', os.O_RDONLY, dir_fd=os.open(here, os.O_RDONLY)); return 1": "must not do this: open",
    "os.rename('../../file', 'x', src_dir_fd=os.open(OUT, os.O_RDONLY)); return 1": "must not do this: os.rename",
    "os.chdir('PRECIOUS'); os.rename('file', 'x', dst_dir_fd=os.open(OUT, os.O_RDONLY)); return 1":
        "must not do this: os.rename",
    "os.makedirs(OUT + '/a/b'); os.chdir(OUT + '/a/b'); os.symlink('../..', OUT + '/up'); return 1":
        "must not do this: os.symlink",
    "os.chmod(os.open('PRECIOUS/file', os.O_RDONLY), 0); return 1": "must not do this: os.chmod",
    "return 2": "assert 2 == 1",
    "raise NotImplementedError": "not written yet",
    # What is its own it may change.
    "open(os.path.join(tempfile.mkdtemp(), 'x'), 'w').close(); return 1": "",
    "place = tempfile.mkdtemp(); os.makedirs(place + '/a/b'); open(place + '/a/x', 'w').close(); shutil.rmtree(place);"
    " return 1": "",
}


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    """`made_up(bodies)`: the marks of a hand-in whose functions have these bodies; each should return 1."""
    grader, hand_in = tmp_path / "grader", tmp_path / "hand_in"
    (grader / "project" / "tests").mkdir(parents=True)
    hand_in.mkdir()
    monkeypatch.setattr(grade, "HERE", grader)

    def marks(bodies, seconds=8):
        names = [f"f{i}" for i in range(len(bodies))]
        files = {grader / "project" / "ones.py": ["return 1"] * len(names), hand_in / "ones.py": bodies}
        for path, texts in files.items():
            head = "import os, shutil, subprocess, sys, tempfile, time\n"
            functions = [f"def {name}():\n    {text}\n" for name, text in zip(names, texts, strict=True)]
            path.write_text(head + "".join(functions))
        tests = "".join(f"def test_{name}(): assert ones.{name}() == 1\n" for name in names)
        (grader / "project" / "tests" / "test_ones.py").write_text("import ones\n" + tests)
        node = "tests/test_ones.py::test_{}".format
        questions = [{"name": name, "points": 2, "holes": {"ones.py": [name]},
                      "runs": [{"tests": [node(name)], "changes": []}]} for name in names]
        assignment = {"hand_in": ["ones.py"], "seconds": seconds, "imports": [], "note": "", "questions": questions}
        return grade.grade(assignment, hand_in)
    return marks


def test_what_a_hand_in_does_costs_that_question_and_harms_nothing(made_up, tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("dear")
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    bodies = [body.replace("PRECIOUS", str(precious)).replace("OUT", "tempfile.gettempdir()") for body in HARMFUL]
    marks = made_up([*bodies, "return 1"])
    for mark, said in zip(marks, [*HARMFUL.values(), ""], strict=True):
        assert mark["score"] == (0 if said else 2) and said in mark["output"], mark
        assert mark["output"].count("\n") == 0
    assert (precious / "file").read_text() == "dear" and set(before) <= {str(path) for path in tmp_path.rglob("*")}


@pytest.mark.parametrize("content,said", [(b"def f0(:", "line 1 is not Python"), (b"\xff", "not UTF-8"),
                                          (b"x = " + b"-" * 100_000 + b"1", "nested too deeply"),
                                          (b"x = 1\0", "null bytes"),
                                          (b"#" * 600_000, "larger than 500 kB"), (None, "is not there"),
                                          (b"f1 = 1", "no f0 any more")])
def test_a_file_that_cannot_be_graded_is_a_line(content, said, made_up, tmp_path, monkeypatch):
    real = grade.prepare

    def prepare(assignment, question, hand_in, folder):
        (hand_in / "ones.py").unlink()
        if content is not None:
            (hand_in / "ones.py").write_bytes(content)
        else:
            (hand_in / "ones.py").symlink_to(ROOT / "mae.py")  # nobody's file but a hand-in's own is read
        real(assignment, question, hand_in, folder)

    monkeypatch.setattr(grade, "prepare", prepare)
    (mark,) = made_up(["return 1"])
    assert mark["score"] == 0 and said in mark["output"] and "\n" not in mark["output"]


def test_a_mark_at_the_beginning_of_a_file_is_none_of_its_text(made_up, tmp_path, monkeypatch):
    real = grade.prepare

    def prepare(assignment, question, hand_in, folder):
        text = (hand_in / "ones.py").read_bytes()
        (hand_in / "ones.py").write_bytes(b"\xef\xbb\xbf" + text)
        real(assignment, question, hand_in, folder)

    monkeypatch.setattr(grade, "prepare", prepare)
    assert [mark["score"] for mark in made_up(["return 1"])] == [2]


@pytest.mark.parametrize("content", ["def f(:", "x = " + "-" * 100_000 + "1", None])
def test_a_broken_file_costs_no_question_about_another(content, tmp_path, monkeypatch):
    monkeypatch.setattr(grade, "HERE", tmp_path)
    hand_in = tmp_path / "hand_in"
    for folder in (tmp_path / "project", hand_in):
        folder.mkdir()
        for name in ("one.py", "two.py"):
            (folder / name).write_text("import os\n\n\ndef f():\n    return 1\n")
    (hand_in / "two.py").unlink()
    if content:
        (hand_in / "two.py").write_text(content)
    assignment = {"hand_in": ["one.py", "two.py"], "seconds": 1, "imports": []}
    grade.prepare(assignment, {"holes": {"one.py": ["f"], "two.py": []}, "runs": []}, hand_in, tmp_path / "a")
    assert (tmp_path / "a" / "project" / "two.py").read_text() == (tmp_path / "project" / "two.py").read_text()
    for question in ({"holes": {"one.py": [], "two.py": ["f"]}, "runs": []}, {"runs": []}):
        with pytest.raises(grade.Unreadable):
            grade.prepare(assignment, question, hand_in, tmp_path / f"b{len(question)}")


# An assignment, live

class Fork:
    """As much of subprocess.Popen as grade.py uses."""

    def __init__(self, folder, output):
        self.pid = in_fork(output, guarded.child, folder)

    def wait(self, seconds=100):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.wait = lambda: None  # has been waited for
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.02)
        raise subprocess.TimeoutExpired("fork", seconds)


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """`unpacked(number)`: the folder into which the zip of an assignment is unpacked, and the student's."""
    def folders(number):
        out = tmp_path_factory.mktemp("assignment")
        assign.build(number, out)
        with zipfile.ZipFile(out / "gradescope.zip") as file:
            file.extractall(out / "autograder" / "source")
        return out / "autograder" / "source", out / "student"
    return folders


def first_mistake(holes):
    """The first mutant of a question's functions that a test can see."""
    return next(change for _, change in mistakes_in(holes))


@pytest.mark.parametrize("number", WITH_HOLES if THOROUGH else [2])
def test_starter_solution_and_mistakes(number, unpacked, tmp_path, monkeypatch):
    """0 points, all points, and all but those of the questions with a mistake and of the last one, which takes the
    files as they are."""
    folder, student = unpacked(number)
    monkeypatch.setattr(grade, "HERE", folder)
    monkeypatch.setattr(grade, "start", Fork)
    assignment = json.loads((folder / "assignment.json").read_text())
    most = {question["name"]: question["points"] for question in assignment["questions"]}
    *questions, last = assignment["questions"]

    def scores(texts):
        for file, text in texts.items():
            (tmp_path / Path(file).name).write_text(text)
        marks = [grade.mark(assignment, question, tmp_path) for question in assignment["questions"]]
        return {mark["name"]: mark["score"] for mark in marks}, marks

    starter = {file: (student / file).read_text() for file in assignment["hand_in"]}
    solution = {file: (ROOT / file).read_text() for file in assignment["hand_in"]}
    assert scores(starter)[0] == dict.fromkeys(most, 0)
    found, marks = scores(solution)
    assert found == most, marks
    for half in (0, 1) if THOROUGH else (0,):
        texts, wrong = dict(solution), questions[half::2]
        for change in (first_mistake(question["holes"]) for question in wrong):
            texts[change["file"]] = texts[change["file"]].replace(change["old"], change["new"])
        lost = [question["name"] for question in [*wrong, last]]
        assert scores(texts)[0] == {name: 0 if name in lost else points for name, points in most.items()}


def test_gradescope(unpacked, tmp_path):
    """Its layout, in a bare folder: source/, submission/, results/. One question, to save time."""
    folder = unpacked(2)[0].parent
    for name in ("submission", "results"):
        (folder / name).mkdir()
    shutil.copy(ROOT / "mae.py", folder / "submission")
    path = folder / "source" / "assignment.json"
    assignment = json.loads(path.read_text())
    path.write_text(json.dumps({**assignment, "questions": assignment["questions"][:1]}))
    environment = {"PATH": os.environ["PATH"], "AUTOGRADER": str(folder), "PYTHON": sys.executable}
    done = subprocess.run(["bash", str(folder / "source" / "run_autograder")], cwd=tmp_path, env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads((folder / "results" / "results.json").read_text())
    assert results["tests"] == [{"name": "mask", "score": 5, "max_score": 5, "output": ""}], results
    assert results["stdout_visibility"] == "hidden" and results["execution_time"] < 120
    for script in ("setup.sh", "run_autograder"):
        assert subprocess.run(["bash", "-n", str(folder / "source" / script)]).returncode == 0


def test_a_student_without_make(unpacked, tmp_path):
    """`python grade.py` in the folder, as on a laptop: points, lines, and a code for GitHub Actions."""
    student = tmp_path / "student"
    shutil.copytree(unpacked(2)[1], student)
    assignment = json.loads((student / "assignment.json").read_text())
    content = {**assignment, "questions": assignment["questions"][:1]}
    (student / "assignment.json").write_text(json.dumps(content))
    done = subprocess.run([sys.executable, "grade.py"], cwd=student, capture_output=True, text=True)
    assert done.returncode == 1 and "mask                         0 of 5   not written yet" in done.stdout, done.stderr
    assert done.stdout.splitlines()[-1] == (
        "total                        0 of 5   by the tests that you have; hidden ones count, too")
    workflow = yaml.safe_load((student / ".github" / "workflows" / "grade.yml").read_text())
    assert workflow["jobs"]["grade"]["steps"][-1] == {"run": "python grade.py"}


# The bug hunt


GOOD = """

def test_the_places_of_patches():
    model = build(img_size=(16, 64))
    ids_keep, ids_restore, mask = model.mask(torch.rand(3, 16))
    assert torch.equal(~mask, torch.zeros(3, 16, dtype=torch.bool).scatter(1, ids_keep, True))
    for keep, restore in zip(ids_keep, ids_restore, strict=True):
        assert torch.equal(restore[keep], torch.arange(4))
"""


@pytest.mark.parametrize("more,score,said", [
    ("", 1, "mistakes pass your tests"), (GOOD, 2, "3 of 10 mistakes pass your tests"),
    ("\n\ndef test_no(): assert False\n", 0, "no: assert False"),
    ("\n\nseen = []\n\n\ndef test_again():\n    seen.append(1)\n    assert len(seen) == 1\n", 0,
     "your tests fail on right code when they run again")], ids=["starter", "better", "wrong", "again"])
def test_tests_of_students_are_marked_by_the_mistakes_they_find(more, score, said, tmp_path, monkeypatch):
    assignment = assign.read(9)
    assign.write_project(tmp_path / "grader" / "project")
    assign.write_tests(assignment, set(), tmp_path / "grader" / "project" / "tests")
    assign.write_grader(assignment, tmp_path / "grader", ["public", "hidden"], "")
    assignment = json.loads((tmp_path / "grader" / "assignment.json").read_text())
    starter = (ROOT / "assignments" / "starters" / "test_hunt.py").read_text()
    ast.parse(starter + more)
    (tmp_path / "test_hunt.py").write_text(starter + more)
    monkeypatch.setattr(grade, "HERE", tmp_path / "grader")
    monkeypatch.setattr(grade, "start", Fork)
    mark = grade.mark(assignment, assignment["questions"][0], tmp_path)
    assert mark["score"] == score and said in mark["output"], mark
