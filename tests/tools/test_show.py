"""show.py: reconstructions, classes and attention of image files, the picture of a confusion, and one line about what
is wrong."""

import io
import json
import sys

import numpy as np
import pytest
import torch
from conftest import batch, equal, paint, snapshot
from PIL import Image

import fastmim
import finetune
import lut
import mae
import models
import simmim
import um_mae
from common import checkpoint, config, randomness, transforms
from common.images import decode
from tools import reconstructions, show

SMALL = {"model": "vit_tiny", "patch_size": 4, "img_size": (16, 16), "data": "shapes"}
OF_DECODER = {"decoder_depth": 1, "decoder_width": 32, "decoder_heads": 2}
METHODS = {  # script: its options, the layer that predicts, options of another mask, the title of both
    "mae": (mae.MAE, {**OF_DECODER, "target": "norm_pixels"}, "decoder.pred", {"mask_ratio": 0.5, "mask": "block"},
            "MAE, vit_tiny\nmask_ratio 0.5, mask block"),
    "simmim": (simmim.SimMIM, {"mask_unit": 4, "drop_path": 0.9}, "head", {"mask_ratio": 0.3},
               "SimMIM, vit_tiny\nmask_ratio 0.3, mask_unit 4"),
    "um_mae": (um_mae.UMMAE, {**OF_DECODER, "unit": 4}, "decoder.pred", {"sampling": "grid", "secondary_ratio": 0.5},
               "UM-MAE, vit_tiny\nsampling grid, secondary_ratio 0.5"),
    "fastmim": (fastmim.FastMIM, {"mask_unit": 4, "decoder_depth": 0}, "decoder", {"mask_ratio": 0.25},
                "FastMIM, vit_tiny\nmask_ratio 0.25, mask_unit 4"),
    "lut": (lut.LUT, {**OF_DECODER, "head_width": 32}, "decoder.pred", {"mask_ratio": 0.5},
            "LUT, vit_tiny\nmask_ratio 0.5")}


def of_all_methods(test):
    return pytest.mark.parametrize("method", METHODS)(test)


def last_pt(path, model):
    """A last.pt as engine.py writes it, of a model that has not trained."""
    checkpoint.write(path, {"model": model.state_dict(), "optimizer": {}, "scaler": {}, "step": 0,
                            "config": model.cfg.fixed_options()})
    return path


@pytest.fixture(scope="module")
def last(tmp_path_factory):
    """{script: last.pt} of small models whose weights are random, and whose predictions are not 0."""
    root, found = tmp_path_factory.mktemp("last"), {}
    for name, (model_class, options, predicts, *_) in METHODS.items():
        torch.manual_seed(0)
        model = model_class(reconstructions.SCRIPTS[model_class].Config(**SMALL, **options))
        torch.nn.init.normal_(model.get_submodule(predicts).bias, std=0.2)
        found[name] = last_pt(root / f"{name}.pt", model)
    return found


@pytest.fixture(scope="module")
def run(tuned, tmp_path_factory):
    """The folder of a short fine-tuning."""
    out = tmp_path_factory.mktemp("runs") / "run"
    finetune.main([str(w) for w in tuned(max_steps=12, base_lr=0.3, out=out)])
    return out


def one_line(done, *names):
    assert done.code == 2 and len(done.err.splitlines()) == 1 and done.err.startswith("error: "), (done.out, done.err)
    assert all(name in done.err for name in names), done.err


# A model out of its last.pt


@of_all_methods
def test_a_model_is_what_was_saved(last, method):
    model_class, options, *_ = METHODS[method]
    saved, model = torch.load(last[method]), show.load(last[method])
    assert type(model) is model_class and not any(module.training for module in model.modules())
    assert equal(dict(model.state_dict()), dict(saved["model"]))
    found = {name: getattr(model.cfg, name) for name in SMALL | options}
    assert found == {**SMALL, **options, **({"drop_path": 0.0} if "drop_path" in options else {})}


