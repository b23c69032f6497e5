"""finetune.py: which layers learn how fast, how images are mixed, how accuracy is counted, which encoders are taken."""

import functools
import json
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import equal, flags, log_of, snapshot
from encoders import classifier, read_encoder
from PIL import Image

import data
import finetune
import mae
import models
from common import checkpoint, engine, layers, neighbours, optim, randomness, transforms
from common.images import class_folders, decode


def config(**options):
    return finetune.Config(**{"model": "vit_tiny", "patch_size": 8, "in_chans": 3, "img_size": (32, 32), **options})


@pytest.fixture(scope="module")
def pretrained(tiny, tmp_path_factory):
    """The folder of a short run of mae.py."""
    out = tmp_path_factory.mktemp("runs") / "mae"
    mae.main([str(w) for w in tiny(max_steps=2, out=out)])
    return out


# Layers


@pytest.mark.parametrize("pool,head_norm,on_top", [("mean", "layer", {"head", "fc_norm"}), ("cls", "none", {"head"})])
def test_layer_decay(pool, head_norm, on_top):
    model = finetune.build_classifier(config(pool=pool, head_norm=head_norm), None, list("abc"))
    scale = optim.layer_decay(model, 0.5)
    depths = {name: -math.log2(scale(name)) for name, _ in model.named_parameters()}
    assert {name.split(".")[0] for name, depth in depths.items() if depth == 0 and "encoder" not in name} == on_top
    assert all(depths[f"encoder.{name}"] == 5 for name in ("cls_token", "pos_embed", "patch_embed.proj.weight"))
    assert [depths[f"encoder.blocks.{i}.mlp.fc1.weight"] for i in range(4)] == [4, 3, 2, 1]
    if head_norm == "none":
        assert depths["encoder.norm.weight"] == 0  # the encoder's last norm learns as fast as the head


def test_learning_rates_reach_the_optimizer(tuned, call, tmp_path):
    out = tmp_path / "run"
    assert call(finetune.main, tuned(max_steps=3, layer_decay=0.5, out=out)).code == 0
    saved = torch.load(out / "last.pt")["optimizer"]["param_groups"]
    peak = 0.03 * 8 / 256
    lr = peak * 2 / 4  # of 4 steps of warm-up
    for group in saved:
        assert group["lr"] == pytest.approx(lr * group["lr_scale"])
    assert {round(group["lr_scale"], 6) for group in saved} == {0.5**k for k in range(6)}


@pytest.mark.parametrize("mode,pool,head_norm,kind", [
    ("finetune", "mean", "auto", nn.LayerNorm), ("finetune", "cls", "auto", nn.Identity),
    ("linear", "mean", "auto", nn.BatchNorm1d), ("finetune", "mean", "batch", nn.BatchNorm1d)])
def test_which_norm_stands_before_the_head(mode, pool, head_norm, kind):
    model = finetune.build_classifier(config(mode=mode, pool=pool, head_norm=head_norm), None, list("abc"))
    assert type(model.fc_norm) is kind
    assert isinstance(model.encoder.norm, nn.Identity if kind is nn.LayerNorm else nn.LayerNorm)
    if kind is nn.BatchNorm1d:
        assert not list(model.fc_norm.parameters())  # without affine
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert (trained == {"head.weight", "head.bias"}) == (mode == "linear")


@pytest.mark.parametrize("options", [{}, {"pool": "cls"}, {"head_norm": "batch"}, {"mode": "linear"},
                                     {"pool": "mean", "head_norm": "none"}], ids=repr)
def test_every_trainable_parameter_gets_a_gradient(options):
    model = finetune.build_classifier(config(**options), None, list("abc")).train()
    nn.init.normal_(model.head.weight)  # it starts so close to zero that gradients below it all but vanish
    logits = model(torch.randn(4, 3, 32, 32), torch.rand(4, model.num_noise))
    F.cross_entropy(logits, torch.tensor([0, 1, 2, 0])).backward()
    for name, p in model.named_parameters():
        assert not p.requires_grad or (p.grad is not None and p.grad.isfinite().all()), name
        assert not p.requires_grad or p.grad.abs().sum() > 0 or (options.get("pool") is None and "cls" in name), name


