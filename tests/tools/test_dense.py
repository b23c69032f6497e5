"""dense.py, dense_data.py, dense_tasks.py: maps, labels that move with images, losses, scores, and what is refused."""

import json
import math
import os
import re
import shutil
import signal
import types

import numpy as np
import pytest
import torch
from conftest import equal, flags, log_of, paint
from PIL import Image

import data
import finetune
import mae
import models
from common import engine, images, optim
from common.shapes import shapes_batch
from tools import dense, dense_data, dense_tasks
from tools.trials import finish, start, torchrun

NAMES = ["sky", "sea", "land"]
OF_FOLDERS = ["segment", "depth"]


def scene(folder, split, i, size=(16, 16)):
    """Image i of a folder, and its labels for both tasks: the sky is above the horizon, and the land to the right."""
    paint(folder / split / "images" / f"{i}.png", seed=i + 100 * (split == "val"), size=size)
    classes, depth = np.ones(size, np.uint8), np.full(size, 2000 + 100 * i, np.uint16)
    classes[: 4 + i % 4], classes[:, 12:], classes[0, 0] = 0, 2, dense_tasks.UNKNOWN
    depth[: 4 + i % 4], depth[:, 12:] = 0, 1000
    return classes, depth


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{task: folder} of 12 images for training and 5 for validation."""
    roots = {task: tmp_path_factory.mktemp(task) for task in OF_FOLDERS}
    for task, root in roots.items():
        for split, count in (("train", 12), ("val", 5)):
            (root / split / "labels").mkdir(parents=True)
            for i in range(count):
                classes, depth = scene(root, split, i)
                Image.fromarray(classes if task == "segment" else depth).save(root / split / "labels" / f"{i}.png")
    (roots["segment"] / "classes.txt").write_text("\n".join(NAMES) + "\n")
    return roots


@pytest.fixture(scope="module")
def words_of(folders):
    """`words_of(task, **changes)`: words for dense.py, a run of 9 steps of 4 images in two micro-batches."""
    def words(task="segment", **changes):
        return flags(**{
            "task": task, "data": folders.get(task, "shapes"), "model": "vit_tiny", "patch_size": 4, "img_size": 16,
            "batch_size": 4, "micro_batch": 2, "epochs": 3, "warmup_epochs": 1, "base_lr": 0.003, "head_width": 16,
            "drop_path": 0.3, "shift": 2, "clip_grad": 1, "log_every": 1, "device": "cpu", **changes})
    return words


def config(**options):
    return dense.Config(**{"model": "vit_tiny", "patch_size": 8, "in_chans": 3, "img_size": (32, 32), "head_width": 16,
                           **options})


# Maps and head


@pytest.mark.parametrize("model,size,count", [("vit_tiny", (24, 40), 1), ("swin_tiny", (40, 72), 4),
                                              ("pvt_tiny", (40, 72), 4), ("pvtv2_tiny", (40, 72), 4)])
def test_maps_are_the_latent_with_rows_and_columns(model, size, count):
    encoder = models.build(model, size, in_chans=2, patch_size=8 if model == "vit_tiny" else 0).eval()
    imgs = torch.randn(2, 2, *size)
    maps, latent = encoder.maps(imgs), encoder(imgs)[:, encoder.num_prefix :]
    assert len(maps) == count
    for stage, features in enumerate(reversed(maps)):  # from the coarsest
        stride = encoder.out_stride / 2**stage
        assert features.shape[2:] == tuple(-int(-n // stride) for n in size)
    assert torch.equal(maps[-1].flatten(2).transpose(1, 2), latent)
    assert torch.equal(maps[-1][:, :, 0, 1], latent[:, 1])


@pytest.mark.parametrize("model,patch,size,in_chans,doublings", [
    ("vit_tiny", 16, (32, 64), 1, 2), ("vit_tiny", 2, (16, 16), 3, 0), ("swin_tiny", 0, (40, 72), 4, 0),
    ("pvt_tiny", 0, (32, 32), 3, 0), ("pvtv2_tiny", 0, (32, 40), 3, 0)])
@pytest.mark.parametrize("task", dense_tasks.TASKS)
def test_a_prediction_has_the_size_of_the_image(model, patch, size, in_chans, doublings, task):
    cfg = config(model=model, patch_size=patch, img_size=size, in_chans=in_chans, task=task)
    net = dense.build_dense(cfg, None, NAMES)
    assert sum(isinstance(layer, torch.nn.ConvTranspose2d) for layer in net.head) == doublings
    imgs, noise = torch.randn(2, in_chans, *size), torch.full((2, net.num_noise), 0.99)  # nothing is dropped
    output = net(imgs, noise)
    assert output.shape == (2, {"segment": 3, "depth": 1, "keypoints": 2}[task], *size)
    net.task.loss(output, torch.ones(2, *([2] if task == "keypoints" else []), *size)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


def test_a_horizontal_step_is_found_where_it_is():
    """The head can place an edge: trained on one image of two halves, it gets all but the seam right."""
    torch.manual_seed(0)
    net = dense.build_dense(config(drop_path=0.0), None, NAMES)
    imgs, label = torch.randn(1, 3, 32, 32), torch.ones(1, 32, 32, dtype=torch.int64)
    imgs[:, :, 12:] += 2
    label[:, :12] = 2
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        net.task.loss(net(imgs), label).sum().backward()
        optimizer.step()
    assert (net.task.predict(net(imgs)) == label).float().mean() > 0.95


def test_layer_decay_and_drop_path():
    net = dense.build_dense(config(drop_path=0.6), None, NAMES)
    scale = optim.layer_decay(net, 0.5)
    depths = {name: -math.log2(scale(name)) for name, _ in net.named_parameters()}
    assert {name.split(".")[0] for name, depth in depths.items() if depth == 0} == {"norms", "laterals", "head"}
    assert depths["encoder.patch_embed.proj.weight"] == 5 and depths["encoder.blocks.3.mlp.fc1.weight"] == 1
    imgs, noise = torch.randn(2, 3, 32, 32), torch.tensor([[0.0], [1.0]]).expand(-1, net.num_noise)
    with torch.no_grad():
        torch.testing.assert_close(net(imgs, noise)[0], net(imgs[:1], noise[:1])[0])
        assert not torch.allclose(net(imgs, noise)[0], net(imgs)[0])  # what is kept is scaled up


# Labels


def test_labels_of_shapes():
    numbers = data.SPLITS["val"][0] + np.arange(data.SPLITS["val"][1])
    made = shapes_batch(0, numbers[:40])
    segment, depth = (dense_data.DenseShapes("val", task) for task in OF_FOLDERS)
    assert segment.classes[:2] == ["ground", "circle"] and len(segment.classes) == 11
    for i in range(0, 40, 7):
        (image, label), _ = segment.load(i)
        assert torch.equal(image, torch.from_numpy(made["image"][i]).permute(2, 0, 1))
        assert np.array_equal(label.numpy() > 0, made["mask"][i])
        assert set(label.unique().tolist()) == {0, 1 + made["label"][i]}
        assert np.array_equal(depth.load(i)[0][1].numpy(), made["depth"][i])
    few = dense_data.dense_set(config(data="shapes", labels=20, img_size=(64, 64)), "train")
    assert len(few) == 20 and set(few.source.labels.tolist()) == set(range(10))


def test_keypoints_of_shapes():
    """The centre is that of the pixels of a shape, where no bar hides it. An arrow's tip points to the right of it; a
    triangle has a corner on its axis, where it is drawn."""
    made = shapes_batch(0, data.SPLITS["val"][0] + np.arange(400))
    (centre_y, centre_x), (tip_y, tip_x) = made["keypoints"].transpose(1, 2, 0)
    for label in (0, 1, 3, 9):  # circle, square, star, hourglass: as large on all sides
        errors = []
        for i in np.flatnonzero(made["label"] == label):
            row, column = np.nonzero(made["mask"][i])
            errors.append((row.mean() + 0.5 - centre_y[i], column.mean() + 0.5 - centre_x[i]))
        assert np.abs(np.median(errors, axis=0)).max() < 0.5
    length, angle = np.hypot(tip_y - centre_y, tip_x - centre_x), np.arctan2(tip_x - centre_x, centre_y - tip_y)
    assert 64 * 0.30 < length.min() < length.max() < 64 * 0.40 and 18 < np.degrees(np.abs(angle)).max() < 20.01
    corners = []
    for i in np.flatnonzero(made["label"] == 2):  # its corner is the pixel that lies farthest along the axis
        row, column = np.nonzero(made["mask"][i])
        along = (centre_y[i] - row - 0.5) * np.cos(angle[i]) + (column + 0.5 - centre_x[i]) * np.sin(angle[i])
        top = along.argmax()
        down, right = row[top] + 0.5 - centre_y[i], column[top] + 0.5 - centre_x[i]
        across = right * np.cos(angle[i]) + down * np.sin(angle[i])
        corners.append((across, along[top] / length[i]))
    across, along = np.median(np.abs(corners), axis=0)
    assert across < 1.5 and 1.0 < along < 1.5


def test_a_heat_map_by_its_closed_form():
    maps = dense_tasks.heat_maps(torch.tensor([[3.5, 5.5], [6.0, 2.0]]), (8, 12))
    assert maps.shape == (2, 8, 12) and maps[0, 3, 5] == 1 and maps[0].argmax() == 3 * 12 + 5
    for row, column in ((0, 0), (7, 11), (5, 2)):
        squared = (row + 0.5 - 6) ** 2 + (column + 0.5 - 2) ** 2
        assert maps[1, row, column].item() == pytest.approx(math.exp(-squared / (2 * dense_tasks.SIGMA**2)), rel=1e-5)
    (image, label), _ = dense_data.DenseShapes("val", "keypoints").load(5)
    made = shapes_batch(0, [data.SPLITS["val"][0] + 5])
    assert image.shape == (3, 64, 64)
    assert torch.equal(label, dense_tasks.heat_maps(torch.from_numpy(made["keypoints"][0]), (64, 64)))


def test_heat_maps_move_with_the_image():
    """A white spot at each keypoint: after crop, shift and flip it is where the map is highest, if it is in sight."""
    points = torch.tensor([[20.5, 12.5], [9.5, 25.5]])
    image, seen = torch.zeros(3, 40, 40, dtype=torch.uint8), 0
    for k, (row, column) in enumerate(points.long().tolist()):
        image[k, row - 1 : row + 2, column - 1 : column + 2] = 255
    pair = dense_data.tv_tensors.Image(image), dense_data.tv_tensors.Mask(dense_tasks.heat_maps(points, (40, 40)))
    cfg = config(task="keypoints", crop_scale=(0.4, 1.0), flip=0.5, shift=4)
    steps = [dense_data.augmentation(cfg), dense_data.v2.ToPureTensor()]
    images = data.Images(types.SimpleNamespace(load=lambda i: (pair, 0)), dense_data.v2.Compose(steps), seed=0)
    (imgs, maps), *_ = images.__getitems__([(epoch, 0, 0) for epoch in range(40)])
    peaks = dense_tasks.Keypoints(None, 0).peaks(maps)
    for img, each, places in zip(imgs, maps, peaks, strict=True):
        for k in range(2):
            if each[k].max() >= 0.9 and img[k].max() > 200:
                seen += 1
                assert (places[k] - (img[k] > 127).nonzero()).norm(dim=1).min() <= 1, (places[k], k)
    assert seen > 50 and len({tuple(place) for place in peaks.flatten(0, 1).tolist()}) > 30


def test_image_and_label_are_cropped_and_flipped_as_one():
    """Red and green of a pixel say where it was, and so does its label: what is cropped stays beside its label."""
    y, x = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    pair = (dense_data.tv_tensors.Image(torch.stack([8 * y, 8 * x, 0 * x]).to(torch.uint8)),
            dense_data.tv_tensors.Mask((32.0 * y + x) / 1024))
    source = types.SimpleNamespace(load=lambda i: (pair, 0))
    cfg = config(crop_scale=(0.3, 1.0), flip=0.5, shift=4)
    steps = [dense_data.augmentation(cfg), dense_data.v2.ToPureTensor()]
    images = data.Images(source, dense_data.v2.Compose(steps), seed=0)
    (imgs, labels), *_ = images.__getitems__([(epoch, 0, 0) for epoch in range(8)])
    assert type(imgs) is type(labels) is torch.Tensor and imgs.shape == (8, 3, 32, 32) and labels.shape == (8, 32, 32)
    row, column = (labels * 1024 // 32) * 8, (labels * 1024 % 32) * 8
    assert (imgs[:, 0] - row).abs().float().median() <= 4 and (imgs[:, 1] - column).abs().float().median() <= 4
    assert len({labels[i].sum().item() for i in range(8)}) == 8
    again = images.__getitems__([(5, 0, 0)])[0]
    assert torch.equal(again[0][0], imgs[5]) and torch.equal(again[1][0], labels[5])


def test_folder_of_class_maps(folders):
    val = dense_data.dense_set(config(data=str(folders["segment"]), img_size=(16, 16)), "val")
    imgs, labels = val.__getitems__([(0, i, i) for i in range(5)])[0]
    assert val.source.classes == NAMES and imgs.dtype == torch.uint8 and labels.dtype == torch.int64
    for i in range(5):
        assert np.array_equal(labels[i].numpy(), scene(folders["segment"], "val", i)[0])


def test_a_folder_below_images_is_no_split(folders, tmp_path):
    """Whatever it is called, its labels lie in a folder of its name."""
    root = shutil.copytree(folders["segment"], tmp_path / "nested")
    for kind in ("images", "labels"):
        (root / "val" / kind / "all").mkdir()
        for path in sorted((root / "val" / kind).glob("[01].*")):
            path.rename(path.parent / "all" / path.name)
    source = dense_data.DenseFolder(root, "val", "segment")
    assert sorted(map(os.fsdecode, source.paths))[-1].startswith("all/") and len(source) == 5
    before = dense_data.DenseFolder(folders["segment"], "val", "segment")
    for i in range(5):
        other = [os.path.basename(path) for path in source.paths].index(before.paths[i])
        assert torch.equal(source.load(other)[0][1], before.load(i)[0][1])


def test_folder_of_depth_maps(folders, tmp_path):
    cfg = config(task="depth", data=str(folders["depth"]), img_size=(16, 16), depth_scale=500.0)
    labels = dense_data.dense_set(cfg, "val").__getitems__([(0, 0, 0), (0, 3, 1)])[0][1]
    for i, label in zip((0, 3), labels, strict=True):
        assert np.allclose(label.numpy(), scene(folders["depth"], "val", i)[1] / 500)
    root = shutil.copytree(folders["depth"], tmp_path / "metres")
    metres = np.linspace(0.5, 8, 256, dtype=np.float64).reshape(16, 16)
    metres[0, :2] = np.nan, np.inf
    np.save(root / "val" / "labels" / "0.npy", metres)  # comes before 0.png
    label = dense_data.DenseFolder(root, "val", "depth").load(0)[0][1]
    assert label.dtype == torch.float32 and label[0, :2].tolist() == [0, 0]
    assert np.allclose(label.numpy().reshape(-1)[2:], metres.reshape(-1)[2:])


def test_a_palette_image_holds_the_numbers_of_its_colours(folders, tmp_path):
    root = shutil.copytree(folders["segment"], tmp_path / "palette")
    classes = scene(root, "val", 0)[0]
    image = Image.fromarray(classes)
    image.putpalette([7 * n % 256 for n in range(768)])
    image.save(root / "val" / "labels" / "0.png")
    assert Image.open(root / "val" / "labels" / "0.png").mode == "P"
    assert np.array_equal(dense_data.DenseFolder(root, "val", "segment").load(0)[0][1].numpy(), classes)


@pytest.fixture
def masks(folders, tmp_path):
    """`masks(numbers)`: a folder of two classes whose label files hold these two numbers, left and right."""
    def make(numbers, suffix=".png"):
        root = shutil.copytree(folders["segment"], tmp_path / "masks")
        (root / "classes.txt").write_text("ground\nshape\n")
        array = np.repeat(np.array(numbers), 8)[None].repeat(16, axis=0)
        for path in root.glob("*/labels/*.png"):
            path.unlink()
            if suffix == ".npy":
                np.save(path.with_suffix(".npy"), array)
            else:
                Image.fromarray(array.astype(bool if suffix == "1" else np.uint8)).save(path)
        return root
    return make


def test_a_mask_of_0_and_255_is_refused_with_the_way_out(masks, words_of, call, tmp_path):
    root = masks((0, 255))
    done = call(dense.main, words_of(data=root, max_steps=1, out=tmp_path / "run"))
    assert done.code == 2 and done.err.count("\n") == 1 and not (tmp_path / "run").exists()
    for said in ("none has class 1 (shape)", "255 means unknown", "--unknown -1 --class_map 255:1"):
        assert said in done.err, done.err
    words = words_of(data=root, max_steps=1, out=tmp_path / "run", unknown=-1, class_map="255:1")
    assert call(dense.main, words).code == 0
    label = dense_data.dense_set(config(data=str(root), img_size=(16, 16), unknown=-1, class_map="255:1"), "val")
    label = label.__getitems__([(0, 0, 0)])[0][1][0]
    assert label[:, :8].unique().tolist() == [0] and label[:, 8:].unique().tolist() == [1]


@pytest.mark.parametrize("numbers,suffix,options", [
    ((0, 1), "1", {}), ((False, True), ".npy", {}), ((0, 1), ".png", {}), ((0, 128), ".png", {"class_map": "128:1"}),
    ((7, 255), ".png", {"class_map": "7:0,255:1"}), ((1, 0), ".png", {"class_map": "0:1,1:0"})])
def test_numbers_that_stand_for_classes(masks, numbers, suffix, options):
    root = masks(numbers, suffix)
    dataset = dense_data.dense_set(config(data=str(root), img_size=(16, 16), **options), "val")
    label = dataset.__getitems__([(0, 0, 0)])[0][1][0]
    assert label[:, :8].unique().tolist() == [0] and label[:, 8:].unique().tolist() == [1]


def test_another_number_may_be_unknown_and_what_never_occurs_is_said(masks, capsys):
    root = masks((0, -1), ".npy")
    (root / "classes.txt").write_text("ground\nshape\n")
    np.save(root / "val" / "labels" / "0.npy", np.ones((16, 16), np.int64))
    dataset = dense_data.dense_set(config(data=str(root), img_size=(16, 16), unknown=-1), "val")
    label = dataset.__getitems__([(0, 1, 0)])[0][1][0]
    assert label[:, 8:].unique().tolist() == [dense_tasks.UNKNOWN]
    with pytest.raises(ValueError, match=r"class 1.*-1 means unknown"):
        dense_data.dense_set(config(data=str(root), img_size=(16, 16), unknown=-1), "train")
    (root / "classes.txt").write_text("ground\nshape\nnever\n")
    dense_data.dense_set(config(data=str(root), img_size=(16, 16), unknown=-1), "val")
    assert "none has class 2 (never)" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["a", "1:2:3", "1", "1:a", ","])
def test_a_class_map_that_is_none(text):
    with pytest.raises(ValueError, match="--class_map takes pairs"):
        dense_data.class_map(text)


@pytest.mark.parametrize("turn", [2, 3, 6, 8])
def test_exif_turns_image_and_label_alike_or_neither(folders, tmp_path, turn):
    root = shutil.copytree(folders["segment"], tmp_path / "exif")
    image, label = root / "val" / "images" / "0.png", root / "val" / "labels" / "0.png"
    before = dense_data.DenseFolder(root, "val", "segment").load(0)[0]
    exif = Image.Exif()
    exif[0x0112] = turn

    def tag(path):
        with Image.open(path) as picture:
            picture.load()
        picture.save(path, exif=exif)

    tag(image)
    with pytest.raises(images.Broken, match=f"orientation {turn}, and this label 1"):
        dense_data.DenseFolder(root, "val", "segment").load(0)
    tag(label)
    after = dense_data.DenseFolder(root, "val", "segment").load(0)[0]
    undo = {2: lambda x: x.flip(-1), 3: lambda x: x.rot90(2, (-2, -1)), 6: lambda x: x.rot90(1, (-2, -1)),
            8: lambda x: x.rot90(-1, (-2, -1))}[turn]
    assert all(torch.equal(undo(b.as_subclass(torch.Tensor)), a) for a, b in zip(before, after, strict=True))


# Losses and scores


def test_segment_against_plain_loops():
    torch.manual_seed(0)
    task = dense_tasks.Segment(NAMES, 0)
    output, label = torch.randn(2, 3, 5, 7), torch.randint(0, 2, (2, 5, 7))
    label[0, :2], label[1, 0] = dense_tasks.UNKNOWN, 1
    loss, pred = task.loss(output, label), output.argmax(dim=1)
    for i in range(2):
        errors = [-output[i, :, y, x].log_softmax(dim=0)[label[i, y, x]].item()
                  for y in range(5) for x in range(7) if label[i, y, x] != dense_tasks.UNKNOWN]
        assert loss[i].item() == pytest.approx(sum(errors) / len(errors), rel=1e-5)
    scores = task.scores((task.tally(pred[:1], label[:1]) + task.tally(pred[1:], label[1:])).double())
    known, ious = label != dense_tasks.UNKNOWN, []
    for k in range(3):  # class 2 occurs only among predictions: its IoU is 0, and counts
        both, either = ((pred == k) & (label == k))[known].sum(), ((pred == k) | (label == k))[known].sum()
        ious.append(100 * (both / either).item())
    assert ious[2] == 0 and scores["miou"] == pytest.approx(sum(ious) / 3, rel=1e-5)
    assert scores["per_class"] == pytest.approx(dict(zip(NAMES, ious, strict=True)), abs=0.01)
    assert scores["pixel_accuracy"] == pytest.approx(100 * (pred == label)[known].float().mean().item(), rel=1e-5)
    assert task.loss(output, torch.full_like(label, dense_tasks.UNKNOWN)).tolist() == [0, 0]


def test_a_class_that_occurs_nowhere_is_not_averaged():
    task = dense_tasks.Segment(NAMES, 0)
    label = torch.tensor([[[0, 1, 1, 0]]])
    assert task.scores(task.tally(label, label).double())["miou"] == 100
    assert list(task.scores(task.tally(label, label).double())["per_class"]) == NAMES[:2]


def test_depth_against_plain_loops():
    torch.manual_seed(0)
    task = dense_tasks.Depth(None, 10.0)
    output, label = torch.randn(2, 1, 5, 7), 9 * torch.rand(2, 5, 7) + 0.5
    label[0, 0], label[1, 1] = 0, 11  # unknown, and too far to be predicted
    pred, known = task.predict(output), (label > 0) & (label <= 10)
    assert 0 < pred.min() and pred.max() < 10 and known.sum() == 56
    loss = task.loss(output, label)
    for i in range(2):
        d = (pred[i].log() - label[i].log())[known[i]]
        assert loss[i].item() == pytest.approx((d.square().mean() - 0.5 * d.mean() ** 2).item(), rel=1e-4)
    scores = task.scores(task.tally(pred[:1], label[:1]) + task.tally(pred[1:], label[1:]))
    p, t = pred[known], label[known]
    assert scores["rmse"] == pytest.approx(math.sqrt((p - t).square().mean()), rel=1e-5)
    assert scores["abs_rel"] == pytest.approx(((p - t).abs() / t).mean().item(), rel=1e-5)
    near = [max(a / b, b / a) < 1.25 for a, b in zip(p.tolist(), t.tolist(), strict=True)]
    assert scores["delta1"] == pytest.approx(100 * sum(near) / len(near), rel=1e-5)


def test_the_scale_of_depth_costs_half():
    """Twice all distances: d = ln 2 everywhere, and half of its square is forgiven."""
    task, label = dense_tasks.Depth(None, 10.0), torch.full((1, 4, 4), 2.0)
    output = torch.full((1, 1, 4, 4), math.log(0.4 / 0.6))  # sigmoid 0.4: 4 m
    assert task.loss(output, label).item() == pytest.approx(0.5 * math.log(2) ** 2, rel=1e-5)
    far = torch.full((1, 1, 4, 4), -200.0, requires_grad=True)  # a sigmoid of 0 in fp32, whose logarithm is none
    task.loss(far, label).sum().backward()
    assert far.grad.isfinite().all() and far.grad.abs().sum() > 0


def test_pck_by_hand():
    """32 pixels: what is one pixel away is found, a diagonal neighbour is not; a map below 1/2 does not count."""
    task, label, pred = dense_tasks.Keypoints(None, 0), torch.zeros(4, 2, 12, 32), torch.zeros(4, 2, 12, 32)
    places = {(0, 0): (5, 7), (0, 1): (5, 8), (1, 0): (6, 8), (1, 1): (4, 7), (2, 0): (11, 19), (2, 1): (5, 7)}
    for (i, k), (row, column) in places.items():
        label[i, k, 5, 7], pred[i, k, row, column] = 0.5, -1.0  # what is highest counts, not how high
        pred[i, k] += (pred[i, k] == -1) * 1.5
    label[3], pred[3] = 0.49, label[3]
    tally = task.tally(task.predict(pred[:1]), label[:1]) + task.tally(task.predict(pred[1:]), label[1:])
    assert tally.tolist() == [1, 3, 3, 3]  # found, known: (5, 7); (5, 8), (4, 7), (5, 7)
    assert task.scores(tally.double()) == {"pck": 66.666667, "pck_centre": 33.333333, "pck_tip": 100.0}
    assert task.scores(torch.tensor([1.0, 0, 2, 0]))["pck_tip"] == 0
    painted = task.paint(label)
    assert painted.shape == (4, 3, 12, 32) and torch.equal(painted[:, :2], label) and painted[:, 2].max() == 0


@pytest.mark.parametrize("name", dense_tasks.TASKS)
def test_the_key_says_what_colours_mean(name, monkeypatch):
    """Of segmentation those that occur; each colour of the legend is the one that `paint` gives."""
    task = dense_tasks.TASKS[name](["ground", "a", "b", "c"], 20.0)
    if name == "segment":
        label = torch.tensor([[[0, 1, 3, dense_tasks.UNKNOWN]]])  # (1, 1, 4)
        painted = task.paint(label)[0, :, 0].T  # (4, 3)
        expected = dict(zip(["ground", "a", "c", "not known"], map(tuple, painted.tolist()), strict=True))
        assert task.key(label) == {"legend": expected}
    elif name == "depth":
        low, high, unit = task.key(torch.tensor([[[5.0]]]))["bar"]
        assert task.paint(torch.tensor([[[low, high]]])).flatten().tolist() == [0, 1] and unit == "metres"
    else:
        label = torch.eye(2)[None, :, None]  # (1, 2, 1, 2): the centre in the first pixel, the tip in the second
        painted = task.paint(label)[0, :, 0].T  # (2, 3)
        assert [list(colour) for colour in task.key(label)["legend"].values()] == painted.tolist()


def test_the_loss_of_heat_maps_against_plain_loops():
    task, output, label = dense_tasks.Keypoints(None, 0), torch.randn(2, 2, 3, 4), torch.rand(2, 2, 3, 4)
    label[1] = 0  # both are out of the picture
    for i, loss in enumerate(task.loss(output, label)):
        pairs = zip(output[i].flatten().tolist(), label[i].flatten().tolist(), strict=True)
        error, size = sum((o - t) ** 2 for o, t in pairs), sum(t**2 for t in label[i].flatten().tolist())
        assert loss.item() == pytest.approx(error / (size if i == 0 else 1), rel=1e-5)
    assert task.loss(0 * output, label).tolist() == [1, 0]


# Runs


def test_keypoints_are_learned_and_evaluated_again(words_of, call, tmp_path, monkeypatch):
    """Of the 20 images of 200 steps, more than the best constant pair of places would find. --eval repeats the number.
    """
    for split in ("train", "val"):
        monkeypatch.setitem(data.SPLITS, split, (0, 20))
    words = words_of("keypoints", patch_size=8, img_size=64, epochs=40, drop_path=0, base_lr=0.004, flip=0, shift=0,
                     crop_scale="1,1", head_width=32, layer_decay=1, micro_batch=4, out=tmp_path / "run")
    done = call(dense.main, words)
    assert done.code == 0, done.err
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    label = torch.stack([pair[0][1] for pair in map(dense_data.DenseShapes("val", "keypoints").load, range(20))])
    truth = dense_tasks.Keypoints(None, 0).peaks(label)  # (20, 2, 2)
    away = (truth[:, None] - truth).norm(dim=3)  # (20, 20, 2), of every image's places as a constant
    chance = 100 * (away <= 64 / 32).float().mean(dim=0).amax(dim=0).mean().item()
    assert result["images"] == 20 and result["pck"] > 2 * chance > 20, (result, chance)
    words = words_of("keypoints", init=tmp_path / "run" / "encoder.pt", model=None, patch_size=None, img_size=None,
                     head_width=None, eval="true", out=tmp_path / "eval")
    done = call(dense.main, words)
    assert done.code == 0, done.err
    again = json.loads((tmp_path / "eval" / "result.json").read_text())
    assert {name: again[name] for name in result if name != "step"} == {n: v for n, v in result.items() if n != "step"}


@pytest.fixture(scope="module")
def finished(words_of, tmp_path_factory):
    """{task: folder} of complete runs."""
    runs = {task: tmp_path_factory.mktemp("runs") / task for task in OF_FOLDERS}
    for task, out in runs.items():
        dense.main([str(w) for w in words_of(task, out=out)])
    return runs


@pytest.mark.parametrize("task", OF_FOLDERS)
def test_eval_repeats_the_number_of_the_run(words_of, call, tmp_path, finished, task):
    before = json.loads((finished[task] / "result.json").read_text())
    assert before["images"] == 5 and (finished[task] / "pictures" / f"{task}.png").stat().st_size > 5000
    words = words_of(task, init=finished[task] / "encoder.pt", model=None, patch_size=None, head_width=None,
                     eval="true", micro_batch=3, batch_size=3, out=tmp_path / "eval")
    done = call(dense.main, words)
    assert done.code == 0, done.err
    after = json.loads((tmp_path / "eval" / "result.json").read_text())
    del before["step"], after["init"]
    assert before.pop("per_class", None) == after.pop("per_class", None)
    assert after == pytest.approx(before, rel=1e-5)


@pytest.mark.parametrize("task", OF_FOLDERS)
def test_stopped_and_resumed_is_as_if_never_stopped(words_of, call, tmp_path, monkeypatch, finished, task):
    out, log = tmp_path / "run", engine.Run.log

    def interrupt(run, step, *rest):
        log(run, step, *rest)
        if step + 1 == 4:
            run.caught_signal = signal.SIGTERM
    with monkeypatch.context() as patch:
        patch.setattr(engine.Run, "log", interrupt)
        assert call(dense.main, words_of(task, out=out)).code == 128 + signal.SIGTERM
    assert torch.load(out / "last.pt")["step"] == 5
    assert call(dense.main, words_of(task, out=out, resume="true", workers=2)).code == 0
    for name in ("last.pt", "encoder.pt"):
        assert equal(torch.load(out / name), torch.load(finished[task] / name))
    assert (out / "result.json").read_text() == (finished[task] / "result.json").read_text()


def test_two_processes_and_other_micro_batches_make_the_same_run(words_of, tmp_path, finished):
    words = words_of("depth", out=tmp_path / "two", micro_batch=1, save_epochs=100)
    code, _, err = finish(start(*torchrun(2, "-m", "tools.dense", *words)))
    assert code == 0, err[-2000:]
    one, two = log_of(finished["depth"]), log_of(tmp_path / "two")
    for key in ("loss", "grad_norm", "lr"):
        assert [line[key] for line in two] == pytest.approx([line[key] for line in one], rel=2e-5), key
    one, two = (json.loads((path / "result.json").read_text()) for path in (finished["depth"], tmp_path / "two"))
    assert two["images"] == 5 and two == pytest.approx(one, rel=1e-4)  # each image once


def test_what_is_frozen_stays_and_what_is_pretrained_arrives(tiny, words_of, call, tmp_path):
    assert call(mae.main, tiny(max_steps=2, out=tmp_path / "mae")).code == 0
    before = torch.load(tmp_path / "mae" / "encoder.pt")["model"]
    words = words_of(init=tmp_path / "mae" / "encoder.pt", model=None, patch_size=None, freeze="true", max_steps=3)
    done = call(dense.main, [*words, "--out", tmp_path / "frozen"])
    assert done.code == 0 and "loaded" in done.out, done.err
    after = torch.load(tmp_path / "frozen" / "encoder.pt")["model"]
    assert after.keys() == {k for k in before if not k.startswith("norm.")}
    assert all(torch.equal(after[k], before[k]) for k in after)
    head = torch.load(tmp_path / "frozen" / "last.pt")["optimizer"]["state"]
    assert len(head) == 8  # weight and bias of norm, 1x1, 3x3, 1x1


def test_a_classifier_gives_its_encoder(tuned, words_of, call, tmp_path):
    assert call(finetune.main, tuned(max_steps=1, mixup=0, cutmix=0, out=tmp_path / "supervised")).code == 0
    words = words_of("depth", init=tmp_path / "supervised" / "encoder.pt", model=None, patch_size=None, max_steps=1)
    assert call(dense.main, [*words, "--out", tmp_path / "depth"]).code == 0


@pytest.mark.parametrize("model,more", [("swin_tiny", {"window": 4}), ("pvt_tiny", {})])
def test_pyramids_run(words_of, call, tmp_path, model, more):
    words = words_of(model=model, patch_size=0, img_size=32, max_steps=1, out=tmp_path / "run", **more)
    assert call(dense.main, words).code == 0


def test_statistics_of_a_frozen_network_stay():
    """A network of torchvision has maps, too, and its BatchNorm learns only where the rest does."""
    cfg = config(model="torchvision:resnet18", patch_size=0, in_chans=2, freeze=True)
    net, imgs = dense.build_dense(cfg, None, NAMES), torch.randn(2, 2, 32, 32) + 1
    assert len(net.laterals) == 4
    for net.freeze in (True, False):
        before = net.encoder.net.bn1.running_mean.clone()
        assert net.train()(imgs, torch.rand(2, net.num_noise)).shape == (2, 3, 32, 32)
        assert torch.equal(net.encoder.net.bn1.running_mean, before) == net.freeze


# Bad input


def spoil(root, how):
    """One mistake in a copy of a folder."""
    labels = root / "train" / "labels"
    if how == "a label is missing":
        (labels / "3.png").unlink()
    elif how == "no labels":
        shutil.rmtree(root / "val" / "labels")
    elif how == "no images":
        shutil.rmtree(root / "train" / "images")
        (root / "train" / "images").mkdir()
    elif how == "no classes.txt":
        (root / "classes.txt").unlink()
    elif how == "one class":
        (root / "classes.txt").write_text("sky\n")
    else:
        content = {"another size": np.ones((8, 16), np.uint8), "class 3 of 3": np.full((16, 16), 3, np.uint8),
                   "colours": np.ones((16, 16, 3), np.uint8), "bytes": np.ones((16, 16), np.uint8)}[how]
        for path in labels.glob("*.png"):
            Image.fromarray(content).save(path)


@pytest.mark.parametrize("task,how,names", [
    ("segment", "a label is missing", ["1 of 12", "3.png"]), ("depth", "no labels", ["val/labels"]),
    ("segment", "no images", ["no images", "train/images"]), ("segment", "no classes.txt", ["classes.txt"]),
    ("segment", "one class", ["classes.txt", "2 to 255"]), ("segment", "another size", ["8x16", "16x16"]),
    ("segment", "class 3 of 3", ["0 to 2", "255"]), ("segment", "colours", ["(16, 16, 3)"]),
    ("depth", "bytes", ["8 bits", "16-bit"])])
def test_a_folder_that_does_not_fit_is_one_line(folders, words_of, call, tmp_path, task, how, names):
    root = shutil.copytree(folders[task], tmp_path / "spoiled")
    spoil(root, how)
    done = call(dense.main, words_of(task, data=root, out=tmp_path / "run"))
    lines = [line for line in done.err.splitlines() if not line.startswith("replaced a broken image")]
    assert done.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), done.err
    assert all(name in lines[0] for name in names), lines


@pytest.mark.parametrize("changes,names", [
    ({"task": "pose"}, ["--task", "pose", "depth"]), ({"split": "dev"}, ["--split"]), ({"model": None}, ["--model"]),
    ({"eval": "true"}, ["--eval", "--init"]), ({"head_width": 0}, ["--head_width"]), ({"labels": 13}, ["--labels"]),
    ({"task": "keypoints", "data": "photos"}, ["--task keypoints", "photos", "shapes"]),
    ({"max_depth": -1}, ["--max_depth"]), ({"img_size": 18}, ["--patch_size"]), ({"data": "nowhere"}, ["nowhere"])])
def test_bad_options_are_one_line(words_of, call, tmp_path, changes, names):
    done = call(dense.main, words_of(**{"out": tmp_path / "run", **changes}))
    assert done.code == 2 and re.fullmatch(r"error: .*\n", done.err), done.err
    assert all(name in done.err for name in names) and not (tmp_path / "run").exists()


def test_another_task_or_no_head_is_not_evaluated(words_of, call, tmp_path, finished):
    words = words_of("depth", init=finished["segment"] / "encoder.pt", model=None, patch_size=None, eval="true")
    done = call(dense.main, [*words, "--out", tmp_path / "eval"])
    assert done.code == 2 and "holds no head for depth" in done.err and "segment: sky, sea, land" in done.err
    saved = torch.load(finished["segment"] / "encoder.pt")
    words = words_of(init=tmp_path / "encoder.pt", model=None, patch_size=None, eval="true", out=tmp_path / "eval")
    for head in (None, 3, {"task": saved["dense"]["task"]}, {**saved["dense"], "tensors": {"laterals.0.bias": 1}}):
        torch.save({**saved, "dense": head}, tmp_path / "encoder.pt")
        done = call(dense.main, words)
        assert done.code == 2 and "holds no head" in done.err and "Traceback" not in done.err
    assert not (tmp_path / "eval").exists()


def test_a_single_bad_label_is_replaced_and_named(folders, tmp_path):
    root = shutil.copytree(folders["segment"], tmp_path / "one")
    Image.fromarray(np.full((16, 16), 77, np.uint8)).save(root / "val" / "labels" / "2.png")
    with pytest.raises(images.Broken, match=r"2\.png: .*77"):
        dense_data.DenseFolder(root, "val", "segment").load(2)
    val = dense_data.dense_set(config(data=str(root), img_size=(16, 16)), "val")
    *_, broken = val.__getitems__([(0, 2, 2)])
    assert list(broken) == [2]


def test_nothing_known_is_said(folders, words_of, call, tmp_path):
    root = shutil.copytree(folders["depth"], tmp_path / "unknown")
    for path in (root / "val" / "labels").glob("*.png"):
        Image.fromarray(np.zeros((16, 16), np.uint16)).save(path)
    done = call(dense.main, words_of("depth", data=root, max_steps=1, out=tmp_path / "run"))
    assert done.code == 2 and "not a single pixel" in done.err and "Traceback" not in done.err
