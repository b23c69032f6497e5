"""convert.py: what a file holds is said, what other code loads computes the same there, blocks are cut and shuffled."""

import contextlib
import io

import pytest
import torch
import torchvision
from conftest import equal, snapshot
from encoders import VIT, classifier, read_encoder, saved_of, stirred

import finetune
import models
from common import checkpoint, randomness, weights
from tools import convert


def one_line(done, *names):
    """Exit code 2, and one line on stderr that says all the names."""
    assert done.code == 2 and len(done.err.splitlines()) == 1 and done.err.startswith("error: "), (done.out, done.err)
    assert all(str(name) in done.err for name in names), done.err


@pytest.fixture
def mae_file(tmp_path):
    """(path, encoder): a ViT as MAE's code publishes it, decoder and all."""
    encoder = stirred(models.build(*VIT, learn_positions=True))
    extra = {"mask_token": torch.zeros(1, 1, 8), "decoder_pos_embed": torch.zeros(1, 17, 8),
             "decoder_blocks.0.norm1.weight": torch.ones(8), "decoder_blocks.0.norm1.bias": torch.ones(8)}
    torch.save({"model": {**encoder.state_dict(), **extra}}, tmp_path / "mae.pth")
    return tmp_path / "mae.pth", encoder


# To elsewhere


def exported(saved, target, path):
    """The model that the printed lines make."""
    checkpoint.write(path.with_name("encoder.pt"), saved)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        convert.main(["export", str(path.with_name("encoder.pt")), "--to", target, str(path)])
    names = {"torch": torch, "torchvision": torchvision}
    for name in ("timm", "safetensors"):
        if f"{name}." in out.getvalue():
            names[name] = pytest.importorskip(name, reason=f"{name} is not installed (requirements-dev.txt)")
            pytest.importorskip("safetensors.torch", reason="safetensors is not installed (requirements-dev.txt)")
    exec(out.getvalue().split("\n", 1)[1], names)
    return names["model"].eval()


SWIN, WIDE = ("swin_tiny", (64, 64)), ("swin_tiny", (64, 128))
PVT2 = ("pvtv2_tiny", (64, 96))
EXPORTS = [("timm", VIT, {}, "mean", "layer"), ("timm", VIT, {}, "cls", "none"), ("timm", VIT, {}, "cls", "layer"),
           ("timm", VIT, {}, "mean", "none"), ("timm", VIT, {}, "mean", "batch"), ("timm", VIT, {}, "cls", "batch"),
           ("timm", ("vit_tiny", (16, 32), 4, 5), {}, "mean", "layer"),
           ("timm", SWIN, {"window": 4}, "mean", "none"), ("timm", WIDE, {"window": 4}, "mean", "none"),
           ("timm", SWIN, {"window": 2}, "mean", "batch"),
           ("timm", PVT2, {}, "mean", "none"), ("timm", PVT2, {}, "mean", "batch"),
           ("torchvision", VIT, {}, "cls", "none"), ("torchvision", VIT, {}, "cls", "layer"),
           ("torchvision", VIT, {}, "cls", "batch"), ("torchvision", SWIN, {"window": 2}, "mean", "none"),
           ("torchvision", WIDE, {"window": 2}, "mean", "batch")]


@pytest.mark.parametrize("target,sizes,options,pool,norm", EXPORTS, ids=repr)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_an_exported_classifier_computes_the_same_there(tmp_path, target, sizes, options, pool, norm, suffix):
    ours = classifier(models.build(*sizes, **options), pool, norm)
    theirs = exported(saved_of(ours), target, tmp_path / f"out{suffix}")
    imgs = torch.randn(3, ours.encoder.arch["in_chans"], *sizes[1])
    with torch.no_grad():
        expected = ours(imgs)
        assert expected.std() > 0.1
        torch.testing.assert_close(theirs(imgs), expected, rtol=1e-5, atol=1e-5)
    again = read_encoder(tmp_path / f"out{suffix}", sizes[1])
    assert again["arch"] == ours.encoder.arch
    if norm == "none" and again["classifier"]["pool"] == pool:  # and back: names cannot tell every pooling
        cfg = finetune.Config(init=str(tmp_path / f"out{suffix}"), init_size=sizes[1], eval=True)
        back = finetune.build_classifier(*finetune.resolve(cfg), [str(i) for i in range(7)]).eval()
        assert equal(dict(sorted(back.state_dict().items())), dict(sorted(ours.state_dict().items())))


@pytest.mark.parametrize("target,sizes,options", [
    ("timm", VIT, {}), ("timm", SWIN, {"window": 4}), ("timm", PVT2, {}), ("torchvision", VIT, {}),
    ("torchvision", SWIN, {"window": 2})], ids=repr)
