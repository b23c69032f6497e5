"""Weights from elsewhere: the names and files of other code, and what of them is refused."""

import argparse
import contextlib
import datetime
import json
import math
import os
import pathlib
import pickle
import random
import re
import sys
import types

import numpy as np
import parity
import pytest
import torch
import torch.nn as nn
from conftest import equal, flags, snapshot
from encoders import VIT, read_encoder, stirred
from safetensors.torch import load_file, save_file

import finetune
import models
from common import checkpoint, formats, transforms, weights
from tools import convert

DEPTHS = (2, 1, 1, 1)


@pytest.fixture
def small(monkeypatch):
    """The sizes of the golden cases."""
    monkeypatch.setitem(models.SWIN, "swin_golden", (16, DEPTHS, (2, 2, 4, 4), 32))
    monkeypatch.setitem(models.PVT, "pvt_golden", ((16, 32, 48, 64), DEPTHS, (1, 2, 3, 4), (4, 4, 2, 2)))
    monkeypatch.setitem(models.VIT, "vit_golden", (48, 2, 4))


def rebuild(saved, **changes):
    """The encoder of an encoder.pt, with its weights."""
    arch = {**saved["arch"], **changes}
    encoder = models.build(arch["model"], arch["img_size"], arch["patch_size"], arch["in_chans"], learn_positions=True,
                           **arch["options"])
    weights.load_encoder(encoder, saved, "file")
    return encoder.eval()


@pytest.fixture
def mae_file(tmp_path):
    """(path, encoder): a ViT as MAE's code publishes it, decoder and all."""
    encoder = stirred(models.build(*VIT, learn_positions=True))
    extra = {"mask_token": torch.zeros(1, 1, 8), "decoder_pos_embed": torch.zeros(1, 17, 8),
             "decoder_blocks.0.norm1.weight": torch.ones(8), "decoder_blocks.0.norm1.bias": torch.ones(8)}
    torch.save({"model": {**encoder.state_dict(), **extra}}, tmp_path / "mae.pth")
    return tmp_path / "mae.pth", encoder


# Names


KIND = {"fastmim_swin_hog": "swin", "simmim_swin": "swin", "um_mae_swin": "swin", "um_mae_pvt": "pvt"}


@pytest.mark.parametrize("name", ["mae_normpix", "simmim_swin", "simmim_vit", "um_mae_swin", "um_mae_pvt",
                                  "fastmim_vit_hog", "fastmim_swin_hog", "lut"])
def test_published_names_of_pretraining(name, small, tmp_path, capsys):
    _, imgs, theirs = parity.case(name)
    torch.save({"model": theirs, "args": argparse.Namespace(lr=1), "epoch": 7}, tmp_path / "published.pth")
    saved = read_encoder(tmp_path / "published.pth")
    kind, size = KIND.get(name, "vit"), imgs.shape[-1]
    assert saved["arch"]["model"] == f"{kind}_golden" and "classifier" not in saved
    if name != "um_mae_swin":  # which fits any size, and has no table that would tell
        assert saved["arch"]["img_size"] == [size, size]
    encoder = rebuild(saved)
    out = capsys.readouterr().out
    assert "licence" in out and "left over: " in out and ("decoder" in out) and "mask_token" in out
    assert f"loaded {len(encoder.state_dict())} tensors of {kind}_golden" in out
    ours = parity.encoder_tensors(theirs)
    assert all(torch.equal(tensor, ours[n].view_as(tensor)) for n, tensor in encoder.state_dict().items() if n in ours)


@pytest.mark.parametrize("name,options", [
    ("finetune_vit_mean", {}), ("finetune_vit_cls", {}), ("finetune_um_pvt", {}),
    ("finetune_um_swin", {"window": 8, "img_size": (64, 64)})])
def test_published_classifiers_make_the_published_logits(name, options, small, tmp_path):
    arrays, imgs, theirs = parity.case(name)
    torch.save({"model": theirs}, tmp_path / "published.pth")
    cfg, saved = finetune.resolve(finetune.Config(init=str(tmp_path / "published.pth"), eval=True, **options))
    model = finetune.build_classifier(cfg, saved, list("abcde")).eval()
    np.testing.assert_allclose(model(imgs).detach().numpy(), arrays["logits"], rtol=1e-4, atol=1e-4)


