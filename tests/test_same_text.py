"""What keeps the files alike: set-up and step are the same text everywhere, departures are listed, files stay short."""

import difflib
import re
import subprocess

import pytest
from conftest import ROOT

METHODS = [name for name in ("mae", "simmim", "um_mae", "fastmim", "lut") if (ROOT / f"{name}.py").exists()]
LIMITS = {"mae": 260, "simmim": 250, "um_mae": 320, "fastmim": 310, "lut": 320, "finetune": 340, "analyze": 360,
          "weights": 240, "dense": 250, "models": 520, "data": 260, "engine": 300, "bench": 265,
          "evaluate": 240, "protocols": 170, "backbones": 280}
LIMITS |= {"checkpoint": 200, "layouts": 250, "exports": 170, "tensorfile": 100}


def path_of(name):
    return next(path for room in (".", "common", "tools") if (path := ROOT / room / f"{name}.py").exists())


def text_of(name):
    return path_of(name).read_text()


def block(name, first, last, own=()):
    """Lines of a file from the one that holds `first` to the one that holds `last`; the words `own` become one word."""
    lines = [line.rstrip() for line in text_of(name).splitlines()]
    for word in own:  # in code, not in comments: those may well speak of MAE
        parts = [line.partition("  # ") for line in lines]
        lines = [re.sub(rf"\b{word}\b", "METHOD", code) + mark + comment for code, mark, comment in parts]
    begin = next(i for i, line in enumerate(lines) if first in line)
    end = next(i for i, line in enumerate(lines) if last in line and i > begin)
    return lines[begin : end + 1]


def same(one, two, names):
    assert one == two, "\n".join(difflib.unified_diff(one, two, *names, lineterm=""))


def class_of(name):
    """The class that `main` builds: MAE, SimMIM, ..."""
    return re.search(r"model = (\w+)\(cfg\)\.to\(run\.device\)", text_of(name))[1]


@pytest.mark.parametrize("name", METHODS)
def test_main_is_the_same_text_in_every_method_file(name):
    """From the set-up to the last line; but for the name of the model, and a line for a teacher after the step."""
    reference, here = (block(n, "# Set-up", 'if __name__ == "__main__":', own=(class_of(n),)) for n in ("mae", name))
    assert len(reference) > 50 and any("backward()" in line for line in reference)
    here = [line for line in here if "ema" not in line.lower()]  # LUT's teacher, which `diff` is to show
    same(reference, here, ("mae.py", f"{name}.py"))


def test_finetune_steps_as_the_methods_do():
    """From backward to the log: what may not differ between pre-training and fine-tuning."""
    first, last = "run.scaler.scale(part * run.world).backward()", "engine.log(cfg, run, step"
    one, two = (block(name, first, last) for name in ("mae", "finetune"))
    assert len(one) > 10
    two = [line for line in two if "ema" not in line.lower()]  # the moving average, which `diff` is to show
    same(one, two, ("mae.py", "finetune.py"))


@pytest.mark.parametrize("name", METHODS)
def test_sections_come_in_the_same_order(name):
    text = text_of(name)
    marks = ["import engine", "class Config(", "- Model", "def reconstruct(", "- Training", "def main("]
    places = [text.find(mark) for mark in marks]
    assert min(places) >= 0 and places == sorted(places), dict(zip(marks, places, strict=True))
    parts = ["embed", "mask", "encode", "decode", "target", "loss"]
    parts[:2] = ["mask", "embed"] if name == "um_mae" else parts[:2]  # it drops pixels, and then embeds what is left
    inside = [text.find(f"    def {part}(self") for part in parts]
    found = [place for place in inside if place >= 0]  # a method may do without one of them
    assert len(found) >= 4 and found == sorted(found)


@pytest.mark.parametrize("name", METHODS)
def test_no_method_imports_another(name):
    imported = set(re.findall(r"^(?:import|from) (\w+)", text_of(name), re.M))
    assert not imported & (set(METHODS) | {"finetune", "analyze", "dense"})


@pytest.mark.parametrize("name", LIMITS)
def test_files_stay_short(name):
    lines = text_of(name).count("\n")
    assert lines <= LIMITS[name], f"{name}.py has {lines} lines, its limit is {LIMITS[name]}"


def marks():
    """[(file, text of the line behind # DIFF:)]"""
    found = []
    for path in sorted(path for room in ("", "common/", "tools/") for path in ROOT.glob(f"{room}*.py")):
        for line in path.read_text().splitlines():
            if "# DIFF: " in line:
                found.append((path.name, " ".join(line.split("# DIFF: ")[1].strip('" ').split())))
    return found


def test_every_departure_is_listed_in_the_readme():
    readme = ROOT / "README.md"
    if not readme.exists():
        pytest.skip("README.md is not written yet")
    rows = [" ".join(line.split()) for line in readme.read_text().splitlines() if line.startswith("|")]
    missing = [(name, text) for name, text in marks() if not any(name in row and text in row for row in rows)]
    assert marks() and not missing, missing


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


def test_shape_changing_lines_of_the_library_say_the_shape():
    """Of files that hold models and methods: a line that reshapes, permutes, gathers or concatenates tensors ends in a
    comment with a shape."""
    changing = re.compile(r"\.(reshape|view|permute|transpose|unflatten|flatten|unsqueeze|squeeze|unbind|gather)\(|"
                          r"torch\.(cat|stack)\(|F\.(interpolate|unfold|one_hot)\(")
    found = []
    for name in {*METHODS, "finetune", "evaluate", "protocols", "models", "backbones"}:
        lines = text_of(name).splitlines()
        for i, line in enumerate(lines):
            code = line.partition("  # ")[0]
            harmless = "weight" in line or ("return" in code and "def " in lines[i - 1])
            statement = line + (lines[i + 1] if i + 1 < len(lines) else "")  # a call may end on the next line
            if changing.search(code) and not harmless and not re.search(r"#.*\(.*\)", statement):
                found.append(f"{name}.py:{i + 1}: {line.strip()}")
    assert not found, "\n".join(found)