def test_the_last_pt_of_a_run_reconstructs(tiny, call, folder, tmp_path):
    """The loss in the title is that of the model in the run's folder, with noise that --seed draws."""
    assert call(mae.main, tiny(max_steps=4, out=tmp_path / "run", mean="0.4,0.5,0.6", std="0.2,0.3,0.3")).code == 0
    image, before = folder / "val" / "bee" / "0.png", snapshot(tmp_path / "run")
    words = [image, "--init", tmp_path / "run" / "last.pt", "--seed", 5, "--out", tmp_path / "show.png"]
    done = call(show.main, words)
    assert done.code == 0 and done.err == "" and snapshot(tmp_path / "run") == before, done.err
    model = show.load(tmp_path / "run" / "last.pt")
    imgs = (decode(str(image))[None] / 255 - torch.tensor([0.4, 0.5, 0.6])[:, None, None]) \
        / torch.tensor([0.2, 0.3, 0.3])[:, None, None]
    loss = model(imgs, randomness.noise(5, 0, 1, 16, use="sample")).item()
    assert f"loss {loss:.4f} (target norm_pixels)" in done.out and "show.png" in done.out
    other = call(show.main, [*words, "--seed", 6])
    assert other.code == 0 and f"loss {loss:.4f}" not in other.out


def test_stochastic_depth_is_off(last):
    """With --drop_path 0.9 in the file, noise of whatever size changes no loss."""
    model = show.load(last["simmim"])
    imgs, noise = batch(model)
    other = noise.clone()
    other[:, model.num_units :] = 0.0  # would drop all
    assert torch.equal(model(imgs, noise), model(imgs, other))