def hugging_face(tensors, mae=False):
    """Our ViT's tensors under the names of Hugging Face's ViT or ViTMAE."""
    theirs = {}
    for name, tensor in tensors.items():
        name = re.sub(r"^blocks\.(\d+)", r"vit.encoder.layer.\1", name)
        for ours, other in [("cls_token", "vit.embeddings.cls_token"), ("norm1", "layernorm_before"),
                            ("pos_embed", "vit.embeddings.position_embeddings"), ("norm2", "layernorm_after"),
                            ("patch_embed.proj", "vit.embeddings.patch_embeddings.projection"),
                            ("attn.proj", "attention.output.dense"), ("mlp.fc1", "intermediate.dense"),
                            ("mlp.fc2", "output.dense"), ("attn.qkv", "attention.attention.qkv")]:
            name = name.replace(ours, other)
        name = "vit.layernorm." + name.removeprefix("norm.") if name.startswith("norm.") else name
        if "qkv" in name:
            parts = zip(("query", "key", "value"), tensor.chunk(3), strict=True)
            theirs |= {name.replace("qkv", part): value for part, value in parts}
        else:
            theirs[name] = tensor
    more = {"decoder.decoder_layers.0.attention.attention.query.weight": torch.ones(4, 4),
            "decoder.mask_token": torch.ones(1, 1, 4)} if mae else {"classifier.weight": torch.ones(3, 96),
                                                                    "classifier.bias": torch.ones(3)}
    return {**theirs, **more}


@pytest.mark.parametrize("mae", [False, True], ids=["ViT", "ViTMAE"])
@pytest.mark.parametrize("prefix", [True, False])
def test_names_of_hugging_face(tmp_path, mae, prefix):
    encoder = stirred(models.build(*VIT, learn_positions=True))
    theirs = hugging_face(encoder.state_dict(), mae)
    if not prefix:
        theirs = {name.removeprefix("vit."): tensor for name, tensor in theirs.items()}
    save_file({name: tensor.contiguous().clone() for name, tensor in theirs.items()}, tmp_path / "model.safetensors")
    saved = read_encoder(tmp_path / "model.safetensors")
    assert equal(dict(rebuild(saved).state_dict()), dict(encoder.state_dict()))
    assert any("decoder (2)" in note for note in saved["notes"]) == mae and ("classifier" in saved) != mae


def test_a_name_that_no_one_knows_is_refused_and_not_left_over(mae_file):
    """Register tokens, for one: without them the encoder would compute something else."""
    path, encoder = mae_file
    torch.save({**encoder.state_dict(), "reg_token": torch.zeros(1, 4, 96)}, path)
    with pytest.raises(ValueError, match=r"mae\.pth is of another architecture.*reg_token"):
        read_encoder(path)


def test_a_tensor_that_would_stay_unset_is_refused(mae_file):
    path, encoder = mae_file
    tensors = encoder.state_dict()
    del tensors["blocks.2.mlp.fc1.bias"]
    torch.save(tensors, path)
    with pytest.raises(ValueError, match=r"lacks \['blocks\.2\.mlp\.fc1\.bias'\]"):
        read_encoder(path)


# Architecture


@pytest.mark.parametrize("size,window,told", [((64, 64), 4, True), ((64, 64), 2, False), ((128, 128), 4, False),
                                              ((96, 96), 6, True)])
def test_window_and_image_size_of_a_swin(tmp_path, size, window, told):
    encoder = models.build("swin_tiny", size, window=window)
    torch.save(encoder.state_dict(), tmp_path / "swin.pth")
    saved = read_encoder(tmp_path / "swin.pth")
    assert saved["arch"] == encoder.arch
    assert any("--init_size" in note for note in saved["notes"]) != told
    given = read_encoder(tmp_path / "swin.pth", size)
    assert given["arch"] == encoder.arch and not any("--init_size" in note for note in given["notes"])


@pytest.mark.parametrize("options", [{}, {"positions": "shared_bias", "layer_scale": 0.1},
                                     {"positions": "block_bias", "layer_scale": 0.1}], ids=repr)
def test_a_grid_that_is_no_square_must_be_told(tmp_path, options):
    encoder = models.build("vit_tiny", (16, 32), 8, 4, **options)
    torch.save(encoder.state_dict(), tmp_path / "vit.pth")
    with pytest.raises(ValueError, match=r"vit\.pth.*--init_size"):
        read_encoder(tmp_path / "vit.pth")
    with pytest.raises(ValueError, match=r"vit\.pth"):  # of other images
        read_encoder(tmp_path / "vit.pth", (32, 32))
    assert read_encoder(tmp_path / "vit.pth", (16, 32))["arch"] == encoder.arch


def test_sizes_without_an_encoder_are_told_with_those_that_exist(tmp_path):
    encoder = models.ViT("odd", (32, 32), 8, 3, 36, 2, 2)
    torch.save(encoder.state_dict(), tmp_path / "vit.pth")
    with pytest.raises(ValueError, match=r"vit\.pth: no encoder of ours has.*\(36, 2\).*vit_tiny \(96, 4\)"):
        read_encoder(tmp_path / "vit.pth")


def test_the_six_heads_of_fastmim_are_told(mae_file, monkeypatch):
    path, encoder = mae_file
    monkeypatch.setitem(models.SIZES, "vit", {"vit_b": models.VIT["vit_tiny"]})
    for colour in (False, True):
        torch.save({**encoder.state_dict(), "mask_token": torch.zeros((1, 3, 1, 1) if colour else (1, 1, 96))}, path)
        saved = read_encoder(path)
        assert any("6 heads" in note for note in saved["notes"]) == colour
        assert (saved["method"] == "FastMIM") == colour


