"""Make a classroom assignment out of the project's own files, which are its solution: nothing is kept twice.

    python -m tools.assign 2    # runs/assignments/02/{student/, gradescope.zip, instructor.md}

assignments/02_mae.yaml says which functions become holes, and which tests give points for them. The student's folder
has the project without what would tell the answers: bodies of holes, twins (functions like them), hidden tests.
How to use it in a class: assignments/README.md.
"""

import argparse
import ast
import itertools
import json
import re
import shutil
import tempfile
import zipfile
from importlib.metadata import version
from pathlib import Path

import yaml

from common import config
from tools import grade

ROOT = Path(__file__).resolve().parent.parent
ASSIGNMENTS = ROOT / "assignments"
SECONDS = 45  # that one question may take
METHODS = ("mae", "simmim", "um_mae", "fastmim", "lut")


def read(number):
    """What the YAML file of an assignment says, with its `number`. ValueError if there is none."""
    paths = list(ASSIGNMENTS.glob(f"{number:02d}_*.yaml"))
    if not paths:
        raise ValueError(f"there is no assignment {number}; there are 1 to {len(list(ASSIGNMENTS.glob('*.yaml')))}")
    return {"number": number, "twins": [], "tests": [], "questions": [], **yaml.safe_load(paths[0].read_text())}


# ---------------------------------------- Holes

def body_of(node):
    """The statements of a function behind its docstring."""
    return node.body[1:] if ast.get_docstring(node, clean=False) is not None else node.body


def solution_lines(text, node):
    """The lines of code behind a function's docstring: without comments and blank lines."""
    lines = text.splitlines()[body_of(node)[0].lineno - 1 : node.end_lineno]
    code = [line.partition("  # ")[0].strip() for line in lines]
    return [line for line in code if line and not line.startswith("#")]


def shapes(text, node):
    """["scores: (B, N)", ...]: what the comments at the ends of a function's lines say about shapes."""
    lines, found = text.splitlines(), {}
    for statement in ast.walk(node):
        if isinstance(statement, (ast.Assign, ast.AugAssign, ast.Return)):
            comment = lines[statement.end_lineno - 1].partition("  # ")[2]
            if re.search(r"\([\w*/+ ]+,", comment):
                targets = getattr(statement, "targets", None) or [getattr(statement, "target", None)]
                name = ast.unparse(targets[0]) if targets[0] else "returned"
                found[statement.lineno] = f"{name}: {comment}"
    return [found[line] for line in sorted(found)]


def cut(text, holes, notes=True):
    """A file without the bodies of the functions `holes`. With `notes` the shapes of what the solution computes stay,
    and its number of lines. KeyError if there is no such function."""
    lines, known = text.splitlines(), grade.definitions(ast.parse(text))
    for node in sorted((known[hole] for hole in holes), key=lambda node: -node.lineno):
        docstring = node.body[0] if body_of(node) is not node.body else None
        first = docstring.end_lineno if docstring else node.body[0].lineno - 1
        new = [f'raise NotImplementedError("{node.name}{"" if notes else " is left out of this assignment"}")']
        if notes:
            count = len(solution_lines(text, node))
            new = [*(f"# {shape}" for shape in shapes(text, node)),
                   f"# {count} line{'s' * (count > 1)} in the solution", *new]
        lines[first : node.end_lineno] = [" " * node.body[0].col_offset + line for line in new]
    return "\n".join(lines) + "\n"


def holes_of(assignment, question):
    """{file: functions} of a question, in the files to be handed in."""
    names, found = question.get("holes", []), {}
    for file in assignment["hand_in"]:
        path = ROOT / file
        known = grade.definitions(ast.parse(path.read_text())) if path.exists() else {}
        found[file] = [name for name in names if name in known]
    if sorted(itertools.chain(*found.values())) != sorted(names):
        raise ValueError(f"of {', '.join(names)}, not each is once in {', '.join(assignment['hand_in'])}")
    return found


# ---------------------------------------- Tests

def names_in(node):
    """What a statement may need of its file, and what a test needs of fixtures."""
    names = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
    return names | {part.arg for part in ast.walk(node) if isinstance(part, ast.arg)}


def names_made_by(node):
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name}
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
    targets = getattr(node, "targets", None) or [getattr(node, "target", node)]
    parts = itertools.chain.from_iterable(map(ast.walk, targets))  # not of comprehensions
    return {part.id for part in parts if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)}


