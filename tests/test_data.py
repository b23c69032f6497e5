"""data.py: what an image is depends on nothing but where it is used; what is broken is named, counted and replaced."""

import hashlib
import os
import pickle
import types

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchvision.transforms import v2

import data
from common import randomness, transforms
from common.images import Folder
from common.shapes import shapes_batch


def config(**options):
    return types.SimpleNamespace(**{"data": "shapes", "data_dir": "data", "download": False, "img_size": (32, 32),
                                    "in_chans": 3, "seed": 0, "max_bad": 0.01, "crop_scale": (0.2, 1.0), "flip": 0.5,
                                    "labels": 0, **options})


def write(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


@pytest.fixture
def folder(tmp_path):
    for split, count in (("train", 6), ("val", 3)):
        for label, name in enumerate(("ant", "bee")):
            for i in range(count):
                write(tmp_path / "set" / split / name / f"{i}.png", noise(40, 48, 3, seed=100 * label + i))
    return tmp_path / "set"


def digest(imgs, labels, positions):
    return [hashlib.sha256(i.numpy().tobytes() + bytes([int(label) + 1, int(p)])).hexdigest()
            for i, label, p in zip(imgs, labels, positions, strict=True)]


def stream(dataset, workers=0, world_size=1, first_step=0, last_step=None, **options):
    """{(step, position): hash of image and label} over all processes of the steps from first_step to last_step, or of
    an epoch."""
    seen = {}
    for rank in range(world_size):
        sampler = data.GlobalBatches(len(dataset), rank=rank, world_size=world_size, seed=3, **options)
        last = sampler.steps_per_epoch if last_step is None else last_step
        batches = iter(data.loader(dataset, sampler.batches(first_step, last), workers))
        for step in range(first_step, last):
            for _ in range(sampler.num_micro_batches(step)):
                imgs, labels, positions = next(batches)
                assert len(imgs) <= max(sampler.micro_batch, 2)
                for position, value in zip(positions.tolist(), digest(imgs, labels, positions), strict=True):
                    assert (step, position) not in seen
                    seen[step, position] = value
        assert next(batches, None) is None
    return seen


# shapes


def test_shapes_splits_are_balanced_and_disjoint():
    ranges = [set(range(first, first + n)) for first, n in data.SPLITS.values()]
    assert [len(r) for r in ranges] == [20_000, 2_000, 2_000] and len(set.union(*ranges)) == 24_000
    val, test = data.Shapes("val"), data.Shapes("test")
    assert np.bincount(val.labels).tolist() == [200] * 10 and val.images.shape == (2_000, 3, 64, 64)
    images = torch.cat([val.images, test.images]).flatten(1).numpy()
    assert len({i.tobytes() for i in images}) == 4_000
    assert val.load(7)[1] == 7 and val.load(7)[0].dtype == torch.uint8


def test_shapes_in_other_channel_counts():
    rgb, grey, five = (data.open_source("shapes", "val", c).load(3)[0] for c in (3, 1, 5))
    assert grey.shape == (1, 64, 64) and five.shape == (5, 64, 64)
    assert torch.equal(five, rgb[[0, 1, 2, 0, 1]]) and (grey[0].float() - rgb.float().mean(0)).abs().mean() < 20


# broken files


def spoil(folder, bad=1, good=150):
    """A folder of good images and `bad` broken ones, the first three of them truncated, empty and no image at all."""
    for i in range(good):
        write(folder / f"good{i:03}.png", noise(8, 8, 3, seed=i))
    whole = write(folder / "bad0.jpg", noise(64, 64, 3)).read_bytes()
    contents = [whole[: len(whole) // 2], b"", b"no image"]
    for i in range(bad):
        (folder / f"bad{i}.jpg").write_bytes(contents[min(i, 2)])
    return folder


def read_all(dataset, workers):
    return [digest(*batch) for batch in data.loader(dataset, data.in_order(len(dataset), 10), workers)]


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_files_are_named_once_and_replaced(tmp_path, workers, capfd):
    spoil(tmp_path, bad=3)
    options = config(data=str(tmp_path), img_size=(8, 8), crop_scale=(1, 1), flip=0, max_bad=0.05)
    dataset = data.pretrain_set(options)
    first, again = read_all(dataset, workers), read_all(dataset, workers)
    lines = [line for line in capfd.readouterr().err.splitlines() if "replaced a broken image" in line]
    assert len(lines) == 3 == len(dataset.broken)
    for name, why in (("bad0.jpg", "OSError"), ("bad1.jpg", "UnidentifiedImageError"), ("bad2.jpg", "Unidentified")):
        assert any(name in line and why in line for line in lines)
    assert first == again == read_all(data.pretrain_set(options), 0)  # the same substitutes, whoever meets the file
    images = [dataset[0, i, 0][0] for i in range(4)]
    assert not torch.equal(images[2], images[3])  # bad2's is not the file behind it
    assert all(any(torch.equal(images[i], dataset.source.load(k)[0]) for k in range(3, len(dataset))) for i in range(3))


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_broken_files_stop_the_run_in_one_line(tmp_path, workers, capfd):
    spoil(tmp_path, bad=3)
    dataset = data.pretrain_set(config(data=str(tmp_path), img_size=(8, 8)))
    with pytest.raises(SystemExit, match="2"):
        read_all(dataset, workers)
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith("error: 3 of 153 images ")
    assert line.index("bad0.jpg") < line.index("bad1.jpg") < line.index("check_images")


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_but_broken_files(tmp_path, workers, capfd):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"")
    with pytest.raises(SystemExit, match="2"):
        read_all(data.pretrain_set(config(data=str(tmp_path), max_bad=1.0)), workers)
    assert "error: 3 of 3 images" in capfd.readouterr().err


def test_one_broken_file_is_forgiven_unless_max_bad_is_0(tmp_path, capfd):
    spoil(tmp_path, bad=1, good=5)
    read_all(data.pretrain_set(config(data=str(tmp_path))), 0)
    assert "bad0.jpg" in capfd.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        read_all(data.pretrain_set(config(data=str(tmp_path), max_bad=0.0)), 0)


# the same images, crops and order, however the work is shared


def test_stream_is_the_same_for_any_sharing(folder):
    dataset = data.pretrain_set(config(data=str(folder)))
    options = {"batch_size": 8, "drop_last": False, "last_step": 4}  # 12 images: batches of 8 and 4
    one = stream(dataset, micro_batch=8, **options)
    assert len(one) == 24 and len(set(one.values())) == 24  # two epochs of different crops
    for workers, world_size, micro_batch in ((2, 1, 8), (4, 1, 3), (0, 2, 4), (0, 4, 1), (2, 2, 3), (0, 3, 1)):
        assert stream(dataset, workers, world_size, micro_batch=micro_batch, **options) == one, (
            workers, world_size, micro_batch)
    other = data.pretrain_set(config(data=str(folder), seed=1))
    assert not set(stream(other, micro_batch=8, **options).values()) & set(one.values())


def test_crops_differ_between_images_and_between_epochs():
    ramp = torch.arange(64, dtype=torch.uint8).expand(3, 64, 64)
    dataset = data.Images(data.Memory(ramp.repeat(5, 1, 1, 1), [0] * 5, ["a"]), v2.RandomCrop(16), 0)
    crops = [[dataset[epoch, i, 0][0][0, 0, 0].item() for i in range(5)] for epoch in range(2)]  # left edge of each
    assert len(set(crops[0])) > 1 and crops[0] != crops[1]
    assert [dataset[1, i, 9][0][0, 0, 0].item() for i in range(5)] == crops[1]  # the position has no say in it


def test_resume_at_any_step_gives_the_rest_of_the_stream(folder):
    dataset = data.pretrain_set(config(data=str(folder)))
    whole = stream(dataset, batch_size=4, micro_batch=2, last_step=6)
    for first in range(7):
        rest = stream(dataset, batch_size=4, micro_batch=2, first_step=first, last_step=6)
        assert rest == {key: value for key, value in whole.items() if key[0] >= first}


@pytest.mark.parametrize("world_size,micro_batch", [(1, 4), (2, 2), (2, 1), (3, 1), (4, 5)])
def test_every_image_once_an_epoch_with_a_tail(world_size, micro_batch):
    samplers = [data.GlobalBatches(21, 12, micro_batch, 0, rank, world_size, drop_last=False)
                for rank in range(world_size)]
    batches = [list(sampler.batches(0, sampler.steps_per_epoch)) for sampler in samplers]
    assert len({len(b) for b in batches}) == 1 and all(part for b in batches for part in b)  # none waits for another
    assert len(batches[0]) == sum(samplers[0].num_micro_batches(step) for step in range(2))
    assert [samplers[0].size(step) for step in range(3)] == [12, 9, 12]
    triples = [t for b in batches for part in b for t in part]
    assert sorted(index for _, index, _ in triples) == list(range(21))
    assert sorted(position for _, _, position in triples) == sorted([*range(12), *range(9)])


def test_batches_of_an_epoch():
    sampler = data.GlobalBatches(21, 4, 4, 0)
    epochs = {e: [t[1] for part in sampler.batches(0, 10) for t in part if t[0] == e] for e in (0, 1)}
    assert sampler.steps_per_epoch == 5 and all(len(set(e)) == 20 for e in epochs.values()) and epochs[0] != epochs[1]
    assert data.GlobalBatches(21, 20, 1, 0, world_size=4, drop_last=False).steps_per_epoch == 1  # tail of 1 for 4
    with pytest.raises(ValueError, match=r"21 images make no batch of 32.*--batch_size"):
        data.GlobalBatches(21, 32, 8, 0)


def test_in_order_covers_everything_once():
    parts = [data.in_order(11, 2, rank, 3) for rank in range(3)]
    assert sorted(i for part in parts for batch in part for _, i, _ in batch) == list(range(11))
    assert max(len(batch) for part in parts for batch in part) == 2
    assert sorted(batch for part in parts for batch in part) == data.in_order(11, 2)  # the batches of one process


@pytest.mark.parametrize("workers", [0, 1])
def test_the_main_process_keeps_its_random_numbers(folder, workers):
    dataset = data.pretrain_set(config(data=str(folder)))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    list(data.loader(dataset, data.in_order(12, 4), workers))
    dataset[0, 0, 0]
    assert torch.equal(torch.rand(3), expected)


def test_workers_leave_signals_to_the_main_process(folder):
    class Asking(data.Images):
        def __getitems__(self, batch):
            os.kill(os.getpid(), 15)  # a worker with the default handler would die here
            os.kill(os.getpid(), 2)
            return super().__getitems__(batch)

    dataset = Asking(Folder(folder, "train"), v2.Resize((8, 8)), 0)
    assert sum(len(batch[0]) for batch in data.loader(dataset, data.in_order(12, 4), workers=1)) == 12


# where images come from


def test_folder_layouts(folder):
    train, val, test = (data.labelled_set(config(data=str(folder)), split) for split in ("train", "val", "test"))
    assert (len(train), len(val), len(test)) == (12, 6, 6) and train.source.classes == ["ant", "bee"]
    assert train.source.labels.tolist() == [0] * 6 + [1] * 6 and train[0, 7, 2][1:] == (1, 2)
    write(folder / "test" / "ant" / "deep" / "0.png", noise(9, 9, 3))
    write(folder / "test" / "bee" / "0.png", noise(9, 9, 3))
    assert len(data.labelled_set(config(data=str(folder)), "test")) == 2
    unlabelled = data.pretrain_set(config(data=str(folder)))
    assert len(unlabelled) == 12 and unlabelled[0, 0, 0][1] == -1 and unlabelled.source.classes is None


def test_any_folder_serves_pretraining(tmp_path):
    for name in ("b/2.png", "b/c/1.PNG", "a.jpg", ".hidden/3.png", "._a.jpg"):
        write(tmp_path / name, noise(9, 9, 3), format="PNG")
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    source = data.open_source(str(tmp_path), "train")
    assert [os.fsdecode(p) for p in source.paths] == ["a.jpg", "b/2.png", "b/c/1.PNG"]


def test_one_line_errors_about_folders(tmp_path, folder):
    def refused(root, message, in_chans=3, labelled=True):
        with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
            data.open_source(str(root), "train", in_chans, labelled)
            data.open_source(str(root), "val", in_chans, labelled)
        assert "\n" not in str(caught.value)
        assert str(root) in str(caught.value) or "--in_chans" in str(caught.value)

    refused(tmp_path / "nowhere", "no such folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no images below", labelled=False)
    refused(tmp_path / "empty", "found nothing")
    write(tmp_path / "flat" / "a.png", noise(9, 9, 3))
    refused(tmp_path / "flat", "labels need .*found a.png")
    refused(folder, "--in_chans 2", in_chans=2)
    write(folder / "train" / "cow" / "a.png", noise(9, 9, 3))
    refused(folder, "class cow is in train/ but not in val/")
    (folder / "val" / "cow").mkdir()
    refused(folder, "class cow has no images")
    for name in ("train/one", "val/one"):
        write(tmp_path / "single" / name / "a.png", noise(9, 9, 3))
    refused(tmp_path / "single", "at least 2")


def make_cifar(root, monkeypatch, cls, key):
    """Small files in torchvision's layout, and torchvision told their true MD5 sums instead of the published ones."""
    base, rng = root / cls.base_folder, np.random.default_rng(0)
    base.mkdir(parents=True)

    def put(name, content):
        (base / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((base / name).read_bytes()).hexdigest()

    def batches(names):
        return [[name, put(name, {"data": rng.integers(0, 256, (4, 3072), np.uint8), key: [0, 1, 2, 3]})]
                for name in names]

    monkeypatch.setattr(cls, "train_list", batches([name for name, _ in cls.train_list]))
    monkeypatch.setattr(cls, "test_list", batches([name for name, _ in cls.test_list]))
    md5 = put(cls.meta["filename"], {cls.meta["key"]: list("abcd")})
    monkeypatch.setattr(cls, "meta", {**cls.meta, "md5": md5})


@pytest.mark.parametrize("name,key,batches", [("cifar10", "labels", 5), ("cifar100", "fine_labels", 1)])
def test_cifar(tmp_path, monkeypatch, name, key, batches):
    with pytest.raises(FileNotFoundError, match="--download") as caught:
        data.open_source(name, "train", data_dir=str(tmp_path))
    assert "\n" not in str(caught.value)
    make_cifar(tmp_path, monkeypatch, getattr(torchvision.datasets, name.upper()), key)
    train, val, test = (data.open_source(name, s, data_dir=str(tmp_path)) for s in ("train", "val", "test"))
    assert (len(train), len(val), len(test)) == (4 * batches, 4, 4) and train.classes == list("abcd")
    assert torch.equal(val.images, test.images) and train.load(1)[0].shape == (3, 32, 32) and train.load(1)[1] == 1
    published = getattr(torchvision.datasets, name.upper())(tmp_path, train=True)
    assert torch.equal(train.images[2].permute(1, 2, 0), torch.from_numpy(published.data[2]))


def test_labels_takes_a_balanced_part_that_depends_on_the_seed_alone():
    labels = np.repeat(np.arange(4), [50, 20, 10, 40])
    few, more, other = data.balanced(labels, 12, 0), data.balanced(labels, 30, 0), data.balanced(labels, 12, 1)
    assert np.bincount(labels[few]).tolist() == [3, 3, 3, 3] and set(few) <= set(more) and set(few) != set(other)
    assert np.ptp(np.bincount(labels[more])) <= 1 and np.array_equal(few, data.balanced(labels, 12, 0))
    with pytest.raises(ValueError, match="--labels 121"):
        data.balanced(labels, 121, 0)
    chosen = data.labelled_set(config(labels=40), "train")
    assert len(chosen) == 40 and np.bincount(chosen.source.labels).tolist() == [4] * 10
    numbers = data.balanced(np.arange(20_000) % 10, 40, 0)
    assert np.array_equal(chosen.source.images[5].permute(1, 2, 0), shapes_batch(0, numbers[5:6])["image"][0])


@pytest.mark.parametrize("n", [2, 4, 99])
def test_a_preview_is_spread_over_the_classes(folder, n):
    cfg, model = config(data=str(folder), seed=4), types.SimpleNamespace(num_noise=5)
    dataset = data.labelled_set(cfg, "val")
    imgs, noise = data.preview(dataset, cfg, model, torch.device("cpu"), n)
    assert imgs.shape == (min(n, 6), 3, 32, 32) and imgs.dtype == torch.float32
    expected = {2: [0, 3], 4: [0, 1, 3, 4], 99: range(6)}[n]
    assert torch.equal(imgs, transforms.normalize(torch.stack([dataset[0, i, 0][0] for i in expected])))
    assert torch.equal(noise, randomness.noise(4, 0, min(n, 6), 5, use="sample"))


def test_a_preview_has_64_images():
    cfg, model = config(), types.SimpleNamespace(num_noise=5)
    dataset = data.labelled_set(cfg, "val")
    imgs, noise = data.preview(dataset, cfg, model, torch.device("cpu"))
    assert len(imgs) == len(noise) == 64
    assert torch.equal(imgs[63], transforms.normalize(dataset[0, 2_000 * 63 // 64, 0][0]))


# what an evaluation sees


@pytest.mark.parametrize("workers", [0, 2])
def test_an_evaluation_can_be_iterated_again(folder, workers):
    dataset = data.labelled_set(config(data=str(folder)), "val")
    seen = []
    for rank in range(2):
        run = types.SimpleNamespace(rank=rank, world_size=2)
        part = data.evaluation(dataset, types.SimpleNamespace(micro_batch=4, workers=workers), run)
        assert part.num_images == 6 and part.classes == ["ant", "bee"]
        first, again = list(part), list(part)
        assert [digest(*batch) for batch in first] == [digest(*batch) for batch in again]
        seen += [(i, label) for _, labels, indices in first for i, label in zip(indices.tolist(), labels.tolist(),
                                                                               strict=True)]
        assert all(torch.equal(img, dataset[0, i, i][0]) for imgs, _, indices in first
                   for img, i in zip(imgs, indices.tolist(), strict=True))
    assert sorted(seen) == [(i, i // 3) for i in range(6)]


def test_data_sets_of_one_source_name_a_broken_file_once(tmp_path, capfd):
    one = data.pretrain_set(config(data=str(spoil(tmp_path, bad=1, good=5))))
    read_all(one, 0)
    other = data.Images(one.source, one.transform, 1, one.max_bad, broken=one.broken)
    read_all(other, 0)
    assert capfd.readouterr().err.count("bad0.jpg") == 1 == len(other.broken)


class Config(types.SimpleNamespace):
    def views(self, transform):
        return lambda image: torch.stack([transform(image), transform(image)])


def test_a_config_may_ask_for_views():
    cfg = Config(**vars(config()))
    pair = data.pretrain_set(cfg)[0, 5, 0][0]
    assert pair.shape == (2, 3, 32, 32) and not torch.equal(*pair)
    assert data.labelled_set(cfg, "val")[0, 5, 0][0].shape == (3, 32, 32)
