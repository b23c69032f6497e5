"""Careless words, broken images and crafted files in fine-tuning: one line, and nothing is lost or guessed."""

import dataclasses
import io
import json
import os
import shutil
import types

import numpy
import pytest
import torch
from conftest import equal, flags, snapshot
from encoders import VIT, classifier, read_encoder, saved_of
from PIL import Image
from test_protocols import STILL, edited, one_line, pretrained, tune  # noqa: F401

import data
import finetune
import models
from common import checkpoint, engine, formats
from tools import convert, dense, features
from tools.trials import finish, start, torchrun

DENSE = flags(data="shapes", task="depth", model=None, img_size=16, batch_size=4, micro_batch=4, epochs=1, labels=10,
              max_steps=1, head_width=16, device="cpu")


@pytest.fixture
def densely(pretrained, call, tmp_path, monkeypatch):  # noqa: F811
    """`densely(*words)` runs dense.py in OUT `dense`, on a few images."""
    monkeypatch.setitem(data.SPLITS, "val", (1_000_000, 8))
    return lambda *words: call(dense.main, [*DENSE, "--init", pretrained["mae"], "--out", tmp_path / "dense", *words])


def result_of(out):
    return json.loads((out / "result.json").read_text())


# What a terminal cannot show


def test_names_that_cannot_be_shown_stop_nothing(tune, call, tmp_path, monkeypatch):  # noqa: F811
    """On a terminal that knows no umlaut. Else all was done, and the exit code said that nothing was."""
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    monkeypatch.setattr("sys.stdout", stdout)
    out = tmp_path / "gr\xfc\xdfe"
    assert tune(max_steps=1, out=out).code == 0
    init, made = out / "encoder.pt", []
    assert tune(eval="true", init=init, out=out / "eval").code == 0
    shutil.copy(out / "last.pt", out / "previous.last.pt")
    (out / "last.pt").write_bytes(b"no checkpoint")
    assert tune(max_steps=2, out=out, resume="true").code == 0
    for words in (("show", init), ("export", init, "--to", "timm", out / "timm.pth"),
                  ("export", init, "--to", "safetensors", out / "a.safetensors"),
                  ("--drop_layers", 1, init, out / "cut.pt")):
        done = call(convert.main, words)
        assert done.code == 0, (words, done.err)
        made += [word.name for word in words[-1:] if word != init]
    done = call(features.main, ["--init", init, "--data", "shapes", "--micro_batch", 500, "--out", out / "f.npz"])
    assert done.code == 0, done.err
    said = stdout.buffer.getvalue().decode("ascii")
    for name in ("eval/result.json", "previous.last.pt", *made, "f.npz"):
        assert f"gr\\xfc\\xdfe/{name}" in said and (out / name).exists(), said


# What lies in OUT


def test_an_evaluation_does_not_take_the_place_of_a_run(tune, densely, tmp_path, pretrained, folder):  # noqa: F811
    assert tune(max_steps=1).code == 0 and densely().code == 0
    before = snapshot(tmp_path)
    for changes in ({"eval": "true", "init": tmp_path / "run" / "encoder.pt"}, {"mode": "knn"}):
        one_line(tune(overwrite="true", **changes), "run", "name another")
    one_line(densely("--eval", "--overwrite", "--init", tmp_path / "dense" / "encoder.pt"), "dense", "name another")
    one_line(tune(init=tmp_path / "run" / "encoder.pt", overwrite="true"), "what this run starts from")
    assert snapshot(tmp_path) == before


def test_an_evaluation_that_cannot_begin_leaves_the_one_before(tune, tmp_path, folder):  # noqa: F811
    assert tune(mode="knn").code == 0
    before = snapshot(tmp_path / "run")
    shutil.copytree(folder / "val", tmp_path / "half" / "val")
    one_line(tune(mode="knn", data=tmp_path / "half", overwrite="true"), "labels need")
    assert snapshot(tmp_path / "run") == before
    assert tune(mode="knn", neighbours=3, overwrite="true").code == 0


@pytest.mark.parametrize("words,names", [
    ({"eval": "true", "mode": "knn"}, ["--eval", "--mode knn"]),
    ({"mode": "linear", "mixup": 0.8}, ["--mixup", "linear"])], ids=repr)
