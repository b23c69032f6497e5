"""What keeps the house in order: imports run downward, the loop is the same text everywhere, sections keep their
order."""

import ast
import difflib
import re
import subprocess

import pytest
from conftest import ROOT

METHODS = ["mae", "simmim", "um_mae", "fastmim", "lut"]
FLOORS = {"common": 0, "models": 1, "data": 1, **dict.fromkeys([*METHODS, "finetune"], 2), "tools": 3}
OPTIONAL = {"matplotlib", "pygments", "safetensors", "timm", "wandb"}  # what may be imported inside a function
OPTIONAL_PARTS = {"torch.utils.tensorboard.SummaryWriter"}  # of a package that is there, for one that may not be


def modules():
    """{"common.engine": path, "mae": path, ...} of the project, without tests."""
    paths = [*ROOT.glob("*.py"), *ROOT.glob("common/*.py"), *ROOT.glob("tools/*.py")]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}


def text_of(name):
    return modules()[name].read_text()


def floor(name):
    return FLOORS[name.split(".")[0]]


# Imports


def imports(name):
    """{(module of the project, is it inside a function?)} that a module imports, and the names of other libraries."""
    known, tree = modules(), ast.parse(text_of(name))
    inside = {id(node) for function in ast.walk(tree) if isinstance(function, (ast.FunctionDef, ast.Lambda))
              for node in ast.walk(function)}
    own, other = set(), set()
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for found in names:
            while found and found not in known and found.rpartition(".")[0] in known:
                found = found.rpartition(".")[0]
            target = own if found in known else other
            target.add((found, id(node) in inside))
    return own, other


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_run_downward(name):
    """common < models, data < methods, finetune < tools; no method imports another; nobody above common is imported by
    it; inside functions only what is optional."""
    own, other = imports(name)
    for found, inside in own:
        assert not inside, f"{name} imports {found} inside a function"
        beside_methods = floor(found) == floor(name) == 2
        assert floor(found) <= floor(name) and not beside_methods, f"{name} imports {found}"
    odd = {found for found, inside in other if inside and found.split(".")[0] not in OPTIONAL} - OPTIONAL_PARTS
    assert not odd, f"{name} imports {odd} inside a function"


def test_no_circle():
    graph = {name: {found for found, _ in imports(name)[0]} for name in modules()}
    while graph:
        free = [name for name, used in graph.items() if not used & graph.keys()]
        assert free, f"these import each other: {sorted(graph)}"
        for name in free:
            del graph[name]


def test_the_top_level_is_what_was_drawn():
    assert {path.stem for path in ROOT.glob("*.py")} == {*METHODS, "models", "data", "finetune"}


@pytest.mark.parametrize("path", sorted(ROOT.glob("tools/*.py")), ids=lambda path: path.stem)
def test_a_tool_stays_short(path):
    assert path.read_text().count("\n") < 300


# The same text everywhere


def block(name, first, last, own=()):
    """Lines of a file from the one that holds `first` to the one that holds `last`; the words `own` become one word."""
    lines = [line.rstrip() for line in text_of(name).splitlines()]
    for word in own:  # in code, not in comments: those may well speak of MAE
        parts = [line.partition("  # ") for line in lines]
        lines = [re.sub(rf"\b{word}\b", "METHOD", code) + mark + comment for code, mark, comment in parts]
    begin = next(i for i, line in enumerate(lines) if first in line)
    end = next(i for i, line in enumerate(lines) if last in line and i > begin)
    return lines[begin : end + 1]


def without_ema(lines):
    """Without the moving average, which a comparison of two files is to show, and what belongs to it."""
    kept = [line for line in lines if "ema" not in line.lower() and "# DIFF" not in line and "# to 1" not in line]
    return [line for line in kept if line.strip()]


def same(one, two, names):
    assert one == two, "\n".join(difflib.unified_diff(one, two, *names, lineterm=""))


def class_of(name):
    """The class that `main` builds: MAE, SimMIM, ..."""
    return re.search(r"model = (\w+)\(cfg\)\.to\(run\.device\)", text_of(name))[1]


@pytest.mark.parametrize("name", METHODS)
def test_main_is_the_same_text_in_every_method_file(name):
    """But for the name of the model, and a line for a teacher after the step."""
    first, last = "def main(argv=None):", 'if __name__ == "__main__":'
    reference, here = (block(n, first, last, own=(class_of(n),)) for n in ("mae", name))
    assert len(reference) > 50 and any("backward()" in line for line in reference)
    same(without_ema(reference), without_ema(here), ("mae.py", f"{name}.py"))


@pytest.mark.parametrize("name", ["finetune", "tools.dense"])
def test_the_step_with_labels_is_that_of_the_methods(name):
    """From backward to the log: what may not differ between pre-training and what comes after it."""
    first, last = "run.scaler.scale(loss * run.world_size).backward()", "run.log(step, batch_size"
    one, two = block("mae", first, last), block(name, first, last)
    assert len(one) > 10
    ends = [line for line in without_ema(two) if "# Log, " not in line]
    same([line for line in without_ema(one) if "# Log, " not in line], ends, ("mae.py", name))


@pytest.mark.parametrize("name", METHODS)
def test_sections_come_in_the_same_order(name):
    text = text_of(name)
    marks = ["from common import", "class Config(", "# The method", "# The recipe", "def check(", "- Model",
             "def __init__", "def forward(", "def mask(", "def encode(", "def decode(", "def target(", "def loss(",
             "def prepare(", "def reconstruct(", "- Training", "def main("]
    start = text.find("- Model")
    places = [text.find(mark, start if mark.startswith(("def __init__", "def forward", "def mask")) else 0)
              for mark in marks]
    assert min(places) >= 0 and places == sorted(places), dict(zip(marks, places, strict=True))


@pytest.mark.parametrize("name", [*METHODS, "models", "data", "finetune"])
def test_two_files_fit_a_screen(name):
    wide = [line for line in text_of(name).splitlines() if len(line) > 100]
    assert not wide, wide


def test_shape_changing_lines_say_the_shape():
    """Of files that hold models and methods: a line that reshapes, permutes, gathers or concatenates tensors ends in a
    comment with a shape."""
    changing = re.compile(r"\.(reshape|view|permute|transpose|unflatten|flatten|unsqueeze|squeeze|unbind|gather)\(|"
                          r"torch\.(cat|stack)\(|F\.(interpolate|unfold|one_hot)\(")
    found = []
    for name in (*METHODS, "finetune", "models", "common.evaluate", "common.neighbours", "common.backbones"):
        lines = text_of(name).splitlines()
        for i, line in enumerate(lines):
            code = line.partition("  # ")[0]
            harmless = "weight" in line or ("return" in code and "def " in lines[i - 1])
            statement = line + (lines[i + 1] if i + 1 < len(lines) else "")  # a call may end on the next line
            if changing.search(code) and not harmless and not re.search(r"#.*\(.*\)", statement):
                found.append(f"{name}:{i + 1}: {line.strip()}")
    assert not found, "\n".join(found)


# What a stranger would find


def tracked():
    try:
        names = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, text=True,
                               capture_output=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [ROOT / name for name in names if (ROOT / name).is_file()]


def test_no_file_names_a_path_of_one_machine():
    needles = [b"/" + word + b"/" for word in (b"work", b"root", b"home")]  # written so that this file passes
    found = [(path.name, needle) for path in tracked() for needle in needles
             if path.suffix not in (".npz", ".png") and needle in path.read_bytes()]
    assert not found
