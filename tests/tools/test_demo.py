"""demo.py: what it runs, what it does not run again, and the tables it prints. The runs themselves are made up."""

import json
import types
from pathlib import Path

import pytest
from conftest import ROOT

from tools import demo


@pytest.fixture
def commands(monkeypatch, tmp_path):
    """Every command that demo.py runs; each leaves the files of a run, and 50 %, or 40 % from scratch. Seed 13 fails.
    What is written goes to a temporary folder."""
    ran = []

    def run(words, env, stdout, stderr):
        out = Path(words[words.index("--out") + 1])
        (out / "result.json").write_text(json.dumps({"top1": 40 if "scratch" in out.name else 50}))
        (out / "log.jsonl").write_text('{"step": 100, "loss": 2.0}\n{"step": 1250, "loss": 1.0}\n')
        (out / "pictures").mkdir(exist_ok=True)
        (out / "pictures" / "step.png").touch()
        ran.append(" ".join(words[1:]))
        return types.SimpleNamespace(returncode=int(" --seed 13 " in ran[-1]))

    (tmp_path / "results").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo.subprocess, "run", run)
    monkeypatch.setattr(demo.figures, "demo", lambda *given: None)
    return ran


def test_learns_compares_equal_runs(commands, capsys):
    """Both arms are the same commands, but for where they start: at a pre-training, or at one stopped at once."""
    demo.main(["--what", "learns", "--seeds", "0 1 2", "--out", "runs", "--jobs", "2"])
    each = 2 * (1 + len(demo.TESTS))  # two encoders, and what they are put to
    assert len(commands) == 3 * len(demo.LEARNS) * each
    pretrained, scratch = ([c for c in commands if f"/{arm}" in c] for arm in ("pre-trained", "scratch"))
    stopped = [c for c in scratch if "finetune.py" not in c]
    assert len(stopped) == 3 * len(demo.LEARNS) and all(" --max_steps 1 " in c for c in stopped)
    alike = [c.replace(" --max_steps 1 ", " ") if c in stopped else c for c in scratch]
    assert sorted(pretrained) == sorted(c.replace("/scratch", "/pre-trained") for c in alike)
    record = json.loads(Path("results/learns.json").read_text())
    tops = {test: {"pre-trained": 50, "scratch": 40} for test in demo.TESTS}
    ends = {"log": [{"step": 100, "loss": 2.0}, {"step": 1250, "loss": 1.0}]}
    assert record["results"] == {name: dict.fromkeys("012", tops | ends) for name in demo.LEARNS}
    assert "| UM-MAE PVT | 3 | 50.0 (50.0 to 50.0) | 40.0 (40.0 to 40.0) |" in capsys.readouterr().out


def test_learns_goes_on_where_it_was_stopped(commands):
    """A command that failed, or that is another one than before, runs; one that ended well does not run again."""
    with pytest.raises(SystemExit, match="failed"):
        demo.main(["--what", "learns", "--seeds", "0 13", "--out", "runs", "--jobs", "1"])
    done = [c for c in commands if " --seed 0 " in c]
    assert len(done) == 2 * (1 + len(demo.TESTS)) * len(demo.LEARNS) and " --resume" in commands[-1]
    commands.clear()
    demo.main(["--what", "learns", "--seeds", "0", "--out", "runs"])
    assert not commands
    for seed in (1, 2, 2):
        demo.run("mae.py", "--seed", seed, out=Path("runs/one"), again="--resume")
    assert len(commands) == 2


def test_learns_from_longer_pretraining(commands, capsys):
    """Of some methods, beside what shorter ones left."""
    for epochs in (2, 8):
        demo.main(["--what", "learns", "--epochs", str(epochs), "--methods", "LUT ViT", "--out", "runs"])
    long = [c for c in commands if c.startswith("lut.py") and " --epochs 8 --warmup_epochs 0.64 " in c]
    assert len(long) == 2 and len(commands) == 2 * 2 * (1 + len(demo.TESTS))
    record = json.loads(Path("runs/learns_8_epochs.json").read_text())
    assert list(record["results"]) == list(record["pretraining"]) == ["LUT ViT"]
    with pytest.raises(SystemExit, match="2"):
        demo.main(["--what", "learns", "--methods", "LUT ViT,BEiT"])
    assert "--methods: BEiT is not one of MAE ViT, " in capsys.readouterr().err


def test_demo_runs_everything_anew(commands):
    for _ in range(2):
        demo.main(["--out", "runs"])
    assert len(commands) == 2 * (1 + 2 * len(demo.ARMS)) and all("--overwrite" in c for c in commands)


@pytest.mark.parametrize("name", ["learns.json", "learns_8_epochs.json"])
def test_readme_shows_what_was_measured(name):
    results = json.loads((ROOT / "results" / name).read_text())["results"]
    assert demo.learns_table(results) in (ROOT / "README.md").read_text()