def test_options_that_exclude_each_other(tune, words, names):  # noqa: F811
    one_line(tune(**words), *names)


def test_an_evaluation_takes_any_batch(tune, tmp_path):  # noqa: F811
    assert tune(max_steps=1).code == 0
    cfg = finetune.Config(batch_size=7, micro_batch=5)
    for judged in ({"eval": True}, {"mode": "knn"}):
        engine.check_batch(dataclasses.replace(cfg, **judged), world_size=3)
    with pytest.raises(ValueError, match="--batch_size 7"):
        engine.check_batch(cfg, world_size=3)
    assert tune(eval="true", init=tmp_path / "run" / "encoder.pt", out=tmp_path / "check", batch_size=7, micro_batch=5,
                mixup=0.8).code == 0


@pytest.mark.parametrize("changes", [{"micro_batch": 1}, {"batch_size": 5, "micro_batch": 5, "drop_last": "false"}])
def test_batchnorm_of_a_single_image_is_refused_before_it_fails(tune, changes):  # noqa: F811
    """36 images: the second one's last batch is of one."""
    one_line(tune(mode="linear", **changes), "BatchNorm needs two")


def test_a_map_of_one_place_needs_two_images_too(tune):  # noqa: F811
    words = {"init": "none", "model": "torchvision:resnet18", "img_size": 32, "mixup": 0, "cutmix": 0, "max_steps": 1}
    one_line(tune(**words, micro_batch=1), "BatchNorm needs two")
    assert tune(**{**words, "img_size": 64}, micro_batch=1).code == 0


def test_a_map_of_one_place_needs_two_images_in_dense_too(densely):
    net = ["--model", "torchvision:resnet18", "--init", "none", "--img_size", 32, "--batch_size", 1, "--micro_batch", 1]
    one_line(densely(*net), "BatchNorm needs two")


# Averages, votes, halves


def test_the_average_begins_where_the_probe_ends(tune, tmp_path):  # noqa: F811
    """Nothing has moved after the first step, whose learning rate is 0: the average is the probed head."""
    for name, more in (("plain", {}), ("averaged", {"ema": 0.999})):
        assert tune(head_start="probe", max_steps=1, out=tmp_path / name, **more).code == 0
    one, two = (torch.load(tmp_path / name / "encoder.pt")["classifier"]["tensors"] for name in ("plain", "averaged"))
    assert one["head.weight"].abs().max() > 0.01
    torch.testing.assert_close(two["head.weight"], one["head.weight"])


@pytest.mark.parametrize("model,behind,frozen", [
    ("swin_tiny", ["layers.2.downsample.reduction.weight"], ["layers.1.downsample.reduction.weight"]),
    ("pvtv2_tiny", ["stages.3.downsample.proj.weight", "stages.2.norm.weight"], ["stages.2.downsample.proj.weight"]),
    ("pvt_tiny", ["layers.2.downsample.proj.weight"], ["layers.1.downsample.proj.weight"])])
def test_what_comes_behind_half_a_block_trains(model, behind, frozen):
    """Half of the last block of stage 3, and so the merging behind it."""
    encoder = models.build(model, (64, 64))
    finetune.freeze(encoder, 1.5)
    trains = {name for name, p in encoder.named_parameters() if p.requires_grad}
    assert set(behind) <= trains and not set(frozen) & trains
    assert any(".blocks.1.mlp." in name for name in trains) and not any(".2.blocks.1.attn" in name for name in trains)


# Images


@pytest.fixture
def spoiled(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "data")
    (tmp_path / "data" / "val" / "bee" / "2.png").write_bytes(b"no image")
    return tmp_path / "data"