# Files


class Hostile:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def forms(tensors, path):
    """The same weights in every form of file: {what: function that writes it and returns its path}."""
    def torch_file(content, **how):
        torch.save(content, path.with_suffix(".pth"), **how)
        return path.with_suffix(".pth")

    def safe():
        save_file(tensors, path.with_suffix(".safetensors"))
        return path.with_suffix(".safetensors")

    options = argparse.Namespace(lr=0.1, betas=(0.9, 0.95), resume="", nested=argparse.Namespace(a=1))
    parallel = {f"module.{name}": tensor for name, tensor in tensors.items()}
    return {"alone": lambda: torch_file(tensors), "model": lambda: torch_file({"model": tensors, "epoch": 3}),
            "state_dict": lambda: torch_file({"state_dict": parallel}), "safetensors": safe,
            "Namespace": lambda: torch_file({"model": tensors, "args": options, "optimizer": {}, "scaler": {}}),
            "old": lambda: torch_file({"model": tensors, "args": options}, _use_new_zipfile_serialization=False)}


@pytest.mark.parametrize("form", ["alone", "model", "state_dict", "Namespace", "old", "safetensors"])
def test_every_form_of_file(mae_file, form):
    path, encoder = mae_file
    saved = read_encoder(forms(encoder.state_dict(), path)[form]())
    assert equal(dict(rebuild(saved).state_dict()), dict(encoder.state_dict()))
    assert any("no checksums" in note for note in saved["notes"]) == (form == "old")


