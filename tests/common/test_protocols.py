"""What an encoder is worth: probes that change nothing, neighbours that vote, one number on any number of processes."""

import json
import shutil

import pytest
import torch
from conftest import ROOT, equal, flags, log_of, snapshot
from encoders import read_encoder

import data
import fastmim
import finetune
import lut
import mae
import simmim
import um_mae
from common import config, neighbours, optim, transforms
from tools import convert, corruptions
from tools.trials import finish, fork

STILL = {"crop_scale": "1,1", "flip": 0, "rand_augment": "false", "random_erasing": 0}  # no augmentation


def one_line(done, *names):
    """Exit code 2, and one line on stderr that says all the names."""
    assert done.code == 2 and len(done.err.splitlines()) == 1 and done.err.startswith("error: "), (done.out, done.err)
    assert all(str(name) in done.err for name in names), done.err


def lines_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


# The probe beside pre-training

METHODS = {
    "fastmim": (fastmim, {"patch_size": 8, "decoder_heads": None}), "lut": (lut, {"head_width": 32}),
    "mae": (mae, {}),
    "simmim": (simmim, {"mask_unit": 8, "decoder_depth": None, "decoder_width": None, "decoder_heads": None}),
    "um_mae": (um_mae, {"patch_size": 4, "unit": 4, "img_size": 16})}


@pytest.mark.parametrize("name", METHODS)
def test_a_probe_does_not_change_training(tiny, call, tmp_path, name):
    script, changes = METHODS[name]
    for out, epochs in (("without", 0), ("with", 0.5)):
        words = tiny(**changes, crop_scale="0.3,1", max_steps=5, probe_epochs=epochs, out=tmp_path / out)
        done = call(script.main, words)
        assert done.code == 0 and done.err == "", done.err
    one, two = (torch.load(tmp_path / out / "last.pt") for out in ("without", "with"))
    assert equal(one, two)
    probes = [line for line in lines_of(tmp_path / "with") if "knn_top1" in line]
    assert [line["step"] for line in probes] == [2, 4, 5] and "k-NN top-1" in done.out
    assert not any("knn_top1" in line for line in lines_of(tmp_path / "without"))
    share = probes[-1]["knn_top1"] / 100 * 15  # validation images
    assert share == pytest.approx(round(share))


def test_a_probe_of_other_data_with_few_labels(tiny, folder, call, tmp_path):
    """Pre-training on a flat folder, the probe on a labelled one."""
    done = call(mae.main, tiny(data=folder / "train" / "ant", probe_data=folder, probe_labels=6, probe_epochs=1,
                               max_steps=1, out=tmp_path / "run"))
    assert done.code == 0, done.err
    assert "knn_top1" in lines_of(tmp_path / "run")[-1]


@pytest.mark.parametrize("changes,names", [({"probe_data": "{}/train/ant"}, ["ant", "labels"]),
                                           ({"probe_labels": 2}, ["--probe_labels 2", "3 classes"]),
                                           ({"probe_epochs": -1}, ["--probe_epochs"])], ids=repr)
def test_a_probe_without_labels_is_refused_at_once(tiny, folder, call, tmp_path, changes, names):
    changes = {key: str(value).format(folder) for key, value in changes.items()}
    one_line(call(mae.main, tiny(**{"probe_epochs": 1, **changes, "out": tmp_path / "run"})), *names)
    assert not list(tmp_path.iterdir())


# Protocols of fine-tuning


@pytest.fixture(scope="module")
def pretrained(tiny, tmp_path_factory):
    """{method: encoder.pt} of short runs of the method files."""
    encoders = {}
    for name, (script, changes) in METHODS.items():
        out = tmp_path_factory.mktemp("runs") / name
        script.main([str(w) for w in tiny(**changes, max_steps=2, out=out)])
        encoders[name] = out / "encoder.pt"
    pyramid = flags(model="swin_tiny", patch_size=4, window=2, mask_unit=32, img_size=64)
    out = tmp_path_factory.mktemp("runs") / "pyramid"
    words = tiny(mask_unit=32, decoder_depth=None, decoder_width=None, decoder_heads=None, max_steps=1, out=out)
    simmim.main([str(w) for w in [*words, *pyramid]])
    return {**encoders, "pyramid": out / "encoder.pt"}