def test_a_broken_image_is_left_out_of_every_score(tune, tmp_path, folder, spoiled):  # noqa: F811
    """It is named, and not replaced by one that would count twice: the score is that of a folder without it."""
    assert tune(max_steps=6, base_lr=0.3).code == 0
    whole = shutil.copytree(folder, tmp_path / "whole")
    (whole / "val" / "bee" / "2.png").unlink()
    init = tmp_path / "run" / "encoder.pt"
    for name, changes in (("eval", {"eval": "true", "init": init}), ("knn", {"mode": "knn"})):
        done = tune(data=spoiled, out=tmp_path / name, **changes)
        assert done.code == 0 and done.err.startswith("left out a broken image: "), done.err
        assert done.err.count("\n") == 1
        assert tune(data=whole, out=tmp_path / f"{name}, whole", **changes).code == 0
        with_it, without = (result_of(tmp_path / n) for n in (name, f"{name}, whole"))
        assert with_it["images"] == 14 and with_it["confusion"] == without["confusion"]
        assert with_it["top5"] == without["top5"]


def test_processes_leave_the_same_image_out(tune, tuned, pretrained, tmp_path, spoiled):  # noqa: F811
    words = dict(mode="knn", data=spoiled, micro_batch=1)
    assert tune(out=tmp_path / "one", **words).code == 0
    two = tuned(init=pretrained["mae"], model=None, patch_size=None, out=tmp_path / "two", **words)
    code, _, err = finish(start(*torchrun(2, "finetune.py", *two)))
    assert code == 0, err
    one, two = (result_of(tmp_path / name) for name in ("one", "two"))
    assert one == two and one["images"] == 14


def test_broken_images_of_all_processes_count(tuned, pretrained, tmp_path, spoiled):  # noqa: F811
    """Each of two processes meets one, which is forgiven; two of 15 are not."""
    (spoiled / "val" / "bee" / "1.png").write_bytes(b"no image")
    words = tuned(init=pretrained["mae"], model=None, patch_size=None, mode="knn", data=spoiled, micro_batch=1,
                  max_bad=0.1, out=tmp_path / "two")
    code, _, err = finish(start(*torchrun(2, "finetune.py", *words)))
    assert code != 0 and "error: 2 of 15 images are broken so far, --max_bad is 0.1" in err, err
    assert not (tmp_path / "two" / "result.json").exists()


def test_a_validation_set_of_broken_images_is_one_line(tune, spoiled):  # noqa: F811
    for path in spoiled.glob("val/*/*.png"):
        path.write_bytes(b"")
    done = tune(data=spoiled, mode="knn", max_bad=1)
    assert done.code == 2 and done.err.splitlines()[-1].startswith("error: 15 of 15 images are broken")


def test_a_label_map_that_is_broken_is_left_out(densely, tmp_path, call, pretrained):  # noqa: F811
    root, scene = tmp_path / "scenes", torch.rand(3, 16, 16).mul(255).byte().permute(1, 2, 0).numpy()
    for split in ("train", "val"):
        for name in ("images", "labels"):
            (root / split / name).mkdir(parents=True)
        for i in range(8):
            Image.fromarray(scene).save(root / split / "images" / f"{i}.png")
            Image.fromarray((scene[..., 0].astype("uint16") + 1) * 20).save(root / split / "labels" / f"{i}.png")
    (root / "val" / "labels" / "0.png").write_bytes(b"")
    done = densely("--data", root, "--labels", 0)
    assert done.code == 0 and done.err.startswith("left out a broken image: "), done.err
    assert result_of(tmp_path / "dense")["images"] == 7
    (root / "classes.txt").write_bytes("gr\xfcn\nblau\n".encode("latin-1"))
    one_line(densely("--data", root, "--labels", 0, "--task", "segment", "--overwrite"), "classes.txt", "UTF-8")


def test_outputs_that_are_not_finite_have_no_score(tune, tmp_path):  # noqa: F811
    words = {"init": "none", "model": "vit_tiny", "patch_size": 4, "max_steps": 1}
    assert tune(**words).code == 0
    saved = torch.load(tmp_path / "run" / "encoder.pt")
    saved["classifier"]["tensors"]["head.weight"].fill_(3e38)
    torch.save(saved, tmp_path / "huge.pt")
    done = tune(**{**words, "init": tmp_path / "huge.pt", "eval": "true", "out": tmp_path / "judged"})
    one_line(done, "outputs are not finite")
    assert not (tmp_path / "judged" / "result.json").exists()


def test_a_split_that_is_not_there_is_said(tune):  # noqa: F811
    done = tune(split="test", mode="knn")
    assert done.code == 0 and "has no test/: its val/ is taken" in done.out