def shaken(text, wanted):
    """(a file without what neither `wanted` nor an automatic fixture needs, names that these need)."""
    nodes = ast.parse(text).body
    kept, needed = [], set(wanted)
    while True:
        more = [node for node in nodes if node not in kept
                and (names_made_by(node) & needed or "autouse=True" in ast.unparse(node).partition("\ndef")[0])]
        if not more:
            break
        kept += more
        needed = needed.union(*map(names_in, more))

    lines, imports, rest = text.splitlines(), [], []
    for node in [node for node in nodes if node in kept]:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            node.names = [alias for alias in node.names if (alias.asname or alias.name).partition(".")[0] in needed]
            imports.append(ast.unparse(node))
        else:
            first, last = grade.span(node)
            rest.append("\n".join(lines[first:last]))
    return "\n\n\n".join(["\n".join(imports), *rest]) + "\n", needed


def write_tests(assignment, names, folder):
    """Of the project's tests those of these nodes, with the helpers and published numbers that they need."""
    folder.mkdir()
    needed = set()
    for file in assignment["tests"]:
        own = {name.partition("::")[2] for name in names if name.startswith(f"tests/{Path(file).name}::")}
        if own:
            text, more = shaken((ROOT / file).read_text(), own)
            (folder / Path(file).name).write_text(text)
            needed |= more
    everything = "".join(path.read_text() for path in folder.iterdir())
    for helper in ("encoders", "parity"):
        if f"import {helper}" in everything or f"from {helper}" in everything:
            shutil.copy(ROOT / "tests" / f"{helper}.py", folder)
    for path in (ROOT / "tests" / "golden").iterdir():
        if "GOLDEN" in everything and path.stem in everything:
            (folder / "golden").mkdir(exist_ok=True)
            shutil.copy(path, folder / "golden")
    (folder / "conftest.py").write_text(shaken((ROOT / "tests" / "conftest.py").read_text(), needed)[0])


# ---------------------------------------- Folders

def write_project(folder, left_out=()):
    """The project's scripts and recipes, without files, and bodies of functions (file:name), that are `left_out`."""
    for pattern in ("*.py", "common/*.py", "configs/*.yaml", "LICENSE"):
        for path in ROOT.glob(pattern):
            file = str(path.relative_to(ROOT))
            functions = [name for twin, _, name in (each.partition(":") for each in left_out) if twin == file and name]
            if file not in left_out:
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                (folder / file).write_text(cut(path.read_text(), functions, notes=False) if functions else
                                           path.read_text())


def runs_of(assignment, question, kinds):
    """What guarded.py is to run for a question: its tests of these kinds, or a student's tests on mistakes."""
    if "hunt" not in question:
        names = [name for kind in kinds for name in question.get(kind, [])]
        return [{"tests": [node_of(assignment, name) for name in names], "changes": []}]
    mutants = [mutant for mutant in yaml.safe_load((ROOT / "tests" / "mutants.yaml").read_text())
               if mutant["name"].partition(" ")[0] == question["hunt"] and "harmless" not in mutant]
    shown = mutants if "hidden" in kinds else mutants[:1]  # a student has one of each function, to try
    changes = [[{"file": mutant["file"], "function": question["hunt"], "old": mutant["old"], "new": mutant["new"]}]
               for mutant in shown]
    return [{"tests": None, "changes": change} for change in [[], *changes, []]]  # right code at the end, too


def node_of(assignment, name):
    """pytest's name of a test, without parameters; where two files have it, `name` may be test_mae.py::test_it.
    ValueError unless it is in one of the assignment's files."""
    wanted, _, name = name.rpartition("::")
    for file in [file for file in assignment["tests"] if file.endswith(wanted)]:
        if re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.M):
            return f"tests/{Path(file).name}::{name}"
    raise ValueError(f"there is no {name} in {', '.join(assignment['tests'])}")


def write_grader(assignment, folder, kinds, note):
    """grade.py, guarded.py and the assignment.json that tells them what to run."""
    questions = []
    for question in assignment["questions"]:
        entry = {"name": question["name"], "points": question["points"], "runs": runs_of(assignment, question, kinds)}
        if "holes" in question:
            entry["holes"] = holes_of(assignment, question)
        if "hunt" not in question:
            entry["hidden"] = [node_of(assignment, name) for name in question.get("hidden", [])]
        questions.append(entry)
    content = {"hand_in": assignment["hand_in"], "seconds": SECONDS, "imports": ["torch", "torchvision.transforms.v2"],
               "note": note, "questions": questions}
    (folder / "assignment.json").write_text(json.dumps(content, indent=1))
    for name in ("grade.py", "guarded.py"):
        shutil.copy(ROOT / "tools" / name, folder)


