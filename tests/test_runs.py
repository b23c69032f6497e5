"""Whole runs: what a user gets wrong, what stops a run and how it goes on, and one recipe on 1, 2 and 4 processes.

Most runs happen in this process, or in a fork, because starting Python and torch takes longer than the run. Real
processes are used where they are the point: exit codes, signals, torchrun.
"""

import errno
import importlib
import itertools
import json
import os
import re
import resource
import runpy
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, equal, flags, log_of, snapshot
from matplotlib.figure import Figure

import finetune
import lut
import mae
import models
from common import config, engine, jpeg, optim
from tools import dense, show
from tools.trials import finish, fork, start, torchrun

SCRIPTS = {"mae": mae, "finetune": finetune}


@pytest.fixture
def words_of(tiny, tuned):
    """`words_of("mae", **changes)`: the words of a small run with everything random switched on."""
    def words(script, **changes):
        if script == "mae":
            return tiny(**{"crop_scale": "0.3,1", "clip_grad": 1, **changes})
        return tuned(**{"drop_path": 0.3, "mixup": 0.8, "cutmix": 1.0, "clip_grad": 1, **changes})
    return words


@pytest.fixture(scope="module")
def finished(tiny, tuned, tmp_path_factory):
    """{script: folder} of complete runs, to be copied and spoiled."""
    folders = {}
    for script, words in (("mae", tiny), ("finetune", tuned)):
        folders[script] = tmp_path_factory.mktemp("finished") / script
        SCRIPTS[script].main([str(w) for w in words(max_steps=2, out=folders[script])])
    return folders


def one_line(done, *names):
    """Exit code 2, and one line on stderr that says all the names."""
    assert done.code == 2, (done.code, done.out[-300:], done.err)
    assert len(done.err.splitlines()) == 1 and done.err.startswith("error: ") and "Traceback" not in done.err, done.err
    assert all(str(name) in done.err for name in names), done.err


# Bad input


BAD = [
    ("mae", {"mask_rato": 0.5}, ["--mask_rato", "mask_ratio"]),
    ("mae", {"config": ROOT / "configs" / "finetune_tiny.yaml"}, ["recipe of finetune.py", "mae.py is running"]),
    ("mae", {"config": ROOT / "configs" / "dense_tiny.yaml"}, ["recipe of python -m tools.dense"]),
    ("mae", {"save_minutes": ""}, ["--save_minutes"]),
    ("mae", {"logger": "printer"}, ["--logger", "tensorboard"]),
    ("mae", {"mask_ratio": "much"}, ["--mask_ratio", "float", "much"]),
    ("mae", {"mask_ratio": 1.0}, ["--mask_ratio", "[0, 1)"]),
    ("mae", {"mask_ratio": -0.1}, ["--mask_ratio"]),
    ("mae", {"mask_ratio": "nan"}, ["--mask_ratio"]),
    ("mae", {"patch_size": 5}, ["--patch_size", "5", "16x16"]),
    ("mae", {"patch_size": -4}, ["--patch_size", "-4"]),
    ("mae", {"img_size": "16x18"}, ["--patch_size", "16x18"]),
    ("mae", {"in_chans": 0}, ["--in_chans"]),
    ("mae", {"batch_size": 10}, ["--micro_batch", "--batch_size", "10"]),
    ("mae", {"batch_size": 64}, ["--batch_size", "36"]),
    ("mae", {"data": "/no/such/folder"}, ["--data", "/no/such/folder"]),
    ("mae", {"data": ROOT / "configs"}, ["--data", "no images"]),
    ("mae", {"config": "/no/such.yaml"}, ["/no/such.yaml"]),
    ("mae", {"model": "vit_x"}, ["--model", "vit_x", "vit_b"]),
    ("mae", {"mask": "stripes"}, ["--mask", "stripes"]),
    ("mae", {"target": "edges"}, ["--target", "edges"]),
    ("mae", {"target": "pca", "pca_dim": 49}, ["--pca_dim", "49", "48"]),
    ("mae", {"decoder_heads": 5}, ["--decoder_heads"]),
    ("mae", {"decoder_depth": 0}, ["--decoder_depth"]),
    ("mae", {"decoder_width": 0}, ["--decoder_width"]),
    ("mae", {"decoder_width": -4}, ["--decoder_width"]),
    ("mae", {"device": "tpu"}, ["--device", "tpu"]),
    ("mae", {"precision": "fp8"}, ["--precision", "fp8"]),
    ("mae", {"precision": "fp16"}, ["--precision", "fp16"]),
    ("mae", {"schedule": "linear"}, ["--schedule", "linear"]),
    ("mae", {"workers": -1}, ["--workers"]),
    ("mae", {"epochs": 0}, ["--epochs"]),
    ("mae", {"epochs": 1e-9}, ["--epochs"]),
    ("mae", {"warmup_epochs": -1}, ["--warmup_epochs"]),
    ("mae", {"betas": "1,2"}, ["--betas"]),
    ("mae", {"base_lr": -1}, ["--base_lr"]),
    ("mae", {"weight_decay": -1}, ["--weight_decay"]),
    ("mae", {"clip_grad": -1}, ["--clip_grad"]),
    ("mae", {"crop_scale": "0,1"}, ["--crop_scale"]),
    ("mae", {"crop_scale": "-1,1"}, ["--crop_scale"]),
    ("mae", {"crop_scale": "1,0.5"}, ["--crop_scale"]),
    ("mae", {"crop_scale": "2,3"}, ["--crop_scale"]),
    ("mae", {"flip": 2}, ["--flip"]),
    ("mae", {"seed": 10**20}, ["--seed"]),
    ("mae", {"img_size": 10**6}, ["--img_size", "1000000"]),
    ("mae", {"img_size": "32768x32768"}, ["--img_size", "32768x32768", "pixels"]),
    ("mae", {"decoder_width": 10**6}, ["--decoder_width", "1000000"]),
    ("mae", {"decoder_depth": 10**6}, ["--decoder_depth", "1000000"]),
    ("mae", {"in_chans": 10**6}, ["--in_chans", "1000000"]),
    ("mae", {"workers": 10**6}, ["--workers", "1000000"]),
    ("mae", {"epochs": 1e308}, ["--epochs", "1e+308"]),
    ("mae", {"timeout_minutes": 1e300}, ["--timeout_minutes"]),
    ("mae", {"data": "a" * 4000}, ["too long", "aaa"]),
    ("mae", {"out": "a" * 4000}, ["too long", "aaa"]),
    ("mae", {"config": "a" * 4000}, ["--config", "aaa"]),
    ("finetune", {"init": "a" * 4000}, ["too long", "aaa"]),
    ("finetune", {"batch_size": 10**13}, ["--batch_size"]),
    ("finetune", {"drop_pat": 0.1}, ["--drop_pat", "drop_path"]),
    ("finetune", {"init": "/no/such.pt"}, ["/no/such.pt"]),
    ("finetune", {"init": ROOT / "mae.py"}, ["mae.py"]),
    ("finetune", {"model": None}, ["--model"]),
    ("finetune", {"eval": "true"}, ["--eval", "--init"]),
    ("finetune", {"labels": 2}, ["--labels", "2"]),
    ("finetune", {"labels": 37}, ["--labels", "36"]),
    ("finetune", {"micro_batch": 1}, ["--micro_batch", "even"]),
    ("finetune", {"pool": "max"}, ["--pool", "max"]),
    ("finetune", {"head_norm": "group"}, ["--head_norm", "group"]),
    ("finetune", {"mode": "partial"}, ["--mode", "partial"]),
    ("finetune", {"split": "dev"}, ["--split", "dev"]),
    ("finetune", {"drop_path": 1.5}, ["--drop_path"]),
    ("finetune", {"drop_path": -0.1}, ["--drop_path"]),
    ("finetune", {"smoothing": 2}, ["--smoothing"]),
    ("finetune", {"mixup": -1}, ["--mixup"]),
    ("finetune", {"layer_decay": -1}, ["--layer_decay"]),
    ("finetune", {"shift": -1}, ["--shift"]),
    ("finetune", {"shift": 100}, ["--shift"]),
    ("finetune", {"random_erasing": 2}, ["--random_erasing"]),
    ("finetune", {"color_jitter": -1}, ["--color_jitter"]),
]