def test_a_teacher_is_no_part_of_what_is_loaded(last, tmp_path):
    model = show.load(last["fastmim"])
    saved = torch.load(last["fastmim"])
    saved["config"]["teacher"] = "gone/encoder.pt"
    saved["model"]["project.weight"], saved["model"]["project.bias"] = torch.ones(8, 96), torch.ones(8)
    checkpoint.write(tmp_path / "last.pt", saved)
    assert equal(dict(show.load(tmp_path / "last.pt").state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize("change,says", [
    ({"depth": 3}, "none of the five methods"), ({"mask_ratio": "0.5"}, "--mask_ratio cannot be"),
    ({"mask_ratio": 1.5}, "--mask_ratio must lie in"), ({"img_size": ["a", 2]}, "--img_size cannot be"),
    ({"img_size": [32, 32]}, "should be"), ({"model": "vit_huge"}, "unknown --model"),
    ({"mask": None}, "--mask cannot")])
def test_options_in_a_file_that_cannot_be(last, tmp_path, call, folder, change, says):
    saved = torch.load(last["mae"])
    checkpoint.write(tmp_path / "last.pt", {**saved, "config": {**saved["config"], **change}})
    with pytest.raises(ValueError, match=says):
        show.load(tmp_path / "last.pt")
    one_line(call(show.main, [folder / "val" / "ant" / "0.png", "--init", tmp_path / "last.pt"]), says)
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


# Reconstructions


@of_all_methods
def test_a_reconstruction_is_what_the_script_itself_draws(last, method):
    model = show.load(last[method])
    imgs = batch(model)[0]
    rows, title = reconstructions.reconstruction(model, imgs, seed=3)
    noise = randomness.noise(3, 0, 3, model.num_noise, use="sample")
    pairs = torch.stack([imgs, imgs], dim=1) if method == "lut" else imgs
    assert equal(rows, reconstructions.SCRIPTS[type(model)].reconstruct(model, pairs, noise))
    assert title.startswith(METHODS[method][4].split("\n")[0]) and "\nloss " in title


@of_all_methods
def test_options_choose_the_mask(last, call, folder, tmp_path, method):
    """Image files of several sizes, and one alone; the title says which mask, and which loss."""
    _, _, _, changes, title = METHODS[method]
    paint(tmp_path / "wide.png", seed=3, size=(20, 45))
    words = [word for name, value in changes.items() for word in (f"--{name}", value)]
    files = [folder / "val" / "ant" / "0.png", tmp_path / "wide.png"]
    for images in (files, files[1:]):
        out = tmp_path / "new" / f"{len(images)}.png"
        done = call(show.main, [*images, "--init", last[method], "--out", out, *words])
        assert done.code == 0 and done.err == "" and f"{title}\nloss " in done.out, (done.out, done.err)
        with Image.open(out) as picture:
            assert picture.size[0] > 200 * len(images) and picture.size[1] > 500
    if method == "lut":
        assert "pixel_loss" in done.out and "context_loss" in done.out


def test_what_cannot_be_reconstructed(last, call, folder, tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    image = folder / "val" / "ant" / "0.png"

    def fails(*words):
        done = call(show.main, [*words])
        assert not list(tmp_path.glob("*.png"))
        return done

    one_line(fails(image, "--init", last["simmim"], "--mask", "block"), "simmim.py, which has no --mask")
    one_line(fails(image, "--init", last["mae"], "--mask", "blocks"), "--mask is one of random, block, grid")
    one_line(fails(image, "--init", last["mae"], "--mask_ratio", 1), "--mask_ratio must lie in [0, 1)")
    one_line(fails(image, "--init", last["mae"], "--img_size", 32), "--img_size is nothing", "a reconstruction")
    one_line(fails(image, "--init", run / "last.pt"), "none of the five methods", "encoder.pt beside it")
    (tmp_path / "last.pt").write_bytes(last["mae"].read_bytes()[:-500])
    one_line(fails(image, "--init", tmp_path / "last.pt"), "last.pt")
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    one_line(fails(tmp_path / "bad.jpg", "--init", last["mae"]), "bad.jpg")
    one_line(fails(tmp_path / "gone.jpg", "--init", last["mae"]), "gone.jpg")
    one_line(fails(image, "--init", run / "encoder.pt", "--mask_ratio", 0.5), "--mask_ratio is nothing", "a classifier")
    assert call(show.main, [image, "--init", last["mae"]]).code == 0 and (tmp_path / "runs" / "show.png").exists()


# Attention


def test_attention_of_image_files(last, call, folder, tmp_path, run):
    """The same for a last.pt, and for the encoder in it; drawn for a classifier, too."""
    image = folder / "val" / "ant" / "0.png"
    encoder = show.load(last["mae"]).encoder
    checkpoint.write(tmp_path / "encoder.pt", {"arch": config.to_plain(encoder.arch), "model": encoder.state_dict(),
                                               "method": "MAE", "step": 0})
    (tmp_path / "mae.pt").write_bytes(last["mae"].read_bytes())
    records = []
    for path in (tmp_path / "mae.pt", tmp_path / "encoder.pt", run / "encoder.pt"):
        words = [image, "--init", path, "--attention", "--layer", 2, "--queries", "1,14", "--out", tmp_path / "a.png"]
        with pytest.MonkeyPatch.context() as patch:
            draw = show.analysis_figures.attention
            patch.setattr(show.analysis_figures, "attention",
                          lambda out, record, *rest, draw=draw: records.append(record) or draw(out, record, *rest))
            done = call(show.main, words)
        assert done.code == 0 and done.err == "" and (tmp_path / "a.png").stat().st_size > 1000, done.err
        (tmp_path / "a.png").unlink()
    maps = [next(iter(record["maps"].values())) for record in records]
    assert maps[0] == maps[1] != maps[2] and np.shape(maps[0]) == (1, 1, 4, 4, 4)


@pytest.mark.parametrize("name", ["encoder.pt", "last.pt"])
def test_attention_takes_black_and_white_from_the_checkpoint(name, call, tmp_path, monkeypatch):
    """An = in its path names nothing."""
    torch.manual_seed(0)
    model = mae.MAE(mae.Config(**SMALL, **OF_DECODER, in_chans=1, value_range=(0.0, 1000.0)))
    path = tmp_path / "lr=1" / name
    path.parent.mkdir()
    if name == "last.pt":
        last_pt(path, model)
    else:
        checkpoint.write(path, {"arch": config.to_plain(model.encoder.arch), "model": model.encoder.state_dict(),
                                "method": "MAE", "step": 0, "value_range": [0.0, 1000.0]})
    Image.fromarray(np.full((16, 16), 500, np.uint16)).save(tmp_path / "wide.png")
    seen = []
    monkeypatch.setattr(show.snapshots, "attention", lambda found, imgs, *rest: seen.append(imgs))
    monkeypatch.setattr(show.analysis_figures, "attention", lambda *words: None)
    words = [tmp_path / "wide.png", "--init", path, "--attention", "--out", tmp_path / "a.png"]
    assert call(show.main, words).code == 0 and seen[0].unique().tolist() == [128]
    done = call(show.main, [*words, "--value_range", "0,2000"])
    assert done.code == 0 and seen[1].unique().tolist() == [64], done.err


def test_networks_and_queries_without_attention(last, call, folder, tmp_path):
    image = folder / "val" / "ant" / "0.png"

    def fails(*words):
        done = call(show.main, [image, "--attention", "--out", tmp_path / "a.png", *words])
        assert not list(tmp_path.iterdir())
        return done

    one_line(fails("--init", "torchvision:resnet18", "--img_size", 64), "torchvision:resnet18", "no attention")
    one_line(fails("--init", last["mae"], "--queries", "16,0"), "--queries", "16x16")
    one_line(fails("--init", last["mae"], "--layer", 9), "--layer 9", "4 attention layers")
    one_line(fails("--init", last["mae"], "--img_size", 32), "--img_size", "images of 16x16")
    one_line(fails("--init", last["mae"], "--mask_ratio", 0.5), "--mask_ratio is nothing that --attention")
    one_line(fails("--init", tmp_path / "nowhere.pt"), "nowhere.pt")


@pytest.mark.parametrize("kind", ["attention", "reconstruction", "confusion"])
def test_a_path_that_the_terminal_cannot_show(kind, last, call, folder, tmp_path, run, monkeypatch):
    """It is escaped, and the picture is there."""
    out = tmp_path / "\u00e4.png"
    words = [folder / "val" / "ant" / "0.png", "--init", last["mae"], *["--attention"] * (kind == "attention")]
    if kind == "confusion":
        words = ["--confusion", run / "result.json"]
    shown = io.BytesIO()
    with io.TextIOWrapper(shown, "ascii", write_through=True) as ascii_alone:
        monkeypatch.setattr(sys, "stdout", ascii_alone)
        done = call(show.main, [*words, "--out", out])
        assert done.code == 0 and out.exists() and rb"\xe4.png" in shown.getvalue(), (done.err, shown.getvalue())


# Classes


def test_the_class_of_each_file_is_drawn_above_it(run, call, tmp_path, folder):
    files = [folder / "val" / "ant" / "0.png", folder / "val" / "cat" / "1.png"]
    done = call(show.main, [*files, "--init", run / "encoder.pt", "--out", tmp_path / "show.png"])
    assert done.code == 0 and done.err == "" and len(list(tmp_path.iterdir())) == 1
    with Image.open(tmp_path / "show.png") as picture:
        assert picture.size[0] > 400


def test_the_class_of_each_file(run, call, tmp_path, folder):
    files = [folder / "val" / "ant" / "0.png", folder / "val" / "cat" / "1.png"]
    before = snapshot(run)
    done = call(show.main, [*files, "--init", run / "encoder.pt", "--device", "cpu"])
    assert done.code == 0 and done.err == "" and snapshot(run) == before and not list(tmp_path.iterdir())
    model = finetune.build_classifier(*finetune.resolve(finetune.Config(
        init=str(run / "encoder.pt"), eval=True)), ["ant", "bee", "cat"]).eval()
    lines = done.out.splitlines()[-2:]
    for line, file in zip(lines, files, strict=True):
        with torch.no_grad():
            share, best = model(transforms.normalize(decode(str(file)))[None])[0].softmax(dim=0).max(dim=0)
        assert line == f"{file}: {('ant', 'bee', 'cat')[best]} {100 * share:.1f} %"
    done = call(show.main, [files[0], "--init", run / "encoder.pt", "--img_size", "24x16"])
    assert done.code == 0 and "positions resized from 4x4 to 6x4" in done.out
    Image.fromarray(np.full((16, 16), 700, np.uint16)).save(tmp_path / "wide.png")
    done = call(show.main, [tmp_path / "wide.png", "--init", run / "encoder.pt"])
    assert done.code == 0 and "--value_range 700,701" in done.out
    done = call(show.main, [tmp_path / "wide.png", "--init", run / "encoder.pt", "--value_range", "-5,1000"])
    assert done.code == 0 and "--value_range" not in done.out
    (tmp_path / "bad.png").write_bytes(b"")
    one_line(call(show.main, [tmp_path / "bad.png", "--init", run / "encoder.pt"]), "bad.png")


def test_what_is_wrong_with_a_classifier_or_for_it(run, call, tmp_path, folder):
    image = folder / "val" / "ant" / "0.png"
    saved = torch.load(run / "encoder.pt")
    saved["classifier"]["tensors"]["head.weight"].fill_(3e38)
    torch.save(saved, tmp_path / "huge.pt")
    one_line(call(show.main, [image, "--init", tmp_path / "huge.pt"]), "0.png", "not finite")
    model = finetune.Classifier(models.build("vit_tiny", (16, 16), 4, 6), 7)
    six = {"arch": model.encoder.arch, "model": model.encoder.state_dict(), "method": "Classifier", "step": 5,
           "classifier": model.export([f"class {i}" for i in range(7)])}
    torch.save(six, tmp_path / "six.pt")
    one_line(call(show.main, [image, "--init", tmp_path / "six.pt"]), "0.png", "--in_chans is 6", ".npy")
    del saved["classifier"]
    torch.save(saved, tmp_path / "bare.pt")
    one_line(call(show.main, [image, "--init", tmp_path / "bare.pt"]), "no classifier")
    one_line(call(show.main, [image, "--init", tmp_path / "nowhere.pt"]), "nowhere.pt")


@pytest.mark.parametrize("words", [[], ["a.png"], ["--init", "b.pt"], ["a.png", "--init", "b.pt", "--confusion", "c"],
                                   ["--init", "b.pt", "--confusion", "c"]], ids=repr)
def test_words_that_do_not_belong_together(call, words):
    one_line(call(show.main, words), "--init", "--confusion")


def test_a_confusion_is_drawn_beside_its_numbers(run, call):
    done = call(show.main, ["--confusion", run / "result.json"])
    assert done.code == 0 and done.err == "", done.err
    assert (run / "pictures" / "confusion.png").stat().st_size > 1000 and "confusion.png" in done.out


@pytest.mark.parametrize("content", ["", "[]", '{"top1": 3}', '{"confusion": [[1]], "per_class": {"a": 1, "b": 2}}',
                                     '{"confusion": 3, "per_class": {"a": 1}}', "[" * 100_000,
                                     '{"confusion": [[NaN]], "per_class": {"a": 1}}',
                                     '{"confusion": [["1"]], "per_class": {"a": 1}}'], ids=lambda v: v[:60])
def test_a_file_without_a_confusion_is_one_line(call, tmp_path, content):
    (tmp_path / "result.json").write_text(content)
    one_line(call(show.main, ["--confusion", tmp_path / "result.json"]), "result.json", "no confusion matrix")
    one_line(call(show.main, ["--confusion", tmp_path / "nowhere.json"]), "nowhere.json")
    assert len(list(tmp_path.iterdir())) == 1


def test_names_of_classes_are_drawn_as_they_are(tmp_path, call):
    """matplotlib would take a$\\foo$ for a formula, and cannot draw what is no text."""
    classes = ["a$\\foo$", "b\udcff", "c\nd", "e$"]
    path = tmp_path / "result.json"
    counts = [[int(i == k) for k in range(4)] for i in range(4)]
    path.write_text(json.dumps({"confusion": counts, "per_class": dict.fromkeys(classes, 100.0)}))
    done = call(show.main, ["--confusion", path])
    assert done.code == 0 and done.err == "" and (tmp_path / "pictures" / "confusion.png").stat().st_size > 1000


def test_many_classes_are_drawn_without_numbers(tmp_path):
    classes = [f"class {i}" for i in range(25)]
    counts = [[int(i == k) for k in range(25)] for i in range(25)]
    path = tmp_path / "result.json"
    path.write_text(json.dumps({"confusion": counts, "per_class": dict.fromkeys(classes, 100.0)}))
    show.draw_confusion(tmp_path / "confusion.png", *show.read_confusion(path))
    assert (tmp_path / "confusion.png").exists()