def test_a_cfg_node_is_read_as_a_dict_and_its_package_is_not_needed(mae_file, monkeypatch):
    path, encoder = mae_file
    node = type("CfgNode", (dict,), {"__module__": "yacs.config"})  # as SimMIM's code pickles its options
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
        patch.setitem(sys.modules, "yacs.config", types.SimpleNamespace(CfgNode=node))
        options = node(a=1, b=node(c=2))
        options.frozen = True
        torch.save({"model": encoder.state_dict(), "config": options}, path)
    assert equal(read_encoder(path)["model"], dict(encoder.state_dict()))
    with pytest.raises(ValueError, match="more than tensors"):  # of our own files none holds one
        checkpoint.read(path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32_and_it_is_said(mae_file, dtype):
    path, encoder = mae_file
    theirs = {name: tensor.to(dtype) for name, tensor in encoder.state_dict().items()}
    saved = read_encoder(forms(theirs, path)["safetensors"]())
    assert equal(in_order(saved["model"]), in_order({name: tensor.float() for name, tensor in theirs.items()}))
    assert any(f"{dtype} made torch.float32" in note for note in saved["notes"])


def ema_of(tensors):
    return {name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


WRAPPED = {
    "timm, MoCo v3": lambda t: {"arch": "vit_base", "epoch": 3, "state_dict": t, "optimizer": {"state": {0: {}}}},
    "a word for arch, and model": lambda t: {"arch": "vit", "model": t, "metric": 0.5},
    "a dict for arch": lambda t: {"arch": {"name": "vit"}, "model": t},
    "config and step": lambda t: {"config": {"a": 1}, "step": 5, "state_dict": t},
    "Lightning": lambda t: {"pytorch-lightning_version": "2", "state_dict": {f"model.{k}": v for k, v in t.items()}},
    "nested": lambda t: {"checkpoint": {"module": {"model": t}}},
    "the other way round": lambda t: {"state_dict": {"model": t}},
    "compiled and parallel": lambda t: {"model": {f"module._orig_mod.{k}": v for k, v in t.items()}},
    "parallel and compiled": lambda t: {"model": {f"_orig_mod.module.backbone.{k}": v for k, v in t.items()}},
    "compiled blocks": lambda t: {k.replace("blocks.0.", "blocks.0._orig_mod."): v for k, v in t.items()},
    "a detector": lambda t: {"state_dict": {f"backbone.{k}": v for k, v in t.items()}},
    "MoCo v3": lambda t: {"arch": "vit_small", "state_dict": {
        **{f"module.base_encoder.{k}": v for k, v in t.items()},
        **{f"module.momentum_encoder.{k}": v for k, v in ema_of(t).items()},
        "module.base_encoder.head.0.weight": torch.ones(3, 3), "module.predictor.0.weight": torch.ones(3, 3)}},
    "numbers and paths": lambda t: {
        "model": t, "best": np.float64(1.5), "rng": np.arange(3), "lr": np.float32(1), "n": np.int64(3),
        "out": pathlib.Path("runs/a"), "win": pathlib.PureWindowsPath("a")},
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_what_other_code_wraps_around_an_encoder(mae_file, kind):
    path, encoder = mae_file
    torch.save(WRAPPED[kind](encoder.state_dict()), path)
    assert equal(dict(rebuild(read_encoder(path)).state_dict()), dict(encoder.state_dict()))


@pytest.mark.parametrize("model,ema", [("model", "model_ema"), ("state_dict", "state_dict_ema"), ("model", "ema")])
def test_an_average_beside_the_weights(mae_file, tuned, call, tmp_path, model, ema):
    path, encoder = mae_file
    tensors = dict(encoder.state_dict())
    torch.save({ema: {"module": ema_of(tensors)} if ema == "ema" else ema_of(tensors), model: tensors}, path)
    saved = read_encoder(path)
    assert equal(saved["model"], tensors)
    [said] = [note for note in saved["notes"] if note.startswith("taken: ")]
    assert said.startswith(f"taken: {model}; there is {ema}") and "--weights" in said
    chosen = weights.read_encoder(path, models.from_arch, models.SIZES, which="ema")
    assert equal(chosen["model"], ema_of(tensors)) and any(f"taken: {ema}" in note for note in chosen["notes"])
    words = tuned(model=None, patch_size=None, init=path, max_steps=1, out=tmp_path / "run", weights="ema")
    done = call(finetune.main, words)
    assert done.code == 0 and f"taken: {ema}" in done.out, done.err
    done = call(finetune.main, [*words, "--weights", "teacher", "--overwrite"])
    assert done.code == 2 and done.err.count("\n") == 1 and model in done.err and "teacher" in done.err


def test_two_of_the_same_rank_are_not_guessed(mae_file):
    path, encoder = mae_file
    student, teacher = dict(encoder.state_dict()), ema_of(encoder.state_dict())
    torch.save({"student": {f"module.backbone.{k}": v for k, v in student.items()}, "teacher": teacher}, path)
    with pytest.raises(ValueError, match=r"mae\.pth holds student, teacher: --weights"):
        read_encoder(path)
    chosen = weights.read_encoder(path, models.from_arch, models.SIZES, which="teacher")
    assert equal(chosen["model"], teacher)


def test_a_class_that_is_not_opened_is_named(mae_file):
    path, encoder = mae_file
    torch.save({"model": encoder.state_dict(), "now": datetime.timedelta(1)}, path)
    with pytest.raises(ValueError, match=r"datetime\.timedelta"):
        read_encoder(path)
    torch.save(encoder, path)
    with pytest.raises(ValueError, match=r"models\.ViT"):
        read_encoder(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_parts_with_an_index(mae_file, tmp_path, suffix):
    _, encoder = mae_file
    tensors = dict(encoder.state_dict())
    names = [f"model-0000{i}-of-00002{suffix}" for i in (1, 2)]
    parts = [dict(list(tensors.items())[i::2]) for i in (0, 1)]
    for name, part in zip(names, parts, strict=True):
        (save_file if suffix == ".safetensors" else torch.save)(part, tmp_path / name)
    places = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    index = tmp_path / f"model{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 3}, "weight_map": places}))
    assert equal(dict(rebuild(read_encoder(index)).state_dict()), tensors)
    with pytest.raises(ValueError, match=r"one part.*index\.json"):
        read_encoder(tmp_path / names[0])
    for bad in ({}, {"weight_map": {"a": "../x.bin"}}, {"weight_map": {**places, "more": names[0]}}, {"weight_map": 3},
                {"weight_map": dict.fromkeys(places, names[1])}, [], {"weight_map": {"a": 3}}):
        index.write_text(json.dumps(bad))
        with pytest.raises(ValueError, match=r"index\.json"):
            read_encoder(index)
    index.write_text(json.dumps({"weight_map": places}))
    (tmp_path / names[1]).unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(names[1])):
        read_encoder(index)


def test_heads_are_guessed_aloud_and_can_be_told(tuned, call, tmp_path):
    """MoCo v3's ViT-S has 12 heads of 32 channels, not 6 of 64. vit_tiny: 4 of 24, here 12 of 8."""
    encoder = stirred(models.build(*VIT, learn_positions=True, num_heads=12))
    assert encoder.arch["num_heads"] == 12 and encoder.blocks[0].attn.num_heads == 12
    path, imgs = tmp_path / "moco.pth", torch.randn(2, 3, 32, 32)
    torch.save(encoder.state_dict(), path)
    guessed = read_encoder(path)
    assert any("heads taken to be 4" in note and "--num_heads" in note for note in guessed["notes"])
    far = (rebuild(guessed)(imgs) - encoder(imgs)).norm() / encoder(imgs).norm()
    told = weights.read_encoder(path, models.from_arch, models.SIZES, num_heads=12)
    assert torch.equal(rebuild(told)(imgs), encoder(imgs)) and far > 0.01
    assert not any("heads taken" in note for note in told["notes"])

    words = tuned(model=None, patch_size=None, init=path, max_steps=1, num_heads=12, img_size=32, out=tmp_path / "run")
    done = call(finetune.main, words)
    assert done.code == 0, done.err
    again = read_encoder(tmp_path / "run" / "encoder.pt")  # it says so itself from now on
    assert again["arch"]["num_heads"] == 12 and models.from_arch(again["arch"]).blocks[0].attn.num_heads == 12
    for heads, said in ((5, "does not divide"), (-12, "does not divide")):
        with pytest.raises(ValueError, match=said):
            weights.read_encoder(path, models.from_arch, models.SIZES, num_heads=heads)
    with pytest.raises(ValueError, match="--num_heads is of weights that do not tell"):
        weights.read_encoder(tmp_path / "run" / "encoder.pt", models.from_arch, models.SIZES, num_heads=6)
    done = call(convert.main, ["export", tmp_path / "run" / "encoder.pt", "--to", "timm", tmp_path / "timm.pth"])
    assert done.code == 0 and "num_heads=12" in done.out, done.err


@pytest.mark.parametrize("positions", ["shared_bias", "block_bias"])
def test_bias_tables_tell_the_heads(tmp_path, positions):
    encoder = stirred(models.build(*VIT, positions=positions, num_heads=12))
    torch.save(encoder.state_dict(), tmp_path / "vit.pth")
    saved = read_encoder(tmp_path / "vit.pth")
    assert saved["arch"] == encoder.arch and not any("heads taken" in note for note in saved["notes"])


def test_statistics_from_elsewhere_are_assumed_aloud(mae_file, tuned, call, tmp_path):
    path, _ = mae_file
    words = tuned(model=None, patch_size=None, init=path, max_steps=1)
    done = call(finetune.main, [*words, "--out", tmp_path / "one"])
    assert done.code == 0 and "taken to be normalised by mean 0.485,0.456,0.406" in done.out
    done = call(finetune.main, [*words, "--mean", 0.5, "--std", 0.5, "--out", tmp_path / "two"])
    assert done.code == 0 and "taken to be normalised" not in done.out
    saved = torch.load(tmp_path / "two" / "encoder.pt")
    assert saved["mean"] == [0.5] * 3 and saved["std"] == [0.5] * 3
    convert.write_safetensors(tmp_path / "two.safetensors", *convert.pack(saved))
    again = read_encoder(tmp_path / "two.safetensors")
    assert again["mean"] == [0.5] * 3 and again["std"] == [0.5] * 3


@pytest.mark.parametrize("changes", [
    {"mean": 3}, {"mean": [0.5]}, {"mean": None}, {"std": [1, 1, 0]}, {"std": ["a"] * 3}, {"std": [math.nan] * 3},
    {"value_range": [3, 2]}, {"value_range": [1]}], ids=repr)
def test_statistics_that_are_none(mae_file, changes):
    path, encoder = mae_file
    torch.save({"arch": encoder.arch, "model": encoder.state_dict(), "method": "MAE", "step": 3, **changes}, path)
    with pytest.raises(ValueError, match=r"not an encoder\.pt"):
        read_encoder(path)


@pytest.mark.parametrize("changes,said", [
    ({"cls_token": None, "pos_embed": (1, 16, 96)}, "16 rows of positions have no class token"),
    ({"cls_token": None, "pos_embed": (1, 8, 96)}, "8 rows of positions have no class token"),
    ({"pos_embed": (1, 16, 96)}, "16 rows of positions are those of 4x4 patches without one for the class token"),
    ({"pos_embed": (1, 18, 96), "dist_token": (1, 1, 96)}, "dist_token beside the class token"),
    ({"pos_embed": (1, 21, 96), "reg_token": (1, 4, 96)}, "reg_token beside the class token"),
    ({"pos_embed": (1, 19, 96)}, "--init_size")])
def test_positions_that_do_not_fit_are_called_what_they_are(mae_file, changes, said):
    path, encoder = mae_file
    tensors = {name: tensor for name, tensor in encoder.state_dict().items() if name not in changes}
    torch.save(tensors | {name: torch.zeros(shape) for name, shape in changes.items() if shape}, path)
    with pytest.raises(ValueError, match=said):
        read_encoder(path)
    with pytest.raises(ValueError, match=r"rows of positions do not fit images of 64x32, which have 32 patches"):
        read_encoder(path, (64, 32))


def test_a_tensor_that_architecture_is_read_from_is_called_missing(mae_file):
    path, encoder = mae_file
    tensors = dict(encoder.state_dict())
    for name in ("patch_embed.proj.weight", "pos_embed"):
        torch.save({k: v for k, v in tensors.items() if k != name}, path)
        with pytest.raises(ValueError, match=f"it lacks {name}"):
            read_encoder(path)


def torchscript(path):
    torch.jit.script(nn.Linear(2, 2)).save(path)


OTHER_FILES = {
    "TorchScript": (torchscript, "a TorchScript program"), "web page": (b"<!DOCTYPE html><html>", "a web page"),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"), "HDF5": (b"\x89HDF\r\n", "HDF5"),
    "gzip": (b"\x1f\x8b\x08", "gzip"),
    "npz": (lambda path: np.savez(path.open("wb"), a=np.ones(3)), "archive of a.npy"),
    "safetensors": (lambda path: save_file({"a": torch.ones(3)}, path), "rename it to .safetensors"),
    "empty": (b"", "empty"), "json": (b'{"a": 3}', "JSON"),
    "a last.pt": (lambda path: torch.save({"model": {}, "optimizer": {}, "scaler": {}, "config": {}, "step": 3}, path),
                  "--resume"),
    "an optimizer": (lambda path: torch.save({"optimizer": {"state": {}}, "epoch": 3}, path), "but optimizer, epoch"),
    "a list": (lambda path: torch.save([1], path), "but list")}


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("kind", OTHER_FILES)
def test_a_file_of_another_kind_is_called_what_it_is(tmp_path, kind):
    content, said = OTHER_FILES[kind]
    path = tmp_path / "a.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content(path)
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        read_encoder(path)
    assert "damaged" not in str(caught.value) and len(str(caught.value).splitlines()) == 1


def spoiled(path, encoder, marker):
    """{what is wrong: function that writes such a file and returns its path}"""
    tensors, whole = encoder.state_dict(), path.read_bytes()
    giant = torch.zeros(1, dtype=torch.float16).as_strided((10**6, 10**6), (0, 0))

    def write(data, name=path.name):
        path.with_name(name).write_bytes(data)
        return path.with_name(name)

    def save(content, **how):
        torch.save(content, path, **how)
        return path

    def changed(**changes):
        return save({"model": {**tensors, **{name.replace("__", "."): value for name, value in changes.items()}}})

    old = {"_use_new_zipfile_serialization": False}
    return {
        "empty": lambda: write(b""), "empty safetensors": lambda: write(b"", "a.safetensors"),
        "cut": lambda: write(whole[: len(whole) // 2]), "text": lambda: write(b"hello " * 99),
        "cut old": lambda: write(save({"model": tensors}, **old).read_bytes()[:-999]),
        "torch in safetensors": lambda: write(whole, "a.safetensors"), "no file": lambda: path.with_name("none.pth"),
        "folder": lambda: path.parent, "hostile": lambda: save({"model": tensors, "args": Hostile(marker)}),
        "hostile old": lambda: save({"model": tensors, "args": Hostile(marker)}, **old),
        "hostile pickle": lambda: write(pickle.dumps(Hostile(marker))),
        "hostile Namespace": lambda: save({"model": tensors, "args": argparse.Namespace(a=Hostile(marker))}),
        "module": lambda: save({"model": nn.Linear(2, 2)}), "nan": lambda: changed(
            norm__weight=torch.full((96,), torch.nan)), "shape": lambda: changed(norm__weight=torch.ones(95)),
        "integers": lambda: changed(norm__weight=torch.ones(96, dtype=torch.int64)),
        "giant": lambda: changed(norm__weight=giant), "giant head": lambda: changed(head__weight=giant),
        "narrow head": lambda: changed(head__weight=torch.ones(3, 50), head__bias=torch.ones(3)),
        "no name": lambda: save({"model": {**tensors, 3: torch.ones(3)}}),
        "sparse": lambda: changed(norm__weight=torch.ones(96).to_sparse()),
        "meta": lambda: changed(norm__weight=torch.ones(96, device="meta")),
        "no tensor": lambda: changed(norm__weight=3.0), "flat patches": lambda: changed(
            patch_embed__proj__weight=torch.ones(96, 192)), "no patches": lambda: save(
            {"model": {k: v for k, v in tensors.items() if "patch" not in k}}),
        "patches of nothing": lambda: changed(patch_embed__proj__weight=torch.ones(96, 3, 0, 0)),
        "images of nothing": lambda: changed(patch_embed__proj__weight=torch.ones(96, 0, 8, 8)),
        "oblong patches": lambda: changed(patch_embed__proj__weight=torch.ones(96, 3, 8, 4)),
        "channels": lambda: save({"arch": {**encoder.arch, "in_chans": 4}, "model": tensors}),
        "half a bias": lambda: changed(blocks__0__attn__q_bias=torch.ones(96)), "nothing": lambda: save({"model": {}}),
        "one name twice": lambda: changed(module__cls_token=tensors["cls_token"], cls__token=torch.ones(1),
                                          blocks__0__ls1__gamma=torch.ones(96), blocks__0__gamma_1=torch.ones(96)),
        "unknown": lambda: save({"model": {"conv1.weight": torch.ones(3, 3)}}),
        "last.pt": lambda: save({"model": {f"encoder.{k}": v for k, v in tensors.items()}, "optimizer": {},
                                 "scaler": {}, "step": 3, "config": {}})}


BAD = ["empty", "empty safetensors", "cut", "text", "cut old", "torch in safetensors", "no file", "folder", "hostile",
       "hostile old", "hostile pickle", "hostile Namespace", "module", "nan", "shape", "integers", "giant",
       "giant head", "narrow head", "sparse", "meta", "no tensor", "no name", "flat patches", "no patches",
       "patches of nothing", "images of nothing", "oblong patches", "channels", "half a bias", "nothing",
       "one name twice", "unknown", "last.pt"]


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
@pytest.mark.parametrize("what", BAD)
def test_bad_weights_end_in_one_line_and_nothing_is_run_or_written(mae_file, tmp_path, tuned, call, what):
    marker = tmp_path / "executed"
    path = spoiled(*mae_file, marker)[what]()
    before = snapshot(tmp_path)
    for main, words in [(finetune.main, [*tuned(model=None, patch_size=None, init=path, out=tmp_path / "run")]),
                        (convert.main, ["export", path, "--to", "timm", tmp_path / "out.pth"])]:
        done = call(main, words)
        assert done.code == 2 and len(done.err.splitlines()) == 1 and "error: " in done.err, done.err
        assert done.err.count(path.name) >= 1
    assert snapshot(tmp_path) == before and not marker.exists()


def test_the_bad_weights_above_are_all(mae_file, tmp_path):
    assert set(BAD) == set(spoiled(*mae_file, tmp_path))


# safetensors


DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
          torch.int8, torch.uint8, torch.bool]


def tensors_of_all_kinds():
    draw = torch.Generator().manual_seed(0)
    found = {str(dtype): (9 * torch.randn(3, 5, generator=draw)).to(dtype) for dtype in DTYPES}
    return {**found, "scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4), "view": torch.arange(12.0).view(3, 4).T}


def in_order(tensors):
    return {name: tensors[name].contiguous() for name in sorted(tensors)}


def test_safetensors_make_the_round_trip(tmp_path):
    ours = tensors_of_all_kinds()
    convert.write_safetensors(tmp_path / "a.safetensors", ours, {"format": "pt", "who": "wir, ä"})
    found, about = formats.read_safetensors(tmp_path / "a.safetensors")
    assert equal(in_order(found), in_order(ours)) and about == {"format": "pt", "who": "wir, ä"}
    assert equal(in_order(load_file(tmp_path / "a.safetensors")), in_order(ours))
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("how", ["read", "write"])
def test_without_the_library_it_is_one_line(mae_file, tmp_path, tuned, call, monkeypatch, how):
    path, encoder = mae_file
    safe = forms(encoder.state_dict(), path)["safetensors"]()
    before = snapshot(tmp_path)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)  # importing it fails
    if how == "read":
        done = call(finetune.main, tuned(model=None, patch_size=None, init=safe, out=tmp_path / "run"))
    else:
        done = call(convert.main, ["export", path, "--to", "timm", tmp_path / "out.safetensors"])
    assert done.code == 2 and done.err.count("\n") == 1 and "pip install safetensors" in done.err, done.err
    assert snapshot(tmp_path) == before


def entry(dtype="F32", shape=(2, 2), offsets=(0, 16)):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


LIES = {
    "no json": b"{", "a list": b"[]", "deep": b'{"a":' * 100_000, "twice": b'{"a":{},"a":{}}', "null": b'{"a":null}',
    "no text": b"\xff\xfe", "number": b'{"__metadata__":3}', "none": b'{"a":{"dtype":"F32"}}',
    "dtype": {"a": entry("F31")}, "dtype list": {"a": entry(["F32"])}, "shape": {"a": entry(shape=[2, 3])},
    "negative": {"a": entry(shape=[-2, -2])}, "float": {"a": entry(shape=[2.0, 2])}, "names": {"a": entry(shape="22")},
    "true": {"a": entry(shape=[True, 4])}, "many": {"a": entry(shape=[1] * 5000 + [4])},
    "huge": {"a": entry(shape=[2**31, 2**31], offsets=[0, 2**64])},
    "huge and empty": {"a": entry(shape=[0, 2**40, 2**40], offsets=[0, 0]), "b": entry()},
    "backwards": {"a": entry(offsets=[16, 0])}, "beyond": {"a": entry(offsets=[0, 32])},
    "behind": {"a": entry(offsets=[16, 32])}, "short": {"a": entry(shape=[1], offsets=[0, 4])},
    "gap": {"a": entry(shape=[1], offsets=[0, 4]), "b": entry(shape=[2], offsets=[8, 16])},
    "overlap": {"a": entry(), "b": entry()}, "three": {"a": entry(offsets=[0, 8, 16])},
    "text": {"a": entry(offsets="ab")},
}


@pytest.mark.parametrize("lie", [*LIES, "length", "longer", "short file"])
def test_a_header_that_lies_is_refused(tmp_path, lie):
    header = LIES.get(lie, {"a": entry()})
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = {"length": 2**63, "longer": len(header) + 17}.get(lie, len(header))
    content = length.to_bytes(8, "little") + header + bytes(16)
    (tmp_path / "a.safetensors").write_bytes(content[:7] if lie == "short file" else content)
    with pytest.raises(ValueError, match=r"a\.safetensors") as caught:
        read_encoder(tmp_path / "a.safetensors")
    assert len(str(caught.value).splitlines()) == 1
    honest = json.dumps({"a": entry()}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(honest).to_bytes(8, "little") + honest + bytes(16))
    assert equal(formats.read_safetensors(tmp_path / "a.safetensors")[0], {"a": torch.zeros(2, 2)})


def test_random_changes_of_a_header_never_do_more_than_be_refused(tmp_path):
    path, draw = tmp_path / "a.safetensors", random.Random(0)
    save_file({"a": torch.zeros(2, 3), "b.c": torch.zeros(4)}, path, {"x": "y"})
    whole = path.read_bytes()
    for _ in range(400):
        bad = bytearray(whole)
        for _ in range(draw.choice((1, 2, 5))):
            bad[draw.randrange(8, len(whole) - 40)] = draw.randrange(256)
        path.write_bytes(bad)
        with contextlib.suppress(ValueError):
            found, _ = formats.read_safetensors(path)
            assert sum(tensor.nbytes for tensor in found.values()) == 40


# Into fine-tuning


def test_published_weights_fine_tune_and_the_run_says_what_it_did(mae_file, tuned, call, tmp_path):
    changes = {"img_size": "32x48", "in_chans": 1, "max_steps": 1, "out": tmp_path / "run"}
    done = call(finetune.main, tuned(model=None, patch_size=None, init=mae_file[0], **changes))
    assert done.code == 0, done.err
    for said in ("patch embedding of 3 channels made one of 1: their sum", "positions resized from 4x4 to 4x6",
                 "check the licence", "newly initialised: fc_norm.weight, fc_norm.bias, head.weight, head.bias",
                 "decoder_pos_embed (1)"):
        assert said in done.out, done.out
    assert read_encoder(tmp_path / "run" / "encoder.pt")["arch"]["in_chans"] == 1


def test_a_published_classifier_is_evaluated(mae_file, tuned, call, folder, tmp_path):
    path, encoder = mae_file
    tensors = {name: t for name, t in encoder.state_dict().items() if not name.startswith("norm.")}
    for K in (3, 4):
        head = {"fc_norm.weight": torch.ones(96), "fc_norm.bias": torch.zeros(96), "head.weight": torch.randn(K, 96),
                "head.bias": torch.zeros(K)}
        torch.save({"model": {**tensors, **head}}, path)
        out = tmp_path / f"run{K}"
        words = flags(eval=True, init=path, data=folder, out=out, device="cpu")
        done = call(finetune.main, words)
        if K == 3:
            assert done.code == 0 and "3 classes have no names" in done.out
            assert json.loads((out / "result.json").read_text())["images"] == 15
        else:
            assert done.code == 2 and len(done.err.splitlines()) == 1 and "head" in done.err and not out.exists()


@pytest.mark.parametrize("channels", [1, 2, 6, 7])
def test_channels_of_a_patch_embedding(channels):
    old = stirred(models.build(*VIT))
    encoder = rebuild({"arch": old.arch, "model": old.state_dict()}, in_chans=channels)
    weight, new = old.patch_embed.proj.weight, encoder.patch_embed.proj.weight
    _, std = transforms.statistics(3)
    if channels == 1:
        folded = sum(weight[:, c] * 0.25 / std[c] for c in range(3))
        torch.testing.assert_close(new[:, 0], folded)
    elif channels % 3 == 0:
        for c in range(channels):
            torch.testing.assert_close(new[:, c], weight[:, c % 3] * 3 / channels * 0.25 / std[c % 3])

    # A grey image gives the same features, each number of channels normalised in its own way.
    grey = torch.randint(0, 256, (2, 1, 32, 32), dtype=torch.uint8)
    before = old(transforms.normalize(grey.expand(-1, 3, -1, -1)))
    after = encoder(transforms.normalize(grey.expand(-1, channels, -1, -1)))
    assert (after - before).norm() / before.norm() < 1e-6


def test_another_normalisation_is_folded_into_the_patch_embedding():
    """Weights of 0.5 and 0.5, as a teacher of images that are normalised as ImageNet's."""
    old = stirred(models.build(*VIT))
    half = types.SimpleNamespace(mean=(0.5,), std=(0.5,))
    encoder = rebuild({"arch": old.arch, "model": old.state_dict(), "mean": [0.5] * 3, "std": [0.5] * 3})
    imgs = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    before, after = old(transforms.normalize(imgs, half)), encoder(transforms.normalize(imgs))
    assert (after - before).norm() / before.norm() < 1e-6


@pytest.mark.parametrize("method,how", [("FastMIM", "bicubic"), ("SimMIM", "geometric"), (None, "geometric")])
def test_bias_tables_are_resized_as_the_method_does(method, how, capsys):
    old = stirred(models.build("swin_tiny", (64, 64), window=2))
    saved = {"arch": old.arch, "model": old.state_dict(), "method": method}
    new = models.build("swin_tiny", (64, 64), window=4)
    weights.load_encoder(new, saved, "file")
    assert f"bias tables resized from 2x2 to 4x4 ({how})" in capsys.readouterr().out
    table = "layers.0.blocks.0.attn.relative_position_bias_table"
    assert torch.equal(new.state_dict()[table], weights.resize_bias_table(old.state_dict()[table], (2, 2), (4, 4), how))