@pytest.fixture
def tune(tuned, call, pretrained, tmp_path):
    """`tune(**changes)` runs finetune.py in OUT `run`, from the encoder of mae.py unless told otherwise."""
    def run(**changes):
        words = {"init": pretrained["mae"], "model": None, "patch_size": None, "out": tmp_path / "run", **changes}
        return call(finetune.main, tuned(**words))
    return run


def edited(call, source, *words):
    """The path of an encoder.pt that tools/convert.py cut or shuffled."""
    out = source.with_name(f"{'_'.join(words)} {source.name}")
    if not out.exists():
        done = call(convert.main, [*words, source, out])
        assert done.code == 0 and done.err == "", done.err
    return out


PROTOCOLS = {
    "full": {}, "linear": {"mode": "linear", "crop_scale": "0.5,1"}, "linear, cached": {"mode": "linear", **STILL},
    "linear, sgd": {"mode": "linear", "optimizer": "sgd", **STILL}, "partial": {"train_blocks": 1},
    "half a block": {"train_blocks": 0.5}, "averaged": {"ema": 0.9}, "knn": {"mode": "knn"},
    "dropped": {}, "shuffled": {}}
EDITS = {"dropped": ["--drop_layers", "1"], "shuffled": ["--drop_layers", "1", "--shuffle_layers"]}


@pytest.mark.parametrize("method", [*METHODS, "pyramid"])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_checkpoint_goes_through_every_protocol(tune, pretrained, call, tmp_path, method, protocol):
    changes = {"img_size": None, **PROTOCOLS[protocol]}
    init = edited(call, pretrained[method], *EDITS[protocol]) if protocol in EDITS else pretrained[method]
    done = tune(init=init, max_steps=2, **changes)
    assert done.code == 0 and done.err == "", done.err
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["images"] == 15 and 0 <= result["mean_per_class"] <= 100
    if protocol != "knn" and method in ("mae", "pyramid"):
        done = tune(init=tmp_path / "run" / "encoder.pt", eval="true", img_size=None, out=tmp_path / "check")
        assert done.code == 0, done.err
        again = json.loads((tmp_path / "check" / "result.json").read_text())
        assert again["confusion"] == result["confusion"] and again["top1"] == result["top1"]


def test_what_was_cut_can_be_judged_in_its_mode_and_cut_again(tune, pretrained, call, tmp_path):
    """A linear head is judged with --mode linear, too; a cut encoder is fine-tuned again, as it is and shorter."""
    assert tune(mode="linear", base_lr=3, max_steps=6).code == 0
    assert tune(init=tmp_path / "run" / "encoder.pt", mode="linear", eval="true", out=tmp_path / "check").code == 0
    one, two = (json.loads((tmp_path / out / "result.json").read_text())["top1"] for out in ("run", "check"))
    assert one == two
    assert tune(init=edited(call, pretrained["mae"], "--drop_layers", "1"), max_steps=1, out=tmp_path / "cut").code == 0
    for more, blocks in ((0, 3), (1, 2)):
        init = tmp_path / "cut" / "encoder.pt"
        if more:
            init = edited(call, init, "--drop_layers", str(more))
        done = tune(init=init, max_steps=1, out=tmp_path / str(more))
        assert done.code == 0, done.err
        saved = torch.load(tmp_path / str(more) / "encoder.pt")
        assert saved["arch"]["options"]["drop_layers"] == 4 - blocks
        assert len({name.split(".")[1] for name in saved["model"] if name.startswith("blocks.")}) == blocks
    older = {**saved, "arch": {**saved["arch"], "drop_layers": 2}}  # where files had it before
    older["arch"]["options"] = {k: v for k, v in saved["arch"]["options"].items() if k != "drop_layers"}
    torch.save(older, tmp_path / "older.pt")
    assert equal(read_encoder(tmp_path / "older.pt")["arch"], saved["arch"])
    assert tune(init=tmp_path / "older.pt", max_steps=1, out=tmp_path / "older").code == 0
    assert equal(torch.load(tmp_path / "older" / "encoder.pt")["arch"], saved["arch"])
    saved["arch"]["options"]["drop_layers"] = "two"
    torch.save(saved, tmp_path / "odd.pt")
    one_line(tune(init=tmp_path / "odd.pt", out=tmp_path / "odd"), "--drop_layers")