def test_what_an_evaluation_would_ignore_is_refused(tune, call, tmp_path):  # noqa: F811
    assert tune(max_steps=1).code == 0
    judged = {"init": tmp_path / "run" / "encoder.pt", "eval": "true", "out": tmp_path / "check"}
    one_line(tune(**judged, head_norm="batch"), "--head_norm batch", "norm layer")
    one_line(tune(**judged, head_norm="bogus"), "--head_norm", "layer, batch, none", "bogus")
    one_line(tune(**judged, init_size=32), "--init_size")
    for name, value in (("init_size", 999), ("num_heads", 3), ("weights", "ema")):
        one_line(tune(init="none", model="vit_tiny", mode="knn", **{name: value}), f"--{name}", "published weights")
    one_line(call(convert.main, ["show", judged["init"], "--init_size=-5"]), "--init_size")
    words = {"init": judged["init"], "mode": "linear", "head_norm": "batch", "out": tmp_path / "linear"}
    one_line(tune(**words), "--head_norm batch", "went into a head")


def test_color_jitter_of_other_channels_is_refused_before_the_folder_is_claimed(tune, tmp_path, folder):  # noqa: F811
    for split in ("train", "val"):
        for path in (folder / split).glob("*/*.png"):
            to = tmp_path / "six" / path.relative_to(folder).with_suffix(".npy")
            to.parent.mkdir(parents=True, exist_ok=True)
            numpy.save(to, numpy.zeros((16, 16, 6), numpy.uint8))
    words = {"init": "none", "model": "vit_tiny", "patch_size": 4, "data": tmp_path / "six", "in_chans": 6}
    one_line(tune(**words, rand_augment="false", color_jitter=0.4), "--color_jitter", "--in_chans 6")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("world,micro,size,fits", [(1, 10, 10, True), (2, 10, 10, False), (2, 4, 16, True),
                                                   (1, 5, 10, False)])
def test_pairs_are_never_parted(world, micro, size, fits):
    """Or else an image would have one partner in one process, and another one in two; 29 images leave a short batch."""
    cfg = finetune.Config(batch_size=size, micro_batch=micro, drop_last=False)
    run = lambda rank: types.SimpleNamespace(rank=rank, world_size=world)  # noqa: E731
    if not fits:
        with pytest.raises(ValueError, match="mix pairs"):
            data.global_batches(29, cfg, run(0))
        return
    samplers = [data.global_batches(29, cfg, run(rank)) for rank in range(world)]
    held = [list(sampler.batches(0, sampler.steps_per_epoch)) for sampler in samplers]
    for lists in held:
        for batch in lists:
            positions = [position for _, _, position in batch]
            assert positions[0] % 2 == 0 and positions == list(range(positions[0], positions[-1] + 1))
            assert positions[-1] % 2 == 1 or positions[-1] == 28 % size or len(batch) == 0
    assert len({len(lists) for lists in held}) == 1
    assert sorted(i for lists in held for batch in lists for _, i, _ in batch) == list(range(29))


class Killed(BaseException):
    """What nothing catches."""


def test_a_kill_between_any_two_renames_is_made_good_by_resume(tune, tmp_path, monkeypatch):  # noqa: F811
    """A save after two steps, and one of a resumed run after four, which has four renames."""
    assert tune(max_steps=4).code == 0
    real = os.replace
    for survived in range(4):
        out, left = tmp_path / str(survived), iter(range(survived))
        assert tune(max_steps=2, out=out).code == 0

        def replace(old, new, left=left):
            if next(left, None) is None:
                raise Killed
            real(old, new)

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(os, "replace", replace)
            tune(max_steps=4, resume="true", out=out)
        assert tune(max_steps=4, resume="true", out=out).code == 0
        for name in ("encoder.pt", "last.pt"):
            assert equal(torch.load(out / name), torch.load(tmp_path / "run" / name)), (survived, name)