def test_drop_path_belongs_to_a_sample():
    """Rates grow from 0; a sample's fate follows its own noise; without noise (evaluation) nothing is dropped."""
    model = finetune.build_classifier(config(drop_path=0.6), None, list("abc")).train()
    assert [block.drop_path_rate for block in model.encoder.blocks] == pytest.approx([0, 0.2, 0.4, 0.6])
    imgs, noise = torch.randn(4, 3, 32, 32), torch.rand(4, 8)
    features = functools.partial(neighbours.pooled, model.encoder, pool="mean")
    together = features(imgs, noise=noise)
    apart = torch.cat([features(imgs[i : i + 1], noise=noise[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together, features(imgs))
    training = features(imgs)
    model.eval()
    torch.testing.assert_close(training, features(imgs))
    kept = layers.drop_path(torch.ones(1000, 2, 3), torch.rand(1000), 0.25)
    assert kept.unique().tolist() == pytest.approx([0, 4 / 3])  # expectation is kept
    assert kept.mean().item() == pytest.approx(1, abs=0.06)
    assert kept.flatten(1).std(dim=1).max() == 0  # a sample is dropped as a whole


# Mixing


def mixed(B=8, seed=3, **options):
    """Image i is i everywhere, so that pixels tell who was mixed with whom and by how much."""
    cfg = config(**{"mixup": 0.8, "cutmix": 0.0, **options})
    imgs = torch.arange(float(B)).view(B, 1, 1, 1).expand(B, 3, 16, 16)
    return finetune.mix(imgs, F.one_hot(torch.arange(B), B).float(), cfg, seed)


def test_mixup_mixes_pairs_with_one_share():
    imgs, targets = mixed()
    share = targets[0, 0].item()
    assert 0 < share < 1
    for i in range(8):
        partner = i ^ 1
        assert targets[i].nonzero().flatten().tolist() == sorted((i, partner))
        assert targets[i, i].item() == pytest.approx(share)
        torch.testing.assert_close(imgs[i], torch.full((3, 16, 16), share * i + (1 - share) * partner))
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(8))


def test_cutmix_pastes_a_box_of_the_stated_area():
    shares = set()
    for seed in range(20):
        imgs, targets = mixed(mixup=0.0, cutmix=1.0, seed=seed)
        for i in range(8):
            assert set(imgs[i].unique().tolist()) <= {float(i), float(i ^ 1)}
            own = (imgs[i] == i).float().mean().item()
            assert targets[i, i].item() == pytest.approx(own, abs=1e-5)  # the share is that of the pixels left
            other = (imgs[i, 0] != i).nonzero()
            if len(other):  # one rectangle, the same in all channels and images
                top, left = other.amin(dim=0)
                bottom, right = other.amax(dim=0)
                assert (bottom - top + 1) * (right - left + 1) == len(other)
                assert torch.equal(imgs[i, 0] != i, imgs[0, 0] != 0)
        torch.testing.assert_close(targets.sum(dim=1), torch.ones(8))
        shares.add(round(targets[0, 0].item(), 3))
    assert len(shares) > 10


def test_without_alphas_nothing_is_mixed():
    imgs, targets = mixed(mixup=0.0, cutmix=0.0)
    assert torch.equal(targets, torch.eye(8)) and imgs[3, 0, 0, 0] == 3


def test_both_kinds_occur_when_both_are_asked_for():
    kinds = {len(mixed(mixup=0.8, cutmix=1.0, seed=seed)[0][0].unique()) for seed in range(40)}
    assert {1, 2} <= kinds  # mixup leaves one value, cutmix two


@pytest.mark.parametrize("options", [{}, {"mixup": 0.0, "cutmix": 1.0}, {"cutmix": 1.0}], ids=repr)
@pytest.mark.parametrize("cut", [2, 4])
def test_mixing_does_not_depend_on_how_a_batch_is_cut(options, cut):
    cfg = config(**{"mixup": 0.8, "cutmix": 0.0, **options})
    imgs, targets = torch.randn(8, 3, 16, 16), F.one_hot(torch.randint(0, 5, (8,)), 5).float()
    for seed in range(5):
        whole = finetune.mix(imgs, targets, cfg, seed)
        parts = [finetune.mix(i, t, cfg, seed) for i, t in zip(imgs.split(cut), targets.split(cut), strict=True)]
        assert torch.equal(torch.cat([p[0] for p in parts]), whole[0])
        assert torch.equal(torch.cat([p[1] for p in parts]), whole[1])


def test_mixing_leaves_its_inputs_and_the_random_numbers_alone():
    imgs, targets = torch.randn(4, 3, 8, 8), torch.eye(4)
    before, state = imgs.clone(), torch.get_rng_state()
    finetune.mix(imgs, targets, config(mixup=0.0, cutmix=1.0), 0)
    assert torch.equal(imgs, before) and torch.equal(targets, torch.eye(4))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("micro", [2, 4])
def test_processes_mix_the_same_pairs(world, micro):
    """What GlobalBatches gives to the processes, mixed there, is the mixture of one process with the whole batch."""
    cfg, pictures = config(mixup=0.8, cutmix=1.0), torch.randn(48, 3, 8, 8)
    if 16 // world < micro:
        pytest.skip("a process holds fewer than a micro-batch")

    def run(world, micro):
        result = {}
        for rank in range(world):
            sampler = data.GlobalBatches(48, 16, micro, 0, rank, world)
            step, held = 0, 0
            for part in sampler.batches(0, 3):
                indices = [index for _, index, _ in part]
                seed = randomness.seed_of(0, "mix", step)
                imgs, targets = finetune.mix(pictures[indices], torch.eye(48)[indices], cfg, seed)
                for (_, _, position), img, target in zip(part, imgs, targets, strict=True):
                    result[step, position] = img, target
                held += 1
                step, held = (step + 1, 0) if held == sampler.num_micro_batches(step) else (step, held)
        return result

    whole, shared = run(1, 16), run(world, micro)
    assert len(whole) == 48 and whole.keys() == shared.keys()
    for place in whole:
        assert torch.equal(whole[place][0], shared[place][0]) and torch.equal(whole[place][1], shared[place][1]), place


@pytest.mark.parametrize("labels", [36, 35])
def test_a_short_last_batch_is_mixed_or_refused(tuned, call, tmp_path, labels):
    """36 images leave 4 of a batch of 8; 35 leave 3, an odd number: an answer in one line, or a run."""
    done = call(finetune.main, tuned(labels=labels, drop_last="false", epochs=1, out=tmp_path / "run"))
    assert done.code in (0, 2)
    assert len(done.err.splitlines()) == (1 if done.code else 0), done.err


# The head


def test_the_probe_is_the_minimum_of_its_objective():
    """Logistic regression on features that are linearly separable: the gradient vanishes, accuracy is full."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (300,), generator=draw)
    features = torch.randn(3, 96, generator=draw)[labels] * 3 + torch.randn(300, 96, generator=draw) * 0.5 + 7
    model = finetune.build_classifier(config(head_start="probe"), None, list("abc"))
    finetune.start_head(model, features, labels, 1e-2)
    assert isinstance(model.fc_norm, nn.BatchNorm1d)
    inputs = model.fc_norm.eval()(features)
    torch.testing.assert_close(inputs.mean(dim=0), torch.zeros(96), rtol=0, atol=1e-4)
    torch.testing.assert_close(inputs.std(dim=0, unbiased=False), torch.ones(96), rtol=1e-3, atol=1e-3)
    logits = model.head(inputs)
    assert (logits.argmax(dim=1) == labels).all() and model.head.weight.grad is None
    (F.cross_entropy(logits, labels) + 1e-2 * model.head.weight.square().sum()).backward()
    assert model.head.weight.grad.norm() < 1e-3 and model.head.bias.grad.norm() < 1e-3


def test_cross_validation_chooses_the_l2_of_the_probe(capsys):
    """By images that did not teach the head; folds are every fifth image. Of equally good ones, the smallest."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(100) // 50
    signal = F.one_hot(labels, 96).float()
    head, chosen = nn.Linear(96, 2), []
    for noise in (0.5, 0.01):
        inputs = signal + noise * torch.randn(100, 96, generator=draw)
        chosen.append(finetune.choose_l2(head, inputs, labels))
        right = {}
        for l2 in (1e-5, 1e-4, 1e-3, 1e-2, 1e-1):  # by hand: leave out image 0, 5, 10, ..., then 1, 6, 11, ...
            right[l2] = 0
            for first in range(5):
                rest = [i for i in range(100) if i % 5 != first]
                trial = nn.Linear(96, 2)
                finetune.fit_head(trial, inputs[rest], labels[rest], l2)
                right[l2] += (trial(inputs[first::5]).argmax(dim=1) == labels[first::5]).sum().item()
        assert right[chosen[-1]] == max(right.values())
    assert chosen[0] > chosen[1] == 1e-5
    model = finetune.build_classifier(config(head_start="probe"), None, list("ab"))
    finetune.start_head(model, inputs, labels, 0)
    assert "by cross-validation" in capsys.readouterr().out


@pytest.mark.parametrize("n,K", [(100, 10), (60, 5), (97, 10), (7, 7)])
def test_every_fold_has_its_part_of_every_class(n, K):
    """The embedded data comes in a cycle: every fifth image would hold out whole classes."""
    labels = torch.arange(n) % K
    fold = finetune.folds(labels)
    sizes = torch.bincount(fold, minlength=5)
    counts = torch.stack([torch.bincount(fold[labels == k], minlength=5) for k in range(K)])
    assert sizes.max() - sizes.min() <= 1
    assert ((counts.amax(dim=1) - counts.amin(dim=1)) <= 1).all()


def test_folds_of_labels_in_any_other_order_are_every_fifth_image():
    """Such as those of the results with 500 labels, and of class folders."""
    chosen = [torch.as_tensor(data.balanced(np.arange(20_000) % 10, 500, seed)) % 10 for seed in range(10)]
    for labels in (*chosen, torch.arange(100) // 25):
        assert torch.equal(finetune.folds(labels), torch.arange(len(labels)) % 5)


def test_a_probed_run_starts_where_the_probe_ends(tuned, pretrained, call, tmp_path):
    words = dict(init=pretrained / "encoder.pt", head_start="probe", mixup=0, cutmix=0, rand_augment="false",
                 random_erasing=0, crop_scale="1,1", flip=0, drop_path=0, smoothing=0, max_steps=1, batch_size=36,
                 micro_batch=36)  # all images at once: BatchNorm sees in training what the probe saw
    losses = {}
    for start in ("random", "probe"):
        run = tuned(**{**words, "head_start": start, "head_norm": "batch"}, out=tmp_path / start)
        assert call(finetune.main, run).code == 0
        losses[start] = log_of(tmp_path / start)[0]["loss"]
    assert losses["probe"] < 0.8 * losses["random"]


# Evaluation


@pytest.mark.parametrize("changes", [{}, {"pool": "cls"}, {"mode": "linear"}, {"head_start": "probe"}], ids=repr)
def test_eval_reproduces_the_number_of_the_run(tuned, pretrained, call, tmp_path, changes):
    run, check = tmp_path / "run", tmp_path / "check"
    words = dict(init=pretrained / "encoder.pt", model=None, patch_size=None)
    done = call(finetune.main, tuned(**words, **changes, base_lr=0.2, epochs=5, out=run))
    assert done.code == 0 and done.err == ""
    before = snapshot(run)
    for micro, name in ((4, "check"), (8, "again")):
        done = call(finetune.main, tuned(eval="true", init=run / "encoder.pt", model=None, patch_size=None,
                                         micro_batch=micro, out=tmp_path / name))
        assert done.code == 0, done.err
        there, here = (json.loads((path / "result.json").read_text()) for path in (run, tmp_path / name))
        assert {k: v for k, v in there.items() if k != "step"} == {k: v for k, v in here.items() if k != "init"}
    assert f"top-1 {here['top1']:.2f} %" in done.out and check.exists() and snapshot(run) == before


def test_eval_takes_the_image_size_from_the_classifier(tuned, call, tmp_path):
    """Without --img_size the number is that of the run, and not that of resized images and positions."""
    run, check = tmp_path / "run", tmp_path / "check"
    assert call(finetune.main, tuned(base_lr=0.2, out=run)).code == 0
    done = call(finetune.main, tuned(eval="true", init=run / "encoder.pt", model=None, patch_size=None, img_size=None,
                                     out=check))
    assert done.code == 0
    one, two = (json.loads((path / "result.json").read_text()) for path in (run, check))
    assert one["confusion"] == two["confusion"] and "resized" not in done.out


def test_eval_with_other_classes_is_refused(tuned, call, tmp_path):
    run = tmp_path / "run"
    assert call(finetune.main, tuned(max_steps=1, out=run)).code == 0
    words = tuned(eval="true", init=run / "encoder.pt", data="shapes", img_size=64, out=tmp_path / "b")
    done = call(finetune.main, words)
    assert done.code == 2 and len(done.err.splitlines()) == 1 and "circle" in done.err
    assert not (tmp_path / "b").exists()


# Encoders


def test_what_pretraining_learned_is_what_finetuning_starts_from(pretrained, capsys):
    saved = read_encoder(pretrained / "encoder.pt")
    last = torch.load(pretrained / "last.pt")["model"]
    for name, tensor in saved["model"].items():
        assert torch.equal(tensor, last[f"encoder.{name}"])
    cfg, saved = finetune.resolve(finetune.Config(init=str(pretrained / "encoder.pt"), img_size=(16, 16)))
    assert (cfg.model, cfg.patch_size, cfg.in_chans) == ("vit_tiny", 4, 3)
    model = finetune.build_classifier(cfg, saved, list("abc"))
    own = {k: v for k, v in model.encoder.state_dict().items()}
    assert all(torch.equal(own[name], saved["model"][name]) for name in own)
    assert isinstance(model.encoder.pos_embed, nn.Parameter)  # learned from here on, as in MAE's released code
    out = capsys.readouterr().out
    assert "loaded" in out and "left over: norm.weight, norm.bias" in out


@pytest.mark.parametrize("name,value,words", [
    ("num_heads", 8, "num_heads 8, not 4"), ("depth", 3, "depth 3, not 4"), ("width", 48, "width 48, not 96")])
def test_an_encoder_of_another_architecture_is_refused(tuned, pretrained, call, tmp_path, name, value, words):
    saved = torch.load(pretrained / "encoder.pt")
    saved["arch"][name] = value
    torch.save(saved, tmp_path / "encoder.pt")
    done = call(finetune.main, tuned(init=tmp_path / "encoder.pt", out=tmp_path / "run"))
    assert done.code == 2 and len(done.err.splitlines()) == 1 and words in done.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("changes", [{"model": "vit_s"}, {"patch_size": 8}], ids=repr)
def test_options_that_contradict_the_encoder_are_refused(tuned, pretrained, call, tmp_path, changes):
    done = call(finetune.main, tuned(**{"init": pretrained / "encoder.pt", "out": tmp_path / "run", **changes}))
    (name, value), = changes.items()
    assert done.code == 2 and len(done.err.splitlines()) == 1
    assert f"--{name} {value}" in done.err and str(pretrained / "encoder.pt") in done.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("changes", [{"mode": "knn"}, {"eval": "true"}], ids=repr)
def test_what_trains_nothing_has_no_plan(tuned, pretrained, call, tmp_path, changes):
    done = call(finetune.main, tuned(init=pretrained / "encoder.pt", plan="true", out=tmp_path / "run", **changes))
    assert done.code == 2 and len(done.err.splitlines()) == 1 and "--plan is of training" in done.err


def test_another_image_size_resizes_the_positions_and_says_so(tuned, pretrained, call, tmp_path):
    words = tuned(init=pretrained / "encoder.pt", img_size="16x24", max_steps=2, out=tmp_path / "run")
    done = call(finetune.main, words)
    assert done.code == 0 and "positions resized from 4x4 to 4x6" in done.out
    assert torch.load(tmp_path / "run" / "encoder.pt")["model"]["pos_embed"].shape == (1, 25, 96)


@pytest.mark.parametrize("C", [1, 4])
def test_channels_flow_from_pretraining_to_finetuning(tiny, tuned, call, tmp_path, C):
    assert call(mae.main, tiny(in_chans=C, max_steps=1, out=tmp_path / "mae")).code == 0
    words = tuned(init=tmp_path / "mae" / "encoder.pt", max_steps=1, out=tmp_path / "run", rand_augment="false")
    assert call(finetune.main, words).code == 0
    assert torch.load(tmp_path / "run" / "encoder.pt")["model"]["patch_embed.proj.weight"].shape == (96, C, 4, 4)


# Training


@pytest.mark.parametrize("changes", [{}, {"clip_grad": 0.1}, {"pool": "cls", "mixup": 0, "drop_last": "false"}],
                         ids=repr)
def test_one_batch_equals_micro_batches(tuned, call, tmp_path, changes):
    """Mixup, cutmix and drop path on: none of them depends on how a batch is cut."""
    runs = []
    for micro in (8, 4, 2):
        words = tuned(micro_batch=micro, drop_path=0.3, max_steps=5, out=tmp_path / str(micro), **changes)
        assert call(finetune.main, words).code == 0
        runs.append(log_of(tmp_path / str(micro)))
    for log in runs[1:]:
        for key in ("loss", "grad_norm"):
            assert [line[key] for line in log] == pytest.approx([line[key] for line in runs[0]], rel=1e-5)


def test_a_classifier_is_scored_over_a_subset_of_its_classes(tuned, call, folder, tmp_path):
    """As ImageNet-A and -R are: folders of some classes, without train/."""
    assert call(finetune.main, tuned(max_steps=12, base_lr=0.3, out=tmp_path / "run")).code == 0
    init = tmp_path / "run" / "encoder.pt"
    for name in ("cat", "ant"):
        shutil.copytree(folder / "val" / name, tmp_path / "some" / "val" / name)
    words = flags(eval=True, init=init, data=tmp_path / "some", out=tmp_path / "eval", device="cpu")
    done = call(finetune.main, words)
    assert done.code == 0 and "scored over the 2 classes of the data, of the 3" in done.out, done.err
    result = json.loads((tmp_path / "eval" / "result.json").read_text())

    cfg, saved = finetune.resolve(finetune.Config(init=str(init), eval=True, data=str(folder)))
    model = finetune.build_classifier(cfg, saved, ["ant", "bee", "cat"]).eval()
    right = 0
    for label, name in enumerate(("ant", "cat")):
        for path in sorted((tmp_path / "some" / "val" / name).iterdir()):
            with torch.no_grad():
                logits = model(transforms.normalize(decode(str(path)))[None])[0, [0, 2]]
            right += int(logits.argmax() == label)
    assert result["top1"] == 100 * right / 10 and result["per_class"].keys() == {"ant", "cat"}

    (tmp_path / "some" / "val" / "cat").rename(tmp_path / "some" / "val" / "dog")
    done = call(finetune.main, words[:-4] + flags(out=tmp_path / "other", device="cpu"))
    assert done.code == 2 and "does not know dog" in done.err and done.err.count("\n") == 1
    done = call(finetune.main, tuned(data=tmp_path / "some", max_steps=1, out=tmp_path / "train"))
    assert done.code == 2 and "train/CLASS/" in done.err


def test_a_published_classifier_needs_names_for_a_subset(tuned, call, folder, tmp_path):
    model = classifier(models.build("vit_tiny", (16, 16), 4, learn_positions=True), K=3)
    tensors = {**model.encoder.state_dict(), **model.export("abc")["tensors"]}
    torch.save(tensors, tmp_path / "published.pth")
    for name in ("cat", "ant"):
        shutil.copytree(folder / "val" / name, tmp_path / "some" / "val" / name)

    def evaluate(out, **more):
        return call(finetune.main, flags(eval=True, init=tmp_path / "published.pth", data=tmp_path / "some",
                                         out=tmp_path / out, device="cpu", **more))

    done = evaluate("one")
    assert done.code == 2 and "--class_names" in done.err and done.err.count("\n") == 1
    (tmp_path / "names.txt").write_text("cat\nbee\nant\n")
    done = evaluate("two", class_names=tmp_path / "names.txt")
    assert done.code == 0 and "scored over the 2 classes" in done.out, done.err
    (tmp_path / "names.txt").write_text("cat\nant\n")
    done = evaluate("three", class_names=tmp_path / "names.txt")
    assert done.code == 2 and "3 different names" in done.err


def test_a_flat_val_is_named_as_that(tuned, call, folder, tmp_path):
    """ImageNet's validation images come without class folders."""
    shutil.copytree(folder / "train", tmp_path / "set" / "train")
    (tmp_path / "set" / "val").mkdir()
    shutil.copy(folder / "val" / "ant" / "0.png", tmp_path / "set" / "val" / "ILSVRC2012_val_00000001.png")
    done = call(finetune.main, tuned(data=tmp_path / "set", max_steps=1, out=tmp_path / "run"))
    assert done.code == 2 and "holds images and no class folders, as ImageNet's val" in done.err, done.err
    with pytest.raises(ValueError, match="no class folders, as ImageNet's val"):  # with --eval, train/ does not count
        class_folders(tmp_path / "set", "val", alone=True)


def test_mean_and_std_reach_the_network_and_travel(tiny, tuned, call, folder, tmp_path):
    """From pre-training to fine-tuning to evaluation, without being said again."""
    given = {"mean": "0.5", "std": "0.5,0.4,0.3", "value_range": "0,4095"}
    assert call(mae.main, tiny(max_steps=1, out=tmp_path / "mae", **given)).code == 0
    saved = torch.load(tmp_path / "mae" / "encoder.pt")
    assert saved["mean"] == [0.5] * 3 and saved["std"] == [0.5, 0.4, 0.3] and saved["value_range"] == [0, 4095]
    init = tmp_path / "mae" / "encoder.pt"
    words = tuned(max_steps=1, init=init, model=None, patch_size=None, out=tmp_path / "run")
    assert call(finetune.main, words).code == 0
    assert equal({k: saved[k] for k in ("mean", "std", "value_range")},
                 {k: torch.load(tmp_path / "run" / "encoder.pt")[k] for k in ("mean", "std", "value_range")})
    cfg, _ = finetune.resolve(finetune.Config(init=str(init), data=str(folder)))
    assert (cfg.mean, cfg.std, cfg.value_range) == ((0.5, 0.5, 0.5), (0.5, 0.4, 0.3), (0, 4095))
    assert call(mae.main, tiny(max_steps=1, out=tmp_path / "usual")).code == 0  # and older runs can be resumed
    cfg, _ = finetune.resolve(finetune.Config(init=str(tmp_path / "usual" / "encoder.pt"), data=str(folder)))
    assert (cfg.mean, cfg.std, cfg.value_range) == ((), (), ())
    done = call(finetune.main, tuned(max_steps=1, init=init, model=None, patch_size=None, mean="0.1", std="0.2",
                                     out=tmp_path / "other"))
    assert done.code == 0 and "normalised by mean 0.1,0.1,0.1, std 0.2,0.2,0.2 as asked" in done.out
    assert call(mae.main, tiny(max_steps=2, out=tmp_path / "mae", resume=True)).code == 2  # other statistics


def wide_images(root, top):
    """Class folders of 16-bit images, 16 px, whose numbers go from 0 to `top`."""
    for i in range(12):
        path = root / ("train", "val")[i % 2] / ("ant", "bee")[i // 2 % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.linspace(0, top, 256).reshape(16, 16).astype(np.uint16)).save(path)
    return root


def test_a_range_that_was_found_travels(tiny, tuned, call, tmp_path):
    """Other images, from which another range would be found, are seen with the range of the training."""
    words = {"data": wide_images(tmp_path / "bright", 4000), "in_chans": 1, "batch_size": 4, "epochs": 2}
    done = call(mae.main, tiny(max_steps=1, out=tmp_path / "mae", **words))
    assert done.code == 0 and "black is 0 and white 4000" in done.out, done.err
    encoder, last = (torch.load(tmp_path / "mae" / name) for name in ("encoder.pt", "last.pt"))
    assert encoder["value_range"] == last["config"]["value_range"] == [0, 4000]

    last["config"]["value_range"] = []  # as earlier versions saved it
    for saved in (last, None):
        if saved:
            checkpoint.write(tmp_path / "mae" / "last.pt", saved)
        assert call(mae.main, tiny(max_steps=2, resume=True, out=tmp_path / "mae", **words)).code == 0
    done = call(mae.main, tiny(value_range="0,4095", resume=True, out=tmp_path / "mae", **words))
    assert done.code == 2 and "--value_range was [0.0, 4000.0]" in done.err

    dark = tuned(data=wide_images(tmp_path / "dark", 400), init=tmp_path / "mae" / "encoder.pt", model=None, epochs=1,
                 patch_size=None, in_chans=None, batch_size=4, out=tmp_path / "tuned")
    done = call(finetune.main, dark)
    assert done.code == 0 and "black is" not in done.out and "--value_range 0,4000" in done.out, done.err
    assert torch.load(tmp_path / "tuned" / "encoder.pt")["value_range"] == [0, 4000]


@pytest.mark.parametrize("script,words", [(mae, tiny_words) for tiny_words in (
    {"mean": "0.5,0.5"}, {"std": "0"}, {"std": "1,2,-3"}, {"value_range": "5"}, {"value_range": "9,3"}, {"mean": "a"},
    {"value_range": "0,1,2"})])
def test_statistics_that_are_none(script, words, tiny, call, tmp_path):
    done = call(script.main, tiny(max_steps=1, out=tmp_path / "run", **words))
    assert done.code == 2 and done.err.count("\n") == 1 and f"--{next(iter(words))}" in done.err
    assert not (tmp_path / "run").exists()


def test_linear_probing_leaves_the_encoder_alone(tuned, pretrained, call, tmp_path):
    words = tuned(init=pretrained / "encoder.pt", mode="linear", base_lr=3, max_steps=6, out=tmp_path / "run")
    assert call(finetune.main, words).code == 0
    before, after = (torch.load(path / "encoder.pt") for path in (pretrained, tmp_path / "run"))
    assert equal(dict(before["model"]), dict(after["model"]))
    assert after["classifier"]["tensors"]["head.weight"].abs().max() > 0.01


def test_the_frozen_encoder_of_a_probe_drops_nothing(tuned, pretrained, call, tmp_path, monkeypatch):
    """Stochastic depth is for encoders that learn; MAE's linear probing has none, whatever --drop_path is left at."""
    dropped, real = [], layers.drop_path
    def watched(branch, noise, rate):
        out = real(branch, noise, rate)
        dropped.append(not torch.equal(out, branch))
        return out

    monkeypatch.setattr(layers, "drop_path", watched)
    words = tuned(init=pretrained / "encoder.pt", mode="linear", drop_path=0.5, max_steps=2, out=tmp_path / "run")
    assert call(finetune.main, words).code == 0
    assert dropped and not any(dropped)


def test_lars_by_hand():
    """One matrix, two steps with weight decay; and a bias, which takes plain steps."""
    weight, bias = nn.Parameter(torch.tensor([[3.0, 4.0]])), nn.Parameter(torch.tensor([2.0]))
    optimizer = optim.LARS([weight, bias], lr=0.5, weight_decay=0.1, momentum=0.9, trust=0.01)
    momentum, plain = torch.zeros(1, 2), 0.0
    for _ in range(2):
        w, b = weight.detach().clone(), bias.detach().clone()
        weight.grad, bias.grad = torch.tensor([[1.0, 2.0]]), torch.tensor([3.0])
        update = weight.grad + 0.1 * w
        momentum = 0.01 * w.norm() / update.norm() * update + 0.9 * momentum
        plain = 3.0 + 0.9 * plain
        optimizer.step()
        torch.testing.assert_close(weight.data, w - 0.5 * momentum)
        torch.testing.assert_close(bias.data, b - 0.5 * plain)
    zero = nn.Parameter(torch.zeros(2, 2))  # a head at zero has no norm to be proportional to, and must still leave it
    optimizer = optim.LARS([zero], lr=0.5)
    zero.grad = torch.ones(2, 2)
    optimizer.step()
    torch.testing.assert_close(zero.data, torch.full((2, 2), -0.5))


def test_only_the_first_process_claims_the_folder_of_an_evaluation(tuned, call, tmp_path, monkeypatch):
    """The others may come a moment later, when its config.yaml is there already."""
    run = tmp_path / "run"
    assert call(finetune.main, tuned(max_steps=1, out=run)).code == 0
    begin = engine.Run
    def second(cfg):
        process = begin(cfg)
        process.is_main = False
        return process

    words = tuned(eval="true", init=run / "encoder.pt", model=None, patch_size=None, out=tmp_path / "check")
    assert call(finetune.main, words).code == 0
    monkeypatch.setattr(engine, "Run", second)
    assert call(finetune.main, words).code == 0