def tests_of(assignment, kinds):
    names = [name for question in assignment["questions"] for kind in kinds for name in question.get(kind, [])]
    return {node_of(assignment, name) for name in names}


def filled(name, assignment):
    """A template of assignments/, with what the assignment says in the place of {its words}."""
    rows = []
    for question in assignment["questions"]:
        functions = ", ".join(f"`{name}`" for name in question.get("holes", []) or filter(None, [question.get("hunt")]))
        rows.append(f"| {question['name']} | {question['points']} | {functions} |")
    oral = "\n".join(f"{i}. **{each['ask']}** {each['answer']}\n" for i, each in enumerate(assignment["oral"], 1))
    files = ", ".join(f"`{name}`" for name in assignment["hand_in"])
    words = {**assignment, "oral": oral, "rows": "\n".join(rows), "files": files,
             "total": assignment.get("total", sum(each["points"] for each in assignment["questions"])),
             "seconds": SECONDS, **{name: version(name).split("+")[0] for name in ("torch", "torchvision")}}
    task = (ASSIGNMENTS / "tasks" / f"{assignment.get('task', 'holes')}.md").read_text()
    text = (ASSIGNMENTS / name).read_text().replace("{task}", task)
    return re.sub(r"\{(\w+)\}", lambda word: str(words.get(word[1], word[0])), text)


def write_student(assignment, folder):
    write_project(folder, assignment["twins"])
    for question in assignment["questions"]:
        for file, holes in holes_of(assignment, question).items():
            if holes:
                (folder / file).write_text(cut((folder / file).read_text(), holes))
    if assignment["questions"]:
        write_tests(assignment, tests_of(assignment, ["public"]), folder / "tests")
        leave_out_other_methods(assignment, folder)
        write_grader(assignment, folder, ["public"], "by the tests that you have; hidden ones count, too")
        (folder / "pytest.ini").write_text("[pytest]\npythonpath = .\n")
        (folder / ".github" / "workflows").mkdir(parents=True)
        (folder / ".github" / "workflows" / "grade.yml").write_text(filled("student/grade.yml", assignment))
    for name in ("README.md", "AGENTS.md", "requirements.txt"):
        (folder / name).write_text(filled(f"student/{name}", assignment))
    for name in assignment.get("starters", []):
        shutil.copy(ASSIGNMENTS / "starters" / Path(name).name, folder / name)


def leave_out_other_methods(assignment, folder):
    """They are answers to other assignments. Those stay that a test needs, or that a bug hunt is about."""
    tests = "".join(path.read_text() for path in (folder / "tests").iterdir() if path.suffix == ".py")
    for method in METHODS if any("holes" in question for question in assignment["questions"]) else ():
        if f"{method}.py" not in assignment["hand_in"] and not re.search(rf"^import {method}$", tests, re.M):
            (folder / f"{method}.py").unlink(missing_ok=True)


def write_gradescope(assignment, path):
    """The zip with setup.sh and run_autograder at its root, as Gradescope wants it."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_project(folder / "project")
        write_tests(assignment, tests_of(assignment, ["public", "hidden"]), folder / "project" / "tests")
        write_grader(assignment, folder, ["public", "hidden"], "")
        for name in ("setup.sh", "run_autograder"):
            (folder / name).write_text(filled(f"gradescope/{name}", assignment), newline="\n")
            (folder / name).chmod(0o755)
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            for member in sorted(folder.rglob("*")):
                if member.is_file():
                    file.write(member, member.relative_to(folder))


def build(number, out):
    """Write an assignment to the folder `out`, where its student/ is made anew. ValueError if there is none."""
    assignment = read(number)
    shutil.rmtree(out / "student", ignore_errors=True)
    (out / "student").mkdir(parents=True)
    write_student(assignment, out / "student")
    if assignment["questions"]:
        write_gradescope(assignment, out / "gradescope.zip")
    (out / "instructor.md").write_text(filled("instructor.md", assignment))
    return assignment


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("number", type=int, help="of the assignment, 1 to 10")
    parser.add_argument("--out", type=Path, default=Path("runs/assignments"), help="the folder of all assignments")
    args = parser.parse_args(argv)
    with config.user_errors():
        out = args.out / f"{args.number:02d}"
        assignment = build(args.number, out)
        config.print_once(f"{out}: {assignment['title']}. student/ is for students, the rest is not")


if __name__ == "__main__":
    main()