def test_a_head_that_starts_with_a_probe_is_not_said_to_be_kept(tune, tmp_path):  # noqa: F811
    assert tune(max_steps=6, base_lr=0.3).code == 0
    words = {"init": tmp_path / "run" / "encoder.pt", "max_steps": 1}
    done = tune(**words, head_start="probe", out=tmp_path / "probed")
    assert "kept of its classifier: fc_norm\n  newly initialised: head.weight, head.bias" in done.out
    assert "kept of its classifier: fc_norm, head\n" in tune(**words, out=tmp_path / "on").out


def test_dense_plans_the_network_that_it_trains(tmp_path):
    encoder = models.build("swin_tiny", (64, 64), window=8, bias="continuous")
    torch.save({"arch": encoder.arch, "model": encoder.state_dict(), "method": "UMMAE", "step": 1}, tmp_path / "um.pt")
    cfg, saved = dense.resolve(dense.Config(init=str(tmp_path / "um.pt"), head_width=16))
    there, planned = (dense.build_dense(cfg, saved, list("abc"), load) for load in (True, False))
    assert {k: v.shape for k, v in there.state_dict().items()} == {k: v.shape for k, v in planned.state_dict().items()}
    assert planned.encoder.arch == encoder.arch


# Files that travel


def test_what_was_cut_travels(tune, densely, pretrained, call, tmp_path):  # noqa: F811
    """A cut encoder goes into a safetensors file, from there to fine-tuning and to dense.py; timm has no such one."""
    for method in ("mae", "pyramid"):
        out = tmp_path / method
        init = edited(call, pretrained[method], "--drop_layers", "1")
        assert tune(init=init, img_size=None, max_steps=1, out=out).code == 0
        for target, name, code in (("timm", "a.pth", 2), ("safetensors", "a.safetensors", 0)):
            done = call(convert.main, ["export", out / "encoder.pt", "--to", target, out / name])
            assert done.code == code and ("cut by 1 layers" in done.err) == (code == 2), done.err
        again = tune(init=out / "a.safetensors", eval="true", img_size=None, out=tmp_path / f"{method}, again")
        assert again.code == 0 and result_of(tmp_path / f"{method}, again")["top1"] == result_of(out)["top1"]
        done = densely("--init", out / "a.safetensors", "--overwrite", "--img_size", "0")
        assert done.code == 0, done.err
        assert torch.load(tmp_path / "dense" / "encoder.pt")["arch"]["options"]["drop_layers"] == 1
        done = densely("--init", tmp_path / "dense" / "encoder.pt", "--eval", "--img_size", "0", "--out", out / "eval")
        assert done.code == 0, done.err


def test_an_encoder_of_dense_has_no_last_norm_and_it_is_said(tune, densely, call, tmp_path):  # noqa: F811
    assert densely().code == 0
    init = tmp_path / "dense" / "encoder.pt"
    one_line(call(convert.main, ["export", init, "--to", "timm", tmp_path / "out.pth"]), "dense.py", "last norm")
    for changes in ({}, {"mode": "linear", **STILL}, {"mode": "knn"}, {"pool": "cls"}):
        done = tune(init=init, max_steps=1, out=tmp_path / f"run {len(changes)} {changes.get('mode')}", **changes)
        assert done.code == 0, done.err


def nested(saved, *path, value):
    """A copy of `saved` with another value at a path of keys."""
    key, *rest = path
    return {**saved, key: nested(saved[key], *rest, value=value) if rest else value}