@pytest.mark.parametrize("script,changes,names", BAD, ids=lambda v: str(v)[:80] if isinstance(v, dict) else None)
def test_bad_input_is_one_line_and_writes_nothing(words_of, call, tmp_path, script, changes, names):
    done = call(SCRIPTS[script].main, words_of(script, **{"out": tmp_path / "run", "max_steps": 1, **changes}))
    one_line(done, *names)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text,names", [("mask_rato: 0.5", ["mask_rato", "mask_ratio", "recipe.yaml"]),
                                        ("mask_ratio: much", ["mask_ratio", "much"]),
                                        ("mask_ratio: [", ["recipe.yaml"])])
def test_bad_recipes(tiny, call, tmp_path, text, names):
    (tmp_path / "recipe.yaml").write_text(text)
    one_line(call(mae.main, tiny(config=tmp_path / "recipe.yaml", out=tmp_path / "run")), *names)
    assert [p.name for p in tmp_path.iterdir()] == ["recipe.yaml"]


def test_bad_input_ends_a_real_process_with_code_2(tiny, tuned, tmp_path, finished):
    """The same, seen from a shell; and what a used --out answers."""
    processes = {
        "mask_rato": start("mae.py", *tiny(mask_rato=0.5, out=tmp_path / "a")),
        "holds a run": fork("mae.py", *tiny(out=finished["mae"])),
        "/no/such.pt": start("finetune.py", *tuned(init="/no/such.pt", out=tmp_path / "b")),
    }
    before = snapshot(finished["mae"])
    for name, process in processes.items():
        code, _, err = finish(process)
        assert code == 2 and len(err.splitlines()) == 1 and name in err, err
    assert not list(tmp_path.iterdir()) and snapshot(finished["mae"]) == before


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_used_folder_is_left_alone_unless_told_otherwise(words_of, call, tmp_path, finished, script):
    out = shutil.copytree(finished[script], tmp_path / "run")
    before = snapshot(out)
    one_line(call(SCRIPTS[script].main, words_of(script, out=out)), out, "--resume", "--overwrite")
    assert snapshot(out) == before
    done = call(SCRIPTS[script].main, words_of(script, out=out, overwrite="true", max_steps=1, seed=5))
    assert done.code == 0 and torch.load(out / "last.pt")["step"] == 1 and len(log_of(out)) == 1
    assert not (out / "previous.last.pt").exists()


def test_overwrite_with_another_mistake_removes_nothing(tiny, tuned, call, tmp_path, finished):
    out = shutil.copytree(finished["mae"], tmp_path / "run")
    before = snapshot(out)
    one_line(call(mae.main, tiny(out=out, overwrite="true", mask_ratio=1.0)), "--mask_ratio")
    one_line(call(mae.main, tiny(out=out, overwrite="true", data="/none")), "/none")
    assert snapshot(out) == before