def test_an_exported_encoder_computes_the_same_there(tmp_path, target, sizes, options):
    encoder = stirred(models.build(*sizes, **options))
    saved = {"arch": encoder.arch, "model": encoder.state_dict(), "method": "MAE", "step": 1}
    theirs = exported(saved, target, tmp_path / "out.pth")
    imgs = torch.randn(2, 3, *sizes[1])
    with torch.no_grad():
        expected = encoder(imgs)
        if target == "timm":
            found = theirs.forward_features(imgs)
            found = found.flatten(2).transpose(1, 2) if sizes is PVT2 else found
        elif sizes is VIT:
            tokens = theirs._process_input(imgs)
            found = theirs.encoder(torch.cat([theirs.class_token.expand(2, -1, -1), tokens], dim=1))
        else:
            found = theirs.norm(theirs.features(imgs))
        torch.testing.assert_close(found.reshape(expected.shape), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("build", [lambda: models.build(*VIT), lambda: models.build("pvt_tiny", (64, 64)), lambda:
                         models.build("swin_tiny", (64, 64), window=4, bias="continuous"), lambda: models.build(
                         *VIT, positions="shared_bias", layer_scale=0.1)], ids=["vit", "pvt", "um_swin", "simmim_vit"])
def test_to_safetensors_and_back_nothing_is_lost(tmp_path, build):
    saved = saved_of(classifier(build()))
    checkpoint.write(tmp_path / "encoder.pt", saved)
    convert.main(["export", str(tmp_path / "encoder.pt"), "--to", "safetensors", str(tmp_path / "out.safetensors")])
    again = read_encoder(tmp_path / "out.safetensors")
    for part in (saved, again):  # a safetensors file has an order of its own
        part["model"] = dict(sorted(part["model"].items()))
        part["classifier"] = dict(sorted(part["classifier"].items()))
        part["classifier"]["tensors"] = dict(sorted(part["classifier"]["tensors"].items()))
    assert equal({name: again[name] for name in saved}, saved)


REFUSED = {
    "shared bias": ("timm", lambda: models.build(*VIT, positions="shared_bias"), "layer", "no encoder like"),
    "block bias": ("torchvision", lambda: models.build(*VIT, positions="block_bias"), "layer", "no encoder like"),
    "continuous": ("timm", lambda: models.build("swin_tiny", (64, 64), bias="continuous"), "none", "no encoder like"),
    "pvt": ("torchvision", lambda: models.build("pvt_tiny", (64, 64)), "layer", "no encoder like"),
    "norm behind the mean": ("timm", lambda: models.build(*SWIN, window=4), "layer", "--head_norm none"),
    "mean": ("torchvision", lambda: models.build(*VIT), "layer", "--to timm"),
    "oblong": ("torchvision", lambda: models.build("vit_tiny", (16, 32), 8), "cls", "--to timm"),
    "channels": ("torchvision", lambda: models.build("vit_tiny", (16, 16), 8, 1), "cls", "--to timm"),
    "window": ("torchvision", lambda: models.build(*SWIN, window=4), "none", "--to timm"),
    "padding": ("timm", lambda: models.build(*SWIN, window=3), "none", "does not tile"),
    "reduction": ("timm", lambda: models.build("pvtv2_tiny", (64, 48)), "none", "does not tile"),
    "pvt2": ("torchvision", lambda: models.build(*PVT2), "none", "no encoder like"),
    "suffix": ("safetensors", lambda: models.build(*VIT), "layer", ".safetensors"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_target_cannot_express_is_refused(tmp_path, call, case):
    target, build, norm, word = REFUSED[case]
    model = classifier(build(), "cls", "none") if norm == "cls" else classifier(build(), "mean", norm)
    checkpoint.write(tmp_path / "encoder.pt", saved_of(model))
    before = snapshot(tmp_path)
    done = call(convert.main, ["export", tmp_path / "encoder.pt", "--to", target, tmp_path / "out.pth"])
    assert done.code == 2 and len(done.err.splitlines()) == 1 and word in done.err, done.err
    assert snapshot(tmp_path) == before


def test_a_file_that_exists_is_not_written_over(tmp_path, call, mae_file):
    path, _ = mae_file
    before = snapshot(tmp_path)
    done = call(convert.main, ["export", path, "--to", "timm", path])
    assert done.code == 2 and "is there already" in done.err and snapshot(tmp_path) == before


def test_show_says_what_a_file_is(mae_file, call, tmp_path):
    path, encoder = mae_file
    out = call(convert.main, ["show", path]).out
    assert "names are those of MAE's code or timm" in out and "decoder_blocks (2)" in out and "model vit_tiny" in out
    assert all(f"    {name} {tuple(tensor.shape)} float32\n" in out for name, tensor in encoder.state_dict().items())
    checkpoint.write(tmp_path / "encoder.pt", saved_of(classifier(models.build(*VIT))))
    out = call(convert.main, ["show", tmp_path / "encoder.pt"]).out
    assert "classifier: pool mean, norm layer, 7 classes" in out and "head.weight (7, 96)" in out


# What a target has no word for


@pytest.mark.parametrize("target", ["timm", "torchvision"])
def test_layer_scale_is_exported_or_refused(tmp_path, call, target):
    ours = classifier(models.build(*VIT, layer_scale=0.1), "cls", "none")
    if target == "torchvision":
        checkpoint.write(tmp_path / "encoder.pt", saved_of(ours))
        one_line(call(convert.main, ["export", tmp_path / "encoder.pt", "--to", target, tmp_path / "out.pth"]),
                 "no encoder like", "layer_scale")
        return
    theirs, imgs = exported(saved_of(ours), target, tmp_path / "out.pth"), torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(theirs(imgs), ours(imgs), rtol=1e-5, atol=1e-5)
    again = read_encoder(tmp_path / "out.pth")
    assert again["arch"] == ours.encoder.arch and again["model"].keys() == ours.encoder.state_dict().keys()


@pytest.mark.parametrize("name,size", [("resnet18", 64), ("swin_v2_t", 64)])
def test_a_network_of_torchvision_goes_back_to_torchvision(tmp_path, call, name, size):
    torch.manual_seed(0)
    encoder = stirred(models.build(f"torchvision:{name}", (size, size)))
    saved = {"arch": encoder.arch, "model": encoder.state_dict(), "method": "FastMIM", "step": 1}
    theirs, imgs = exported(saved, "torchvision", tmp_path / "out.pth"), torch.randn(2, 3, size, size)
    seen = {}
    layer = {"resnet18": "layer4", "swin_v2_t": "norm"}[name]
    theirs.get_submodule(layer).register_forward_hook(lambda module, ins, out: seen.update(out=out))
    theirs(imgs)
    out = seen["out"] if name == "swin_v2_t" else seen["out"].permute(0, 2, 3, 1)
    torch.testing.assert_close(out.flatten(1, 2), encoder(imgs), rtol=1e-5, atol=1e-5)
    checkpoint.write(tmp_path / "head.pt", saved_of(finetune.Classifier(encoder, 7, "mean", "none")))
    done = call(convert.main, ["export", tmp_path / "head.pt", "--to", "torchvision", tmp_path / "b.pth"])
    one_line(done, "with a head")


def test_the_pooling_of_a_foreign_head_can_be_told(tmp_path, capsys):
    """timm's names do not say what a head without a norm of its own pools."""
    ours = classifier(models.build(*VIT), "mean", "none")
    checkpoint.write(tmp_path / "encoder.pt", saved_of(ours))
    convert.main(["export", str(tmp_path / "encoder.pt"), "--to", "timm", str(tmp_path / "out.pth")])
    imgs = torch.randn(3, 3, 32, 32)
    for pool, same in (("auto", False), ("mean", True), ("cls", False)):
        cfg = finetune.Config(init=str(tmp_path / "out.pth"), eval=True, pool=pool)
        back = finetune.build_classifier(*finetune.resolve(cfg), [str(i) for i in range(7)]).eval()
        assert torch.allclose(back(imgs), ours(imgs), atol=1e-6) == same
    cfg = finetune.Config(init=str(tmp_path / "encoder.pt"), eval=True, pool="cls")
    with pytest.raises(ValueError, match="pools by mean"):
        finetune.build_classifier(*finetune.resolve(cfg), [f"class {i}" for i in range(7)])


def test_an_export_leaves_a_file_beside_it_alone(tmp_path, call):
    """The temporary files of this project have other names."""
    checkpoint.write(tmp_path / "encoder.pt", saved_of(classifier(models.build(*VIT))))
    (tmp_path / "out.pth.tmp").write_text("mine")
    before = snapshot(tmp_path)
    assert call(convert.main, ["export", tmp_path / "encoder.pt", "--to", "timm", tmp_path / "out.pth"]).code == 0
    assert {**before, "out.pth": (tmp_path / "out.pth").read_bytes()} == snapshot(tmp_path)


# Dropped and shuffled layers


def encoder_file(path, *sizes, **options):
    encoder = stirred(models.build(*sizes, **options))
    checkpoint.write(path, {"arch": encoder.arch, "model": encoder.state_dict(), "method": "MAE", "step": 1})
    return path


def test_it_says_what_was_dropped_and_shuffled(tmp_path, call):
    vit = encoder_file(tmp_path / "vit.pt", *VIT)
    done = call(convert.main, ["--drop_layers", 1, vit, tmp_path / "a.pt"])
    assert done.code == 0 and "left over: blocks.3\n" in done.out
    done = call(convert.main, ["edit", vit, tmp_path / "b.pt", "--drop_layers", 2, "--shuffle_layers", "--seed", 1])
    assert "left over: blocks." in done.out and "blocks.0 to 1 are those that were " in done.out
    swin = encoder_file(tmp_path / "swin.pt", "swin_tiny", (64, 64), window=4)
    done = call(convert.main, [swin, tmp_path / "c.pt", "--drop_layers", 1])
    assert "left over: layers.2.blocks.1\n" in done.out
    assert "left over: the fourth stage; its norm starts anew" in done.out
    done = call(convert.main, ["show", tmp_path / "b.pt"])
    assert done.code == 0 and "'drop_layers': 2" in done.out and "blocks.2." not in done.out


@pytest.mark.parametrize("sizes,options,prefix", [
    (VIT, {}, "blocks."), (VIT, {"positions": "shared_bias", "layer_scale": 0.1}, "blocks."),
    (("swin_tiny", (64, 64)), {"window": 4}, "layers.2.blocks."), (("pvt_tiny", (64, 64)), {}, "layers.2.blocks."),
    (("pvtv2_tiny", (64, 64)), {}, "stages.2.blocks.")], ids=str)
@pytest.mark.parametrize("shuffled", [False, True], ids=["in order", "shuffled"])
def test_an_edited_file_is_whole_and_every_block_is_one_of_the_file(tmp_path, sizes, options, prefix, shuffled):
    saved = read_encoder(encoder_file(tmp_path / "a.pt", *sizes, **options))
    edited, _ = convert.edit(saved, 1, seed=3 if shuffled else None)
    checkpoint.write(tmp_path / "b.pt", edited)
    assert equal(read_encoder(tmp_path / "b.pt"), edited)
    encoder = models.from_arch(edited["arch"])
    weights.load_encoder(encoder, edited, "b.pt")
    assert encoder(torch.randn(2, 3, *sizes[1])).isfinite().all()
    total = convert.number_of_blocks(saved["model"], prefix)
    order = list(range(total - 1))
    if shuffled:
        draw = torch.Generator().manual_seed(randomness.seed_of(3, "shuffled layers"))
        order = torch.randperm(total, generator=draw)[: total - 1].tolist()
    for name, tensor in edited["model"].items():
        if name.startswith(prefix):
            block, rest = name.removeprefix(prefix).split(".", 1)
            assert torch.equal(tensor, saved["model"][f"{prefix}{order[int(block)]}.{rest}"])
        elif not name.startswith("norm.") or prefix == "blocks.":
            assert torch.equal(tensor, saved["model"][name])
    again, _ = convert.edit(saved, seed=5)  # shuffled, and none dropped: the arch is the same
    assert again["arch"] == saved["arch"] and again["model"].keys() == saved["model"].keys()


def test_a_head_goes_with_the_blocks_that_it_sat_on(tmp_path, call):
    saved = saved_of(classifier(models.build(*VIT)))
    cut, notes = convert.edit(saved, 1)
    assert "classifier" not in cut and any("left over: the head" in note for note in notes)
    assert weights.lost_its_norm(cut) and equal(convert.edit(saved, seed=0)[0]["classifier"], saved["classifier"])
    checkpoint.write(tmp_path / "cut.pt", cut)
    done = call(convert.main, ["export", tmp_path / "cut.pt", "--to", "safetensors", tmp_path / "out.safetensors"])
    one_line(done, "last norm")
    _, model = finetune.resolve(finetune.Config(init=str(tmp_path / "cut.pt")))
    assert finetune.build_classifier(finetune.Config(model="vit_tiny", patch_size=8, in_chans=3, img_size=(32, 32),
                                                     mode="knn"), model, list("ab")).head_norm == "layer"


@pytest.mark.parametrize("words,said", [
    (["--drop_layers", 4], ["--drop_layers 4", "4 blocks"]), (["--drop_layers", -1], ["--drop_layers"]),
    ([], ["--shuffle"]), (["--drop_layers", 1, "--init_size", 32], ["--init_size"])], ids=str)
def test_blocks_that_are_not_there(tmp_path, call, words, said):
    path = encoder_file(tmp_path / "vit.pt", *VIT)
    before = snapshot(tmp_path)
    one_line(call(convert.main, [path, tmp_path / "out.pt", *words]), *said)
    assert snapshot(tmp_path) == before
    one_line(call(convert.main, ["--drop_layers", 1, path, path]), "is there already")
    assert snapshot(tmp_path) == before


def test_networks_of_torchvision_have_no_blocks_to_drop(tmp_path, call):
    path = encoder_file(tmp_path / "net.pt", "torchvision:resnet18", (64, 64))
    one_line(call(convert.main, ["--drop_layers", 1, path, tmp_path / "out.pt"]), "--drop_layers", "resnet18")
    done = call(convert.main, [])
    assert done.code == 2 and done.err.count("\n") <= 2