LIES = {  # path of keys in an encoder.pt: what stands there instead
    "sparse": (("model", "norm.weight"), torch.ones(96).to_sparse()), "5 for a name": (("model", 5), torch.ones(2)),
    "no tensor": (("model", "norm.weight"), [1.0]), "no tensors": (("model",), {}), "notes": (("notes",), 5),
    "huge image": (("arch", "img_size"), [65536, 65536]), "image": (("arch", "img_size"), [32]),
    "side": (("arch", "img_size"), [32, True]), "huge patch": (("arch", "patch_size"), 32768),
    "huge network": (("arch",), {"model": "torchvision:resnet18", "img_size": [65536, 65536], "patch_size": 1,
                                 "in_chans": 3, "width": 1, "depth": 1, "num_heads": [], "options": {}}),
    "large network": (("arch",), {"model": "torchvision:vit_h_14", "img_size": [224, 224], "patch_size": 14,
                                  "in_chans": 3, "width": 1, "depth": 1, "num_heads": [], "options": {}}),
    "no classifier": (("classifier",), None), "norm for a pool": (("classifier", "pool"), "layer"),
    "tensor for a step": (("step",), torch.ones(2)), "tensor in arch": (("arch", "width"), torch.ones(2)),
    "channels": (("arch", "in_chans"), 65536), "model": (("arch", "model"), "vit_h"),
    "models": (("arch", "model"), ["a"]),
    "unknown": (("arch", "model"), "torchvision:nothing"), "width": (("arch", "width"), None),
    "option": (("arch", "options"), {"colour": 1}), "positions": (("arch", "options", "positions"), "none"),
    "blocks": (("arch", "drop_layers"), 9), "text for blocks": (("arch", "drop_layers"), "two"),
    "blocks now": (("arch", "options", "drop_layers"), 9), "fewer": (("arch", "options", "drop_layers"), -1),
    "classes": (("classifier", "classes"), list("abcdefgh")), "numbers": (("classifier", "classes"), list(range(7))),
    "pool": (("classifier", "pool"), "max"), "head": (("classifier", "tensors"), {"head.weight": 5}),
    "no head": (("classifier", "tensors"), {}), "sparse head": (("classifier", "tensors", "head.bias"),
                                                                torch.ones(7).to_sparse()),
    "view of one number": (("classifier", "tensors", "head.bias"), torch.ones(1).expand(7))}


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("how", ["show", "eval", "train"])
def test_a_crafted_encoder_is_one_line(tune, call, tmp_path, lie, how):  # noqa: F811
    path, value = LIES[lie]
    saved = nested(saved_of(classifier(models.build(*VIT))), *path, value=value)
    torch.save(saved, tmp_path / "crafted.pt")
    if how == "show":
        done = call(convert.main, ["show", tmp_path / "crafted.pt"])
    else:
        judged = {"eval": "true"} if how == "eval" else {}
        done = tune(init=tmp_path / "crafted.pt", max_steps=1, img_size=None, **judged)
    harmless = {"show": ["notes", "width"], "train": ["notes"], "eval": []}  # show builds no network
    if lie in harmless[how]:
        assert done.code == 0 and done.err == ""
    else:
        assert done.code == 2 and done.err.count("\n") == 1 and done.err.startswith("error: "), done.err
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("tensors", [5, {}, {"head.0.weight": 5}, {"head.0.weight": torch.ones(2, 2)},
                                     {"head.0.weight": torch.ones(3, 10**6, 1, 1)}], ids=["a", "b", "c", "d", "e"])
def test_a_crafted_head_of_dense_is_one_line(densely, tmp_path, tensors):
    assert densely().code == 0
    saved = torch.load(tmp_path / "dense" / "encoder.pt")
    saved["dense"]["tensors"] = tensors
    torch.save(saved, tmp_path / "crafted.pt")
    done = densely("--eval", "--init", tmp_path / "crafted.pt", "--out", tmp_path / "eval")
    assert done.code == 2 and done.err.count("\n") == 1 and "crafted.pt" in done.err, done.err


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_a_file_larger_than_memory_is_refused_at_once(tmp_path, name):
    """Four tebibytes of nothing, in a file of a few blocks."""
    size, header = 2**42, json.dumps({"a": {"dtype": "U8", "shape": [2**42], "data_offsets": [0, 2**42]}}).encode()
    with open(tmp_path / name, "wb") as file:
        if name == "a.safetensors":
            file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(file.tell() + size)
    with pytest.raises(ValueError, match="more than this machine's memory"):
        read_encoder(tmp_path / name)
    with pytest.raises(ValueError, match="memory"):
        (checkpoint.read if name == "a.pt" else formats.read_safetensors)(tmp_path / name)


def test_metadata_of_safetensors_that_lie_are_refused(tmp_path):
    saved = saved_of(classifier(models.build(*VIT)))
    lie = nested(saved, "arch", "img_size", value=[65536, 65536])
    convert.write_safetensors(tmp_path / "a.safetensors", *convert.pack(lie))
    with pytest.raises(ValueError, match=r"not an encoder\.pt"):
        read_encoder(tmp_path / "a.safetensors")
