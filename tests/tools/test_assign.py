"""tools/assign.py: assignments that are cut from the files of the project, and the mistakes that their tests catch."""

import ast

import yaml
from conftest import ROOT

MUTANTS = yaml.safe_load((ROOT / "tests" / "mutants.yaml").read_text())


# Mistakes


def test_every_mutant_is_one_change_of_one_place():
    """Its text is found exactly once, what comes in its place is Python, and its tests exist."""
    sources = {name: (ROOT / name).read_text() for name in {mutant["file"] for mutant in MUTANTS}}
    names = [mutant["name"] for mutant in MUTANTS]
    assert len(set(names)) == len(names) > 200
    for mutant in MUTANTS:
        source = sources[mutant["file"]]
        assert source.count(mutant["old"]) == 1 and mutant["new"] != mutant["old"], mutant["name"]
        ast.parse(source.replace(mutant["old"], mutant["new"]))
        assert mutant["tests"] and all((ROOT / path).is_file() for path in mutant["tests"]), mutant["name"]
