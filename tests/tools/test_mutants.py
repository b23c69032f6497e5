"""tools/mutants.py: which mistakes are seen, by which test, and what is made of them."""

import json
import shlex

import pytest

from tools import mutants
from tools.trials import finish, start


def test_a_mistake_is_caught_and_what_an_earlier_call_found_stays(tmp_path):
    """By a real test, in a real process."""
    harmless, gone = {"caught_by": None, "harmless": True}, {"caught_by": None, "harmless": False}
    before = {"MAE.loss half_precision": harmless, "a mistake that the list no longer has": gone}
    (tmp_path / "numbers.json").write_text(json.dumps({"commands": ["one"], "mutants": before}))
    words = ["--only", "neighbours wrong_axis", "--json", tmp_path / "numbers.json"]
    code, out, err = finish(start("-m", "tools.mutants", *words))
    assert code == 0 and "caught 1 of 1 that are not harmless; survivors: none" in out, err
    record = json.loads((tmp_path / "numbers.json").read_text())
    [caught] = record["mutants"].keys() - before.keys()
    assert record["mutants"][caught]["caught_by"].startswith("tests/common/test_neighbours.py::test_")
    assert record["mutants"]["MAE.loss half_precision"] == harmless and len(record["mutants"]) == 2
    assert record["results"] == {"mistakes in": {"common/neighbours.py": {"caught": "1 of 1"}}}
    assert record["commands"] == ["one", f"python -m tools.mutants {shlex.join(map(str, words))}"]


def test_what_is_said_of_survivors():
    rows = {"a x": ("t", False), "a y": (None, False), "b": (None, True), "c": ("t", True)}
    found = {name: {"caught_by": test, "harmless": harmless} for name, (test, harmless) in rows.items()}
    assert mutants.summary(found) == ("caught 1 of 2 that are not harmless; survivors: a y; "
                                      "called harmless, and caught: c")
    known = [{"name": name, "file": "a.py" if name[0] == "a" else "b.py"} for name in rows]
    assert mutants.by_file(found, known) == {"a.py": {"caught": "1 of 2"}}


FILES = {"place.py": "def double(x):\n    return 2 * x\n",
         "test_place.py": "import time\nimport place\n\n"
                          "def test_right():\n    assert place.double(3) == 6\n\n"
                          "def test_wrong_anyway():\n    assert place.double(3) == 7\n\n"
                          "def test_hangs():\n    while place.double(1) == 5:\n        time.sleep(1)\n"}
DRIVER = """
import os, sys
import pytest
from tools import mutants
os.chdir({folder!r})
sys.path.insert(0, {folder!r})
mutants.SECONDS = 3
mutant = dict(file="place.py", name="double x", old="2 * x", new={new!r}, tests=["test_place.py"])
trying = mutants.Trials([mutant], 1, lambda mutant, row: None)
words = ["-q", "-s", "-p", "no:cacheprovider", "-k", {tests!r}, "test_place.py"]
pytest.main(words, plugins=[trying])
print(trying.found, trying.errors)
"""


@pytest.mark.parametrize("new,tests,caught_by,errors", [
    ("3 * x", "right", "'test_place.py::test_right'", "[]"),
    ("2 * x + 0", "right", "None", "[]"),
    ("3 * x", "anyway", "None", "['test_place.py::test_wrong_anyway fails without a mistake, too: "),
    ("5 * x", "hangs", "None, 'harmless': False, 'ended': 'exit code -9'", "[]")])
def test_only_a_test_that_passes_without_the_mistake_counts(tmp_path, new, tests, caught_by, errors):
    """And no test that hangs."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "driver.py").write_text(DRIVER.format(folder=str(tmp_path), new=new, tests=tests))
    code, out, err = finish(start(tmp_path / "driver.py"))
    assert code == 0 and f"'caught_by': {caught_by}" in out and f"}}}} {errors}" in out, (out, err)