@pytest.mark.parametrize("script", SCRIPTS)
def test_out_below_a_file_is_refused(words_of, call, tmp_path, script):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        one_line(call(SCRIPTS[script].main, words_of(script, out=out)), "file")
    assert snapshot(tmp_path) == {"file": b"mine"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_out_without_permission_is_refused(tiny, call, tmp_path):
    tmp_path.chmod(0o500)
    try:
        one_line(call(mae.main, tiny(out=tmp_path / "run")), tmp_path)
    finally:
        tmp_path.chmod(0o700)


# A disk that fills


def test_a_full_disk_at_a_save_is_one_line(tiny, call, tmp_path):
    """No file may grow beyond 1 MB; last.pt needs 6."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, hard))
    try:
        done = call(mae.main, tiny(max_steps=1, out=tmp_path / "run"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    one_line(done, "last.pt")
    assert not [p.name for p in (tmp_path / "run").iterdir() if "last" in p.name or p.suffix == ".tmp"]


def test_a_full_disk_at_a_line_of_the_log_is_one_line(tiny, call, tmp_path, monkeypatch):
    import builtins
    def full(path, mode="r", *more, **options):
        if str(path).endswith("log.jsonl") and mode != "r":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return builtins.open(path, mode, *more, **options)

    monkeypatch.setattr(engine, "open", full, raising=False)
    one_line(call(mae.main, tiny(max_steps=2, out=tmp_path / "run")), "log.jsonl")


def test_a_full_disk_at_a_picture_is_one_line(tiny, call, tmp_path, monkeypatch):
    def full(figure, path, **options):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Figure, "savefig", full)
    one_line(call(mae.main, tiny(max_steps=1, out=tmp_path / "run")), "step_0000001.png")


# Resume


def stop_after(monkeypatch, step, number=signal.SIGTERM):
    """A real signal to this process, while it is in this step."""
    real = engine.Run.log
    def log(run, done, *rest):
        real(run, done, *rest)
        if done + 1 == step:
            signal.raise_signal(number)

    monkeypatch.setattr(engine.Run, "log", log)


def same_checkpoint(one, two):
    one, two = (torch.load(Path(path) / "last.pt") for path in (one, two))
    assert equal(one, two)


@pytest.mark.parametrize("script,changes", [("mae", {}), ("finetune", {}), ("finetune", {"head_norm": "batch"})],
                         ids=["mae", "finetune", "finetune with BatchNorm"])
def test_stopped_anywhere_and_resumed_is_as_if_never_stopped(words_of, call, tmp_path, monkeypatch, script, changes):
    """Three epochs of four steps: stopped after the first step, inside an epoch, at its end, and twice."""
    main = SCRIPTS[script].main
    assert call(main, words_of(script, out=tmp_path / "whole", **changes)).code == 0
    for stops in ([1], [3], [4], [10], [2, 7]):
        out = tmp_path / "-".join(map(str, stops))
        for stop in stops:
            with monkeypatch.context() as patch:
                stop_after(patch, stop)
                done = call(main, words_of(script, out=out, resume="true", **changes))
            assert done.code == 128 + signal.SIGTERM and done.err == ""
            assert "--resume" in done.out and torch.load(out / "last.pt")["step"] == stop + 1  # the step it was in
        assert call(main, words_of(script, out=out, resume="true", **changes)).code == 0
        same_checkpoint(tmp_path / "whole", out)
        one, two = ([{k: v for k, v in line.items() if k not in ("images_per_s", "data_wait")} for line in log_of(path)]
                    for path in (tmp_path / "whole", out))
        assert one == two  # nothing lost, nothing twice
        assert equal(*(torch.load(path / "encoder.pt") for path in (tmp_path / "whole", out)))


def test_a_finished_run_is_resumed_without_harm(tiny, call, tmp_path, finished):
    out = shutil.copytree(finished["mae"], tmp_path / "run")
    checkpoint = (out / "last.pt").read_bytes()
    assert call(mae.main, tiny(out=out, resume="true", max_steps=2)).code == 0
    assert (out / "last.pt").read_bytes() == checkpoint and len(log_of(out)) == 2


def test_resume_begins_where_there_is_nothing(tiny, call, tmp_path):
    assert call(mae.main, tiny(out=tmp_path / "run", resume="true", max_steps=1)).code == 0
    assert torch.load(tmp_path / "run" / "last.pt")["step"] == 1


def test_resume_on_other_micro_batches_and_workers_goes_the_same_way(tiny, call, tmp_path):
    assert call(mae.main, tiny(out=tmp_path / "whole")).code == 0
    assert call(mae.main, tiny(out=tmp_path / "run", max_steps=5)).code == 0
    words = tiny(out=tmp_path / "run", resume="true", micro_batch=8, workers=2)
    assert call(mae.main, words).code == 0
    one, two = (log_of(tmp_path / name) for name in ("whole", "run"))
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in two] == pytest.approx([line[key] for line in one], rel=1e-5)


@pytest.mark.parametrize("number,script,changes", [
    (signal.SIGTERM, "mae", {"workers": 2}), (signal.SIGINT, "mae", {}), (signal.SIGINT, "finetune", {"workers": 2})],
    ids=["SIGTERM-mae-workers", "SIGINT-mae", "SIGINT-finetune-workers"])
def test_a_signal_to_a_process(words_of, call, tmp_path, number, script, changes):
    """The whole process group gets it, workers included, as from a terminal."""
    out = tmp_path / "run"
    begin = start if number == signal.SIGTERM else fork
    process = begin(f"{script}.py", *words_of(script, out=out, epochs=50, **changes))
    for line in process.stdout:
        if line.startswith("step 6/"):
            break
    os.killpg(process.pid, number)
    code, rest, err = finish(process)
    assert code == 128 + number and err == "", err
    stopped = torch.load(out / "last.pt")["step"]
    assert 6 <= stopped < 200 and f"stopped after step {stopped} of 200" in rest and "--resume" in rest
    assert not list(out.glob("*.tmp"))

    main, steps = SCRIPTS[script].main, stopped + 3
    for name, more in (("run", {"resume": "true"}), ("whole", {})):
        words = words_of(script, out=tmp_path / name, epochs=50, max_steps=steps, **more)
        assert call(main, words).code == 0
    same_checkpoint(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("changes,names", [({"decoder_width": 64}, ["decoder_width", "32", "64"]),
                                           ({"model": "vit_ti"}, ["model", "vit_tiny", "vit_ti"]),
                                           ({"seed": 3}, ["seed"]), ({"batch_size": 4}, ["batch_size"])], ids=repr)
def test_resume_with_other_options_is_refused(tiny, call, tmp_path, finished, changes, names):
    out = shutil.copytree(finished["mae"], tmp_path / "run")
    before = snapshot(out)
    one_line(call(mae.main, tiny(out=out, resume="true", **changes)), *names)
    assert snapshot(out) == before


def respoil(**changes):
    """Change entries of a last.pt."""
    def spoil(path):
        saved = torch.load(path)
        for key, value in changes.items():
            if value is None:
                del saved[key]
            else:
                saved[key] = value(saved[key]) if callable(value) else value
        torch.save(saved, path)
    return spoil


SPOILED = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:1000]),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("hello"),
    "list": lambda path: torch.save([1, 2], path),
    "nothing": lambda path: torch.save({}, path),
    "no config": respoil(config=None), "no optimizer": respoil(optimizer=None), "no step": respoil(step=None),
    "no model": respoil(model=None), "odd config": respoil(config=[1]), "odd step": respoil(step="three"),
    "negative step": respoil(step=-1), "odd model": respoil(model=3),
    "lost tensor": respoil(model=lambda m: dict(list(m.items())[1:])),
    "nan": respoil(model=lambda m: {**m, "mask_token": m["mask_token"] * float("nan")}),
    "other shape": respoil(model=lambda m: {**m, "mask_token": torch.zeros(1, 1, 64)}),
    "odd optimizer": respoil(optimizer=lambda o: {**o, "state": {0: {"exp_avg": torch.zeros(7, 9)}}}),
    "odd groups": respoil(optimizer=lambda o: {**o, "param_groups": 3}),
    "encoder": lambda path: shutil.copy(path.with_name("encoder.pt"), path),
    "step True": respoil(step=True), "step beyond": respoil(step=13),
    "empty state": respoil(optimizer=lambda o: {**o, "state": {}}),
    "maximize": respoil(optimizer=lambda o: {
        **o, "param_groups": [{**group, "maximize": True} for group in o["param_groups"]]}),
    "sparse": respoil(model=lambda m: {**m, "mask_token": m["mask_token"].to_sparse()}),
    "doubled": respoil(config=lambda c: {**c, "mask": doubled(40)}), "odd images": respoil(images=[1]),
    "odd sum": respoil(sums={"loss": float("nan")}), "odd sums": respoil(sums={"loss": "1"}),
    "odd log": respoil(logged_step=9), "odd epochs": respoil(steps_per_epoch="5"),
}


def doubled(times):
    """A list that a few hundred bytes hold, and no memory could print."""
    value = "ab"
    for _ in range(times):
        value = [value, value]
    return value


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
def test_a_spoiled_checkpoint_is_refused_in_one_line(tiny, call, tmp_path, finished, spoil):
    out = shutil.copytree(finished["mae"], tmp_path / "run")
    (out / "previous.last.pt").unlink(missing_ok=True)
    spoil(out / "last.pt")
    before = snapshot(out)
    one_line(call(mae.main, tiny(out=out, resume="true", max_steps=4)), "last.pt")
    assert snapshot(out) == before


def test_a_damaged_checkpoint_with_a_predecessor_goes_on_from_there(tiny, call, tmp_path):
    assert call(mae.main, tiny(out=tmp_path / "whole")).code == 0
    out = tmp_path / "run"
    assert call(mae.main, tiny(out=out, max_steps=6, save_epochs=0.5)).code == 0  # saved after 2, 4 and 6 steps
    (out / "last.pt").write_bytes((out / "last.pt").read_bytes()[:-1000])
    done = call(mae.main, tiny(out=out, resume="true"))
    assert done.code == 0 and done.err == ""
    assert sum("previous.last.pt" in line for line in done.out.splitlines()) == 1
    assert "4 to 12" in done.out
    same_checkpoint(tmp_path / "whole", out)
    assert [line["step"] for line in log_of(out)] == list(range(1, 13))


@pytest.mark.parametrize("spoil", ["encoder", "nan", "maximize", "empty"])
def test_a_refused_checkpoint_with_a_predecessor_goes_on_from_there(tiny, call, tmp_path, finished, spoil):
    """It is kept under another name, and does not take the place of its predecessor."""
    out = tmp_path / "run"
    assert call(mae.main, tiny(out=out, max_steps=3, save_epochs=0.25)).code == 0  # saved after every step
    SPOILED[spoil](out / "last.pt")
    bad, good = (out / "last.pt").read_bytes(), (out / "previous.last.pt").read_bytes()
    done = call(mae.main, tiny(out=out, resume="true", max_steps=3, save_epochs=100))
    assert done.code == 0 and "2 to 3" in done.out
    [line] = [line for line in done.out.splitlines() if "going on from" in line]
    assert line.startswith(str(out / "last.pt")) and line.endswith("previous.last.pt")
    assert (out / "refused.last.pt").read_bytes() == bad and (out / "previous.last.pt").read_bytes() == good
    assert torch.load(out / "last.pt")["step"] == 3


def test_two_bad_checkpoints_are_both_named(tiny, call, tmp_path, finished):
    out = shutil.copytree(finished["mae"], tmp_path / "run")
    for name in ("last.pt", "previous.last.pt"):
        shutil.copy(out / "encoder.pt", out / name)
    before = snapshot(out)
    one_line(call(mae.main, tiny(out=out, resume="true", max_steps=4)), "run/last.pt", "run/previous.last.pt")
    assert snapshot(out) == before


@pytest.mark.parametrize("script", ["mae", "finetune"])
@pytest.mark.parametrize("change", ["one more", "renamed"])
def test_resume_after_the_images_changed_is_refused(words_of, call, tmp_path, folder, script, change):
    images, out = shutil.copytree(folder, tmp_path / "images"), tmp_path / "run"
    words = {"data": images, "out": out, "max_steps": 1}
    assert call(SCRIPTS[script].main, words_of(script, **words)).code == 0
    first, number = images / "train" / "ant" / "0.png", len(list((images / "train").rglob("*.png")))
    if change == "renamed":
        first.rename(first.with_name("zzz.png"))
    else:
        shutil.copy(first, first.with_name("new.png"))
    before = snapshot(out)
    names = [f"holds {number + 1} ", f"held {number} "]
    if change == "renamed":
        names = [f"holds {number} ", "held other ones"]
    one_line(call(SCRIPTS[script].main, words_of(script, **words, resume="true")), "--data", str(images), *names)
    assert snapshot(out) == before


def test_resume_on_processes_that_leave_out_a_batch_is_refused(tiny, call, tmp_path, folder):
    """35 images in pairs leave one, which makes another step on one process, and none on two."""
    images = shutil.copytree(folder, tmp_path / "images")
    (images / "train" / "ant" / "0.png").unlink()
    words = {"data": images, "batch_size": 2, "micro_batch": 1, "drop_last": "false", "out": tmp_path / "run"}
    assert call(mae.main, tiny(max_steps=1, **words)).code == 0
    before = snapshot(tmp_path / "run")
    code, _, err = finish(start(*torchrun(2, "mae.py", *tiny(resume="true", **words))))
    assert code != 0 and "error: --resume with 2 process(es), whose epochs have 17 steps, and had 18" in err, err
    assert snapshot(tmp_path / "run") == before
    assert call(mae.main, tiny(max_steps=2, resume="true", **words)).code == 0


def test_a_checkpoint_of_an_earlier_version_is_resumed(tiny, call, tmp_path, finished):
    """What it lacks is not checked."""
    out = shutil.copytree(finished["mae"], tmp_path / "run")
    respoil(images=None, sums=None, logged_step=None, steps_per_epoch=None)(out / "last.pt")
    assert call(mae.main, tiny(out=out, resume="true", max_steps=3)).code == 0
    assert torch.load(out / "last.pt")["step"] == 3


def test_a_line_of_the_log_covers_the_same_steps_after_a_resume(tiny, call, tmp_path, monkeypatch):
    assert call(mae.main, tiny(out=tmp_path / "whole", log_every=5)).code == 0
    out = tmp_path / "run"
    for stop in (3, 8):
        with monkeypatch.context() as patch:
            stop_after(patch, stop)
            assert call(mae.main, tiny(out=out, resume="true", log_every=5)).code == 128 + signal.SIGTERM
    assert call(mae.main, tiny(out=out, resume="true", log_every=5)).code == 0
    one, two = ([(line["step"], line["loss"]) for line in log_of(path)] for path in (tmp_path / "whole", out))
    assert one == two and [step for step, _ in one] == [5, 10, 12]


def test_the_parts_of_a_loss_cover_the_same_steps_after_a_resume(tiny, call, tmp_path, monkeypatch):
    words = dict(log_every=5, max_steps=5)
    assert call(lut.main, tiny(out=tmp_path / "whole", **words)).code == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        assert call(lut.main, tiny(out=tmp_path / "run", **words)).code == 128 + signal.SIGTERM
    assert call(lut.main, tiny(out=tmp_path / "run", resume="true", **words)).code == 0
    for name in ("pixel_loss", "context_loss"):
        one, two = (log_of(tmp_path / out)[0][name] for out in ("whole", "run"))
        assert one == pytest.approx(two, rel=1e-6)


def test_two_runs_in_one_folder_are_refused(tiny, call, tmp_path):
    out = tmp_path / "run"
    process = fork("mae.py", *tiny(out=out, epochs=500))
    for line in process.stdout:
        if line.startswith("step 3/"):
            break
    for words in ({"resume": "true"}, {"overwrite": "true"}, {}):
        code, _, err = finish(fork("mae.py", *tiny(out=out, epochs=500, **words)))
        assert code == 2 and err.count("\n") == 1 and f"--out {out} is in use by another run" in err, err
    os.killpg(process.pid, signal.SIGTERM)
    code, _, err = finish(process)
    assert code == 128 + signal.SIGTERM and err == "" and not (out / ".lock").exists()
    steps = [line["step"] for line in log_of(out)]
    assert steps == list(range(1, len(steps) + 1)) and torch.load(out / "last.pt")["step"] == steps[-1]


LINKS = ["last.pt", "log.jsonl", "config.yaml", "encoder.pt", "previous.last.pt", "result.json", ".writable",
         "last.pt.tmp", "pictures"]


@pytest.mark.parametrize("how", ["new", "overwrite", "resume"])
def test_nothing_is_written_through_a_link(tiny, call, tmp_path, finished, how):
    """Each name in turn leads to a file elsewhere, or to none."""
    for name in LINKS:
        for victim in (tmp_path / "victim", tmp_path / "none"):
            out = tmp_path / f"{name} to {victim.name}"
            shutil.copytree(finished["mae"], out) if how == "resume" else out.mkdir()
            shutil.rmtree(out / name) if (out / name).is_dir() else (out / name).unlink(missing_ok=True)
            (tmp_path / "victim").write_text("mine")
            (out / name).symlink_to(victim)
            words = {how: "true"} if how != "new" else {}
            done = call(mae.main, tiny(out=out, max_steps=3, **words))
            assert done.code in (0, 2) and done.err.count("\n") <= 1, (name, done.err)
            assert (tmp_path / "victim").read_text() == "mine" and not (tmp_path / "none").exists(), name


def test_half_a_line_in_the_log_does_not_stop_a_resume(tiny, call, tmp_path, finished):
    """What a power cut leaves. The log is for people; the checkpoint is what counts."""
    out = shutil.copytree(finished["mae"], tmp_path / "run")
    with open(out / "log.jsonl", "a") as file:
        file.write('{"step": 3, "epo')
    assert call(mae.main, tiny(out=out, resume="true", max_steps=4)).code == 0
    assert [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()] == [1, 2, 3, 4]


# NaN


def test_weights_that_are_not_finite_are_not_saved(tiny, call, tmp_path, monkeypatch):
    """A step may spoil them although its loss and gradient were finite."""
    out, real = tmp_path / "run", optim.Schedule.lr
    monkeypatch.setattr(optim.Schedule, "lr", lambda self, step: 1e39 if step == 3 else real(self, step))
    done = call(mae.main, tiny(out=out, save_epochs=0.5))
    one_line(done, "step 3 ", "not finite", "last.pt/model/")
    saved = torch.load(out / "last.pt")
    assert saved["step"] == 2 and not list(out.glob("*.tmp"))
    monkeypatch.setattr(optim.Schedule, "lr", real)
    assert call(mae.main, tiny(out=out, resume="true", max_steps=4)).code == 0


def spoiled_loss(monkeypatch, step, value=float("nan")):
    """MAE.loss gives `value` in one step (of two micro-batches)."""
    real, calls = mae.MAE.loss, itertools.count()
    def loss(self, *words):
        if torch.is_grad_enabled() and next(calls) // 2 == step:
            return real(self, *words) * value
        return real(self, *words)

    monkeypatch.setattr(mae.MAE, "loss", loss)  # `prepare` has no gradients, and is not counted


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_nan_stops_the_run_before_it_reaches_the_weights(tiny, call, tmp_path, monkeypatch, value):
    assert call(mae.main, tiny(out=tmp_path / "good", max_steps=3, save_epochs=0.25)).code == 0
    spoiled_loss(monkeypatch, 3, value)
    done = call(mae.main, tiny(out=tmp_path / "run", save_epochs=0.25))
    one_line(done, "step 3", "last.pt", "--base_lr")
    same_checkpoint(tmp_path / "good", tmp_path / "run")


# One recipe, any machine


DRIVER = """
import hashlib, json, os, sys
import torch
import torch.distributed as dist
import data
import finetune
import lut
import mae

# The runs share one process group: a third one in the same process does not come about.
join, leave = dist.init_process_group, dist.destroy_process_group
dist.init_process_group = lambda *a, **k: dist.is_initialized() or join(*a, **k)
dist.destroy_process_group = lambda: None
RANK, FOLDER = int(os.environ.get("RANK", 0)), sys.argv[1]

def watch(cls, folder):
    # A model that notes a hash of every (image as cropped, its row of noise, which tells its position in the batch)
    forward = cls.forward
    def noted(self, imgs, noise=None):
        if torch.is_grad_enabled() and noise is not None:  # finetune.py evaluates without noise
            with open(os.path.join(folder, f"seen.{RANK}"), "a") as file:
                for img, row in zip(imgs, noise):
                    file.write(hashlib.sha256(img.numpy().tobytes() + row.numpy().tobytes()).hexdigest() + "\\n")
        return forward(self, imgs, noise)
    cls.forward = noted
    return lambda: setattr(cls, "forward", forward)

for name, words in json.loads(sys.argv[2]):
    folder = os.path.join(FOLDER, name)
    os.makedirs(folder, exist_ok=True)
    script = {"mae": mae, "finetune": finetune}[name.split("_")[0]]
    restore = watch(mae.MAE if script is mae else finetune.Classifier, folder)
    script.main(words + ["--out", os.path.join(folder, "run")])
    restore()
if dist.is_initialized():
    dist.barrier()
    leave()
"""


def shared_runs(tiny, tuned, init):
    """[(name, words)]: what is compared between 1, 2 and 4 processes."""
    common = dict(max_steps=5, micro_batch=2, clip_grad=0.5)
    return [("mae", tiny(**common, crop_scale="0.3,1", mask="block", probe_epochs=1)),
            ("mae_tail", tiny(max_steps=3, batch_size=24, micro_batch=6, drop_last="false")),
            ("finetune", tuned(**common, drop_path=0.3)),
            ("finetune_eval", tuned(init=init, model=None, patch_size=None, eval="true", micro_batch=2))]


@pytest.fixture(scope="module")
def on_one(tiny, tuned, tmp_path_factory, finished):
    folder = tmp_path_factory.mktemp("one")
    (folder / "driver.py").write_text(DRIVER)
    runs = shared_runs(tiny, tuned, str(finished["finetune"] / "encoder.pt"))
    code, _, err = finish(fork(folder / "driver.py", folder, json.dumps(runs)))
    assert code == 0 and err == "", err
    return folder


def seen(folder):
    return sorted(line for path in folder.glob("seen.*") for line in path.read_text().splitlines())


@pytest.mark.parametrize("world", [2, 4])
def test_processes_share_one_recipe(tiny, tuned, tmp_path, finished, on_one, world):
    (tmp_path / "driver.py").write_text(DRIVER)
    runs = shared_runs(tiny, tuned, str(finished["finetune"] / "encoder.pt"))
    code, _, err = finish(fork(tmp_path / "driver.py", tmp_path, json.dumps(runs), world=world), timeout=90)
    assert code == 0, err[-3000:]
    for name in ("mae", "mae_tail", "finetune"):
        assert len(list((tmp_path / name).glob("seen.*"))) == world  # everyone had work
        whole = seen(on_one / name)
        assert len(set(whole)) == len(whole) and seen(tmp_path / name) == whole, name  # images, crops, masks
        one, many = log_of(on_one / name / "run"), log_of(tmp_path / name / "run")
        assert len(one) == len(many) and len(one) >= 3
        for key in ("loss", "grad_norm", "lr"):
            assert [line[key] for line in many] == pytest.approx([line[key] for line in one], rel=2e-6), (name, key)
    for name in ("finetune_eval", "finetune"):
        one, many = (json.loads((path / name / "run" / "result.json").read_text()) for path in (on_one, tmp_path))
        assert one["images"] == many["images"] == 15  # no padding counted twice
        assert one == many or name == "finetune", name  # rounding may turn a guess of the trained one


@pytest.mark.parametrize("workers", [2, 4])
def test_workers_change_nothing(tiny, call, tmp_path, workers):
    assert call(mae.main, tiny(out=tmp_path / "none", max_steps=5, crop_scale="0.3,1")).code == 0
    assert call(mae.main, tiny(out=tmp_path / "some", max_steps=5, crop_scale="0.3,1", workers=workers)).code == 0
    same_checkpoint(tmp_path / "none", tmp_path / "some")


def test_two_runs_are_the_same_and_two_seeds_are_not(tiny, call, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert call(mae.main, tiny(out=tmp_path / name, max_steps=2, seed=seed)).code == 0
    same_checkpoint(tmp_path / "a", tmp_path / "b")
    assert not equal(*(torch.load(tmp_path / name / "encoder.pt")["model"] for name in "ac"))


def test_a_signal_to_torchrun_saves_and_another_number_of_processes_goes_on(tiny, call, tmp_path):
    out = tmp_path / "run"
    process = start(*torchrun(2, "mae.py", *tiny(out=out, epochs=50)))
    for line in process.stdout:
        if line.startswith("step 4/"):
            break
    process.send_signal(signal.SIGTERM)
    code, rest, err = finish(process)
    assert code != 0 and "--resume" in rest, err[-2000:]
    stopped = torch.load(out / "last.pt")["step"]
    assert 4 <= stopped < 200
    for name, more in (("run", {"resume": "true"}), ("whole", {})):
        assert call(mae.main, tiny(out=tmp_path / name, epochs=50, max_steps=stopped + 3, **more)).code == 0
    one, two = (log_of(tmp_path / name) for name in ("whole", "run"))
    assert [line["step"] for line in two] == list(range(1, stopped + 4))
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in two] == pytest.approx([line[key] for line in one], rel=1e-4)


NAN = """
import itertools, os, sys
import mae
real, calls = mae.MAE.loss, itertools.count()
def loss(self, *words):
    bad = next(calls) // 2 == 4 and os.environ["RANK"] == "1"  # two micro-batches a step
    return real(self, *words) * (float("nan") if bad else 1.0)
mae.MAE.loss, mae.prepare = loss, lambda model, imgs, noise: {}
mae.main(sys.argv[1:])
"""


def test_a_nan_on_one_of_two_processes_stops_both(tiny, call, tmp_path):
    (tmp_path / "nan.py").write_text(NAN)
    words = tiny(out=tmp_path / "run", save_epochs=0.25, micro_batch=2)
    begin = time.monotonic()
    code, _, err = finish(start(*torchrun(2, tmp_path / "nan.py", *words)))
    assert code != 0 and time.monotonic() - begin < 60
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "step 4" in errors[0] and "nan" in errors[0], err[-2000:]
    assert len(log_of(tmp_path / "run")) == torch.load(tmp_path / "run" / "last.pt")["step"] == 4
    codes = re.findall(r"exitcode\s*:\s*(-?\d+)", err)
    assert codes and set(codes) <= {"2", "-15"}, err[-2000:]  # 2, or torchrun's SIGTERM to the slower one


def test_bad_input_to_two_processes_is_said_once(tiny, tmp_path):
    code, _, err = finish(fork("mae.py", *tiny(out=tmp_path / "run", batch_size=9), world=2))
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    assert code != 0 and len(errors) == 1 and "--batch_size 9" in errors[0], err[-2000:]
    assert not (tmp_path / "run").exists()


def test_a_full_gpu_is_one_line_that_says_what_to_try(tiny, call, tmp_path, monkeypatch):
    """Of 8 images in two micro-batches, then one by one."""
    def loss(model, pred, target, mask):
        if torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return pred.new_zeros(())

    monkeypatch.setattr(mae.MAE, "loss", loss)
    for micro_batch, advice in ((4, "--micro_batch 2"), (1, "--activation_checkpointing")):
        done = call(mae.main, tiny(out=tmp_path / str(micro_batch), micro_batch=micro_batch))
        errors = [line for line in done.err.splitlines() if line.startswith("error:")]
        assert done.code == 2 and len(errors) == 1 and "Traceback" not in done.err
        assert errors[0].endswith(f"CUDA out of memory) for --micro_batch {micro_batch}; try {advice}")


# Recipes


RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
GIVEN = {name: ["--model", "vit_tiny", "--patch_size", "8"] for name in ("dense_tiny", "finetune_tiny")}  # else --init
GIVEN["cifar10_finetune"] = ["--model", "vit_tiny", "--patch_size", "4"]
GIVEN["fastmim_p_vit_l"] = ["--img_size", "192"]  # the largest of its three phases
GIVEN["fastmim_p_swin_l"] = ["--img_size", "192", "--window", "12"]


def script_of(recipe):
    """mae.py for mae_vit_b.yaml, um_mae.py for um_mae_...: the script with the longest name that fits."""
    known = sorted((path.stem for path in ROOT.glob("*.py")), key=len, reverse=True)
    stem = recipe.stem.removeprefix("cifar10_")
    name = next((name for name in known if stem.startswith(name)), None)
    protocols = dict.fromkeys(("linear", "partial", "scratch"), "finetune")
    others = {"tiny": "mae", "dense": "tools.dense", **protocols, "um": "simmim"}  # um_simmim: UM-MAE's comparison
    return importlib.import_module(name or others[stem.split("_")[0]])


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_can_be_planned(call, tmp_path, recipe):
    script = script_of(recipe)
    words = ["--config", recipe, "--plan", "--out", tmp_path / "run", *GIVEN.get(recipe.stem, [])]
    done = call(script.main, words)
    assert done.code == 0 and done.err == "", done.err
    assert "parameters" in done.out and "GFLOPs" in done.out
    assert not list(tmp_path.iterdir())

    # One rule for all: what --plan finds for as many GPUs as the recipe's command has
    cfg = config.parse(script.Config, "", ["--config", str(recipe)])
    comment = recipe.read_text()
    gpus = 8 if "--nproc-per-node 8" in comment else 1
    assert cfg.micro_batch == int(re.search(rf"on {gpus} GPU\(s\): --micro_batch (\d+)", done.out)[1])
    if told := re.search(r"Memory at micro_batch (\d+) in bf16: ([\d.]+) GB .* puts (\d+) on 24 GB less 2", comment):
        assert int(told[1]) == cfg.micro_batch
        one, many = (float(re.search(rf"--micro_batch {n} +([\d.]+) GB", done.out)[1]) for n in (1, 512))
        assert float(told[2]) == pytest.approx(one + (many - one) * (cfg.micro_batch - 1) / 511, rel=0.02, abs=0.06)
        largest = int(re.search(r"of which 2 stay free: --micro_batch (\d+)", done.out)[1])
        assert int(told[3]) == pytest.approx(largest, rel=0.02)
    assert gpus == 1 or re.search(r"^# Memory at|^task: ", comment, re.M)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_the_arithmetic_in_a_recipe_is_right(recipe):
    text = recipe.read_text()
    cfg = config.parse(script_of(recipe).Config, "", ["--config", str(recipe)])
    if told := re.search(r"Batch (\d+) = (\d+) GPUs x (?:(\d+) (?:micro-batches )?x )?(\d+)", text):
        batch, gpus, times, micro = (int(n or 1) for n in told.groups())
        assert batch == cfg.batch_size == gpus * times * micro and micro == cfg.micro_batch
    if told := re.search(r"lr = ([\d.e-]+) \* (\d+) / (\d+) = ([\d.e-]+\d)", text):
        base, batch, per, result = map(float, told.groups())
        assert base == cfg.base_lr and batch == cfg.batch_size and result == pytest.approx(base * batch / per)
    assert cfg.batch_size % cfg.micro_batch == 0 and cfg.warmup_epochs < cfg.epochs
    assert set(yaml.safe_load(text)) and text.startswith("#")


@pytest.mark.parametrize("name,script", [("mae_vit_b", mae), ("finetune_vit_b", finetune)])
def test_defaults_are_the_main_recipe(name, script):
    defaults = script.Config()
    recipe = config.parse(script.Config, "", ["--config", str(ROOT / "configs" / f"{name}.yaml")])
    differ = {k for k, v in vars(recipe).items() if v != getattr(defaults, k)}
    assert differ <= {"workers", "out", "model", "patch_size", "head_norm", "in_chans", "img_size"}, differ


def test_config_yaml_can_be_run_again(tiny, call, tmp_path):
    """What a run writes is what it was; given back as --config it makes the same run."""
    assert call(mae.main, tiny(out=tmp_path / "a", max_steps=2)).code == 0
    record = yaml.safe_load((tmp_path / "a" / "config.yaml").read_text())
    about = record.pop("run")
    assert {"commit", "torch", "python", "processes", "lr"} <= about.keys()
    assert about["jpeg"] == jpeg.decoder()
    assert set(record) == set(vars(mae.Config())) and record["img_size"] == [16, 16]
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(record))
    assert call(mae.main, ["--config", tmp_path / "again.yaml", *flags(out=tmp_path / "b")]).code == 0
    same_checkpoint(tmp_path / "a", tmp_path / "b")


# What a run says beside its numbers


def test_an_option_without_its_value_is_shown_with_one(call):
    done = call(mae.main, ["--data", "shapes", "--save_minutes", "--seed", "1"])
    assert done.code == 2
    assert done.err == "error: --save_minutes takes a number, as in --save_minutes 15.0, and none is given\n"


def test_last_pt_as_init_names_the_encoder_beside_it(finished, tuned, call, tmp_path):
    done = call(finetune.main, tuned(init=finished["mae"] / "last.pt", out=tmp_path / "run"))
    one_line(done, "last.pt", "--resume", finished["mae"] / "encoder.pt")


def test_probes_of_a_folder_without_labels(tiny, folder, call, tmp_path):
    done = call(mae.main, tiny(data=folder / "train" / "ant", probe_epochs=1, out=tmp_path / "run"))
    one_line(done, "--probe_epochs", "--probe_data", "labels need", "/train/CLASS/ and", "/val/CLASS/")


def test_the_head_of_a_run_and_its_end(tiny, tuned, call, tmp_path):
    """What it is stands above the first step; where things lie, and what may be typed next, below the last."""
    done = call(mae.main, tiny(max_steps=2, out=tmp_path / "run"))
    head, _, rest = done.out.partition("step 1/2")
    assert all(word in head for word in ("method: MAE", ", 36 images", "vit_tiny", "0.", f"out: {tmp_path / 'run'}"))
    assert f"{tmp_path / 'run'} holds encoder.pt, last.pt, log.jsonl, pictures/; next:" in rest
    tuning, showing = [line.strip() for line in rest.strip().splitlines()[-2:]]
    assert " finetune.py --config configs/finetune_tiny.yaml --init " in tuning
    assert tuning.endswith(f"--out {tmp_path / 'run'}_tuned")
    assert showing.endswith(f" -m tools.show IMAGE --init {tmp_path / 'run' / 'last.pt'}")
    again = rest.partition("next:\n")[2].splitlines()[0]
    assert again.endswith(" --resume    # up to step 12") and "--max_steps" not in again
    done = call(finetune.main, tuned(max_steps=2, init=tmp_path / "run" / "encoder.pt", out=tmp_path / "tuned"))
    assert "36 images of 3 classes" in done.out and " -m tools.show --confusion" in done.out.splitlines()[-1]


def test_a_recipe_of_pre_training_fine_tunes_nothing(call):
    """All its options are known, and it would train on all labels at another learning rate."""
    for script in (finetune, dense):
        done = call(script.main, ["--config", ROOT / "configs" / "tiny.yaml", "--plan"])
        one_line(done, "tiny.yaml", "this is a recipe of mae.py")


def test_a_run_that_has_ended_is_not_trained_again(tiny, finished, call, tmp_path):
    shutil.copytree(finished["mae"], tmp_path / "run")
    before = (tmp_path / "run" / "log.jsonl").read_text()
    done = call(mae.main, tiny(max_steps=2, out=tmp_path / "run", resume=True))
    assert done.code == 0 and "nothing is left to train" in done.out, done.err
    assert (tmp_path / "run" / "log.jsonl").read_text() == before


def test_the_last_evaluation_is_in_the_log(tuned, finished, call, tmp_path):
    words = tuned(max_steps=2, init=finished["mae"] / "encoder.pt", out=tmp_path / "run", logger="csv")
    done = call(finetune.main, words)
    assert done.code == 0, done.err
    last = [json.loads(line) for line in open(tmp_path / "run" / "log.jsonl")][-1]
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert last == {"step": 2, "top1": result["top1"], "top5": result["top5"]}
    assert "top1" in (tmp_path / "run" / "log.csv").read_text()


def test_the_other_file_of_a_run_is_named(finished, call, tmp_path):
    """encoder.pt where last.pt is wanted, the other way round, and the folder of both."""
    run = finished["mae"]
    with pytest.raises(ValueError, match=r"but a last\.pt; "):
        models.load(run / "last.pt")
    with pytest.raises(ValueError, match=f"the last.pt beside it is: {run / 'last.pt'}"):
        show.load(run / "encoder.pt")
    with pytest.raises(FileNotFoundError, match=f"{run} is a folder; {run / 'encoder.pt'} or .*last.pt may be meant"):
        models.load(run)
    done = call(show.main, ["cat.png", "--init", run / "encoder.pt"])
    one_line(done, "holds an encoder and no classifier", "--attention")


def test_torchrun_ends_with_the_error():
    """Below its own traceback."""
    code, _, err = finish(start(*torchrun(2, "mae.py", "--data", "shapes", "--mask_ratio", 2)))
    assert code == 1 and [line for line in err.splitlines() if line.strip()][-2].endswith(
        "error: --mask_ratio must lie in [0, 1), not 2.0")


@pytest.mark.parametrize("name", ["models", "data"])
def test_a_module_says_that_it_is_no_script(name, monkeypatch):
    with pytest.raises(SystemExit, match=f"{name}.py is a part of the scripts"):
        runpy.run_path(str(ROOT / f"{name}.py"), run_name="__main__")