@pytest.mark.parametrize("blocks,trained", [
    (0.5, ["blocks.3.mlp", "blocks.3.norm2"]), (1, ["blocks.3."]), (4, ["blocks."]),
    (1.5, ["blocks.2.mlp", "blocks.2.norm2", "blocks.3."])])
def test_partial_trains_what_it_says_and_nothing_else(tune, pretrained, tmp_path, blocks, trained):
    assert tune(train_blocks=blocks, base_lr=0.3, max_steps=6).code == 0
    before, after = (torch.load(path)["model"] for path in (pretrained["mae"], tmp_path / "run" / "encoder.pt"))
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert moved == {name for name in after if name.startswith(tuple(trained))}
    names = [name for group in torch.load(tmp_path / "run" / "last.pt")["optimizer"]["param_groups"]
             for name in group["names"]]
    assert {name.removeprefix("encoder.") for name in names if name.startswith("encoder.")} == moved
    assert {name for name in names if not name.startswith("encoder.")} == {
        "fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}


@pytest.mark.parametrize("changes,moving", [({"mode": "linear"}, 0), ({"train_blocks": 1}, 2), ({}, 20)], ids=repr)
def test_frozen_batchnorm_keeps_its_statistics(changes, moving):
    """resnet18 has a norm behind each of its 20 convolutions; two of them are in its last block."""
    cfg = finetune.Config(model="torchvision:resnet18", in_chans=3, img_size=(32, 32), drop_path=0.0, **changes)
    model = finetune.build_classifier(cfg, None, list("abc")).train()
    before = {name: value.clone() for name, value in model.encoder.state_dict().items()}
    model(torch.randn(4, 3, 32, 32))
    moved = {name.rpartition(".")[0] for name, value in model.encoder.state_dict().items()
             if not torch.equal(value, before[name])}
    assert len(moved) == moving


def test_partial_of_a_pyramid(pretrained):
    """Swin: the merging behind a stage belongs to its last block; the half of a block is its MLP and the norm ahead."""
    cfg, saved = finetune.resolve(finetune.Config(init=str(pretrained["pyramid"]), train_blocks=2.5))
    model = finetune.build_classifier(cfg, saved, list("abc"))
    trained = {name.rsplit(".", 1)[0] for name, p in model.encoder.named_parameters() if p.requires_grad}
    assert {"layers.3.blocks.0.attn.qkv", "layers.2.blocks.1.attn.qkv", "layers.2.downsample.reduction",
            "layers.2.blocks.0.mlp.fc1", "layers.2.blocks.0.norm2"} <= trained
    assert not {"layers.2.blocks.0.attn.qkv", "layers.2.blocks.0.norm1", "layers.1.downsample.reduction"} & trained


def test_the_moving_average_is_its_formula_and_survives_a_resume(tune, tuned, call, tmp_path, pretrained, monkeypatch):
    """encoder.pt holds the average, of the start and all steps; stopped and resumed, bit for bit the same."""
    seen, real = [], optim.update_ema
    def watched(average, model, decay):
        real(average, model, decay)
        seen.append({k: v.clone() for k, v in model.state_dict().items() if not k.startswith("average.")})

    start = {}
    build = finetune.build_classifier
    def kept(*words, **more):
        model = build(*words, **more)
        start.update({k: v.clone() for k, v in model.state_dict().items() if not k.startswith("average.")})
        return model

    with monkeypatch.context() as patch:
        patch.setattr(optim, "update_ema", watched)
        patch.setattr(finetune, "build_classifier", kept)
        assert tune(ema=0.8, max_steps=5, base_lr=0.3).code == 0
    assert len(seen) == 5
    expected = start
    for state in seen:
        expected = {k: 0.8 * v + 0.2 * state[k] for k, v in expected.items()}
    saved = torch.load(tmp_path / "run" / "encoder.pt")
    average = {**{f"encoder.{k}": v for k, v in saved["model"].items()}, **saved["classifier"]["tensors"]}
    assert average.keys() == expected.keys()
    for name in average:
        torch.testing.assert_close(average[name], expected[name], rtol=1e-5, atol=1e-7)
    assert not torch.allclose(average["head.weight"], seen[-1]["head.weight"])
    for steps in (2, 5):
        assert tune(ema=0.8, max_steps=steps, base_lr=0.3, resume="true", out=tmp_path / "again").code == 0
    assert equal(*(torch.load(tmp_path / out / "last.pt") for out in ("run", "again")))
    assert equal(*(torch.load(tmp_path / out / "encoder.pt") for out in ("run", "again")))


def test_dropped_and_shuffled_blocks_of_a_vit(pretrained, call):
    def build(*words):
        cfg = finetune.Config(init=str(edited(call, pretrained["mae"], *words)), pool="cls", drop_path=0.0)
        cfg, saved = finetune.resolve(cfg)
        return finetune.build_classifier(cfg, saved, list("abc")).encoder

    def block(tensors, i):
        return {k: v for k, v in tensors.items() if k.startswith(f"blocks.{i}.")}

    imgs = torch.randn(2, 3, 16, 16)
    cut, tensors = build("--drop_layers", "1"), torch.load(pretrained["mae"])["model"]
    whole = finetune.build_classifier(*finetune.resolve(finetune.Config(
        init=str(pretrained["mae"]), pool="cls", drop_path=0.0)), list("abc")).encoder
    x = torch.cat([(whole.cls_token + whole.pos_embed[:, :1]).expand(2, -1, -1),
                   whole.embed(imgs) + whole.pos_embed[:, 1:]], dim=1)
    for layer in whole.blocks[:3]:
        x = layer(x)
    torch.testing.assert_close(cut(imgs), whole.norm(x))  # the features of the third of four blocks
    assert cut.num_layers == 3 and cut.layer_id("blocks.2.norm1.weight") == 3 and cut.layer_id("norm.weight") == 4

    orders = set()
    for seed in range(6):
        mixed = build("--drop_layers", "2", "--shuffle_layers", "--seed", str(seed))
        state, order = mixed.state_dict(), []
        for new in range(2):
            fits = [old for old in range(4) if torch.equal(state[f"blocks.{new}.attn.qkv.weight"],
                                                            tensors[f"blocks.{old}.attn.qkv.weight"])]
            order += fits
            assert len(fits) == 1 and all(torch.equal(state[k.replace(f"blocks.{fits[0]}.", f"blocks.{new}.")], v)
                                          for k, v in block(tensors, fits[0]).items())
        assert len(set(order)) == 2 and torch.equal(state["cls_token"], tensors["cls_token"])
        orders.add(tuple(order))
    assert len(orders) > 2


def test_dropped_blocks_of_a_pyramid_take_the_fourth_stage_along(pretrained, call):
    def build(path):
        cfg, saved = finetune.resolve(finetune.Config(init=str(path), drop_path=0.0))
        return finetune.build_classifier(cfg, saved, list("abc")).eval()

    model = build(edited(call, pretrained["pyramid"], "--drop_layers", "1"))
    whole = build(pretrained["pyramid"]).encoder
    imgs = torch.randn(2, 3, 64, 64)
    del whole.layers[2]["blocks"][1:]
    stage = whole.run_stages(whole.embed(imgs))[2][0]  # (B, 4*4, 128): what the first block of stage 3 gives
    torch.testing.assert_close(model.encoder(imgs), stage)
    assert model.head.in_features == model.encoder.width == 128 and model.encoder.num_layers == 3


def test_features_are_kept_only_where_that_changes_nothing(tune, tmp_path, monkeypatch):
    words = dict(mode="linear", optimizer="sgd", base_lr=3, **STILL)
    done = tune(**words)
    assert done.code == 0 and "features of 36 images kept" in done.out
    monkeypatch.setattr(transforms, "always_alike", lambda cfg: False)
    assert tune(**words, out=tmp_path / "slow").code == 0
    fast, slow = (log_of(tmp_path / out) for out in ("run", "slow"))
    assert [line["loss"] for line in fast] == pytest.approx([line["loss"] for line in slow], rel=1e-5)
    fast, slow = (torch.load(tmp_path / out / "encoder.pt")["classifier"]["tensors"] for out in ("run", "slow"))
    for name in fast:
        torch.testing.assert_close(fast[name], slow[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changes", [{"crop_scale": "0.5,1"}, {"flip": 0.5}, {"shift": 1}, {"color_jitter": 0.1},
                                     {"rand_augment": True}, {"random_erasing": 0.1}], ids=repr)
def test_any_augmentation_forbids_kept_features(changes):
    assert transforms.always_alike(finetune.Config(**{**STILL, "crop_scale": (1.0, 1.0), "rand_augment": False}))
    changes = {"crop_scale": (0.5, 1.0)} if "crop_scale" in changes else changes
    assert not transforms.always_alike(finetune.Config(**{**STILL, "crop_scale": (1.0, 1.0), "rand_augment": False,
                                                        **changes}))


def test_knn_is_the_neighbours_of_plain_features(tune, tmp_path, folder, pretrained):
    assert tune(mode="knn", neighbours=5).code == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    cfg, saved = finetune.resolve(finetune.Config(init=str(pretrained["mae"]), mode="knn", data=str(folder)))
    encoder = finetune.build_classifier(cfg, saved, list("abc")).encoder.eval()
    features, labels = {}, {}
    for split in ("train", "val"):
        part = data.labelled_set(cfg, split, augment=False)
        imgs, truth = zip(*[part[0, i, i][:2] for i in range(len(part))], strict=True)
        with torch.no_grad():
            features[split] = encoder(transforms.normalize(torch.stack(imgs)))[:, 1:].mean(dim=1)
        labels[split] = torch.tensor(truth)
    scores = neighbours.neighbours(features["train"], labels["train"], features["val"], 3, k=5)
    assert result["top1"] == pytest.approx(100 * (scores.argmax(dim=1) == labels["val"]).double().mean().item())


def test_intermediate_finetuning_starts_a_new_head(tune, tmp_path, folder):
    """From three classes to two others: the norm goes along, the head is new; for the same classes all of it."""
    assert tune(max_steps=6, base_lr=0.3).code == 0
    for split in ("train", "val"):
        for name, there in (("x", "ant"), ("y", "bee")):
            shutil.copytree(folder / split / there, tmp_path / "two" / split / name)
    done = tune(init=tmp_path / "run" / "encoder.pt", data=tmp_path / "two", max_steps=1, out=tmp_path / "next")
    assert done.code == 0 and "kept of its classifier: fc_norm\n  newly initialised: head.weight, head.bias" in done.out
    first, then = (torch.load(tmp_path / out / "encoder.pt") for out in ("run", "next"))
    assert then["classifier"]["classes"] == ["x", "y"] and then["classifier"]["tensors"]["head.weight"].shape[0] == 2
    same = lambda part: torch.equal(first["classifier"]["tensors"][part], then["classifier"]["tensors"][part])  # noqa: E731
    assert same("fc_norm.weight") and equal(first["model"], then["model"])  # the learning rate of step 0 is 0
    done = tune(init=tmp_path / "run" / "encoder.pt", max_steps=1, out=tmp_path / "on")
    assert "kept of its classifier: fc_norm, head" in done.out and "newly" not in done.out
    assert equal(first["classifier"]["tensors"], torch.load(tmp_path / "on" / "encoder.pt")["classifier"]["tensors"])
    done = tune(init=tmp_path / "run" / "encoder.pt", max_steps=1, mode="linear", out=tmp_path / "probe")
    assert done.code == 0 and "newly initialised: head.weight, head.bias" in done.out, done.err


def test_linear_has_its_own_defaults(capsys):
    def options(*words):
        return config.parse(finetune.Config, "", list(words), presets={"linear": finetune.LINEAR})

    linear, full = options("--mode", "linear"), options()
    recipe = options("--config", str(ROOT / "configs" / "linear_vit_b.yaml"))
    assert all(getattr(linear, name) == value == getattr(recipe, name) for name, value in finetune.LINEAR.items())
    assert full == finetune.Config() and (linear.mixup, full.mixup) == (0.0, 0.8)
    assert options("--mode", "linear", "--epochs", "3").epochs == 3


# Evaluation


def test_another_size_at_test_time(tune, tmp_path):
    assert tune(max_steps=3).code == 0
    done = tune(init=tmp_path / "run" / "encoder.pt", eval="true", img_size="24x16", out=tmp_path / "check")
    assert done.code == 0 and "positions resized from 4x4 to 6x4" in done.out


def test_a_broken_image_where_accuracy_is_measured_is_one_line(tune, tmp_path, folder):
    shutil.copytree(folder, tmp_path / "data")
    for name in ("ant/0.png", "cat/3.png"):
        (tmp_path / "data" / "val" / name).write_bytes(b"no image")
    for changes in ({}, {"mode": "knn"}):
        done = tune(data=tmp_path / "data", max_steps=1, out=tmp_path / f"run{len(changes)}", **changes)
        assert done.code == 2 and done.err.splitlines()[-1].startswith("error: ") and "Traceback" not in done.err
        assert "val/ant/0.png" in done.err


DRIVER = """
import importlib, json, sys
import torch.distributed as dist

# The runs share one process group: a third one in the same process does not come about.
join, leave = dist.init_process_group, dist.destroy_process_group
dist.init_process_group = lambda *a, **k: dist.is_initialized() or join(*a, **k)
dist.destroy_process_group = lambda: None
for script, words in json.loads(sys.argv[1]):
    importlib.import_module(script).main(words)
dist.barrier()
leave()
"""


def test_processes_judge_alike(tune, tuned, call, pretrained, tmp_path):
    """Three processes, with a classifier, its features' neighbours and corrupted images: one's numbers, every digit."""
    assert tune(max_steps=6, base_lr=0.3).code == 0
    scripts = {"finetune": finetune, "tools.corruptions": corruptions}
    runs = {"eval": ("finetune", {"eval": "true", "init": tmp_path / "run" / "encoder.pt"}),
            "knn": ("finetune", {"mode": "knn", "init": pretrained["mae"]}),
            "corrupted": ("tools.corruptions", {"init": tmp_path / "run" / "encoder.pt"})}
    common = {"model": None, "patch_size": None, "micro_batch": 2, "batch_size": 12}
    for name, (script, changes) in runs.items():
        assert call(scripts[script].main, tuned(**common, **changes, out=tmp_path / f"{name}1")).code == 0
    (tmp_path / "driver.py").write_text(DRIVER)
    words = [(script, tuned(**common, **changes, out=tmp_path / name)) for name, (script, changes) in runs.items()]
    code, _, err = finish(fork(tmp_path / "driver.py", json.dumps(words), world=3))
    assert code == 0, err
    for name in runs:
        assert (tmp_path / name / "result.json").read_text() == (tmp_path / f"{name}1" / "result.json").read_text()


BAD = [({"train_blocks": 0.3}, ["--train_blocks"]), ({"train_blocks": 9}, ["--train_blocks", "4"]),
       ({"train_blocks": 1, "mode": "linear"}, ["--train_blocks", "linear"]), ({"ema": 1.0}, ["--ema"]),
       ({"neighbours": 0}, ["--neighbours"]), ({"optimizer": "adam"}, ["--optimizer", "sgd"]),
       ({"eval": "true"}, ["--eval", "no classifier"])]


@pytest.mark.parametrize("changes,names", BAD, ids=lambda v: str(v) if isinstance(v, dict) else None)
def test_what_does_not_fit_is_one_line(tune, tmp_path, changes, names):
    one_line(tune(**changes), *names)
    assert not list(tmp_path.iterdir())


def test_labels_and_weights_that_are_not_there(tune, tmp_path, folder, pretrained):
    """An empty class, a folder without labels, a NaN in encoder and head: one line, and nothing is written."""
    shutil.copytree(folder, tmp_path / "empty")
    shutil.rmtree(tmp_path / "empty" / "val" / "bee")
    (tmp_path / "empty" / "val" / "bee").mkdir()
    one_line(tune(data=tmp_path / "empty"), "bee", "no images")
    one_line(tune(data=folder / "train" / "ant"), "labels")
    saved = torch.load(pretrained["mae"])
    saved["model"]["norm.bias"] = saved["model"]["norm.bias"] * float("nan")
    torch.save(saved, tmp_path / "nan.pt")
    one_line(tune(init=tmp_path / "nan.pt", pool="cls"), "norm.bias", "not finite")
    assert not (tmp_path / "run").exists()
    assert tune(max_steps=1).code == 0
    saved = torch.load(tmp_path / "run" / "encoder.pt")
    saved["classifier"]["tensors"]["head.bias"] += float("nan")
    torch.save(saved, tmp_path / "nan.pt")
    before = snapshot(tmp_path / "run")
    one_line(tune(init=tmp_path / "nan.pt", eval="true"), "bias", "not finite")
    one_line(tune(init=tmp_path / "run" / "encoder.pt", eval="true", data="shapes"), "10 classes")
    assert snapshot(tmp_path / "run") == before
