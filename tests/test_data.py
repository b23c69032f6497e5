"""data.py: what an image is depends on nothing but where it is used; what is broken is named, counted and replaced."""

import hashlib
import os
import pickle
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
from common import files, transforms


def config(**options):
    return types.SimpleNamespace(**{"data": "shapes", "data_dir": "data", "download": False, "img_size": (32, 32),
                                    "in_chans": 3, "seed": 0, "max_bad": 0.01, "crop_scale": (0.2, 1.0), "flip": 0.5,
                                    **options})


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


def digest(imgs, labels, where):
    return [hashlib.sha256(i.numpy().tobytes() + bytes([int(label) + 1, int(w)])).hexdigest()
            for i, label, w in zip(imgs, labels, where, strict=True)]


def stream(dataset, workers=0, world=1, **options):
    """{(step, position): hash of image and label} over all processes of a run of two epochs."""
    seen = {}
    for rank in range(world):
        sampler = data.GlobalBatches(len(dataset), rank=rank, world=world, seed=3, **options)
        batches = iter(data.loader(dataset, sampler, workers))
        for step in range(sampler.start, sampler.stop):
            for _ in range(sampler.micro_batches(step)):
                imgs, labels, where = next(batches)
                assert len(imgs) <= max(sampler.micro_batch, 2)
                for position, value in zip(where.tolist(), digest(imgs, labels, where), strict=True):
                    assert (step, position) not in seen
                    seen[step, position] = value
        assert next(batches, None) is None
    return seen


# shapes


def test_shapes_are_a_function_of_seed_and_index():
    numbers = [5, 0, 19_999, 1_000_003, 2_000_001, *range(40, 80)]
    together = data.shapes_batch(0, numbers)
    for k in (0, 1, 2, 3, 4, 20, 44):
        alone = data.shapes_batch(0, [numbers[k]])
        for key, value in alone.items():
            assert np.array_equal(value[0], together[key][k]), (key, numbers[k])
    assert np.array_equal(data.shapes_batch(0, numbers[::-1])["image"], together["image"][::-1])
    assert np.array_equal(data.shapes_batch(0, numbers, dense=False)["image"], together["image"])
    assert not np.array_equal(data.shapes_batch(1, numbers)["image"], together["image"])


def test_shapes_are_the_same_bytes_on_every_machine():
    made = data.shapes_batch(0, range(20))
    assert {key: hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()[:16] for key, value in made.items()
            } == GOLDEN


GOLDEN = {"image": "f9805a9c5498d06a",
          "label": "2aaca1e2252f1fc4", "mask": "a4139700bfeecddf", "depth": "69d3ac760214f9a0"}


def test_shapes_splits_are_balanced_and_disjoint():
    ranges = [set(range(first, first + n)) for first, n in data.SPLITS.values()]
    assert [len(r) for r in ranges] == [20_000, 2_000, 2_000] and len(set.union(*ranges)) == 24_000
    val, test = data.Shapes("val"), data.Shapes("test")
    assert np.bincount(val.labels).tolist() == [200] * 10 and val.images.shape == (2_000, 3, 64, 64)
    images = torch.cat([val.images, test.images]).flatten(1).numpy()
    assert len({i.tobytes() for i in images}) == 4_000
    assert val.load(7)[1] == 7 and val.load(7)[0].dtype == torch.uint8


def ridge_accuracy(train, test, y, yt):
    mean, std = train.mean(0), train.std(0) + 1e-9
    a, b = ((np.c_[(x - mean) / std, np.ones(len(x))]) for x in (train, test))
    weights = np.linalg.solve(a.T @ a + np.eye(a.shape[1]), a.T @ np.eye(10)[y])
    return ((b @ weights).argmax(1) == yt).mean()


def test_shapes_have_no_shortcut():
    """Global statistics do not give the class away; the same classifier on what does, the outline, beats chance."""
    sets = data.shapes_batch(0, range(2_000)), data.shapes_batch(0, range(1_000_000, 1_001_000))

    def statistics(made):
        pixels = made["image"].reshape(len(made["image"]), -1, 3)
        bins = np.stack([(pixels >> 5 == b).mean(1) for b in range(8)], 1).reshape(len(pixels), -1)
        return np.c_[pixels.mean(1), pixels.std(1), bins, made["mask"].mean((1, 2))]

    def outline(made):
        return np.c_[made["mask"][:, 20].mean(1), made["mask"][:, 32].mean(1), made["mask"][:, :, 32].mean(1)]

    labels = [made["label"] for made in sets]
    assert ridge_accuracy(*map(statistics, sets), *labels) < 0.14  # 4 standard deviations above 0.1
    assert ridge_accuracy(*map(outline, sets), *labels) > 0.2
    area = [sets[0]["mask"][k::10].mean() for k in range(10)]
    assert max(area) / min(area) < 1.1


def test_shapes_depth_is_in_metres_and_agrees_with_occlusion():
    made = data.shapes_batch(0, range(50))
    mask, depth = made["mask"], made["depth"]
    assert depth.dtype == np.float32 and 2.4 <= depth.min() and depth.max() <= 20
    for m, z in zip(mask, depth, strict=True):
        assert len(np.unique(z[m])) == 1 and 3 <= z[m][0] <= 4  # one distance a shape, of 1.2 / (0.3 to 0.4)
        ground = z[(z >= 5)]
        assert ground.size and z[0].max() > z[-1].max()  # the top of the picture is far


def test_shapes_in_other_channel_counts():
    rgb, grey, five = (data.open_source("shapes", "val", c).load(3)[0] for c in (3, 1, 5))
    assert grey.shape == (1, 64, 64) and five.shape == (5, 64, 64)
    assert torch.equal(five, rgb[[0, 1, 2, 0, 1]]) and (grey[0].float() - rgb.float().mean(0)).abs().mean() < 20


# decoding


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_modes(tmp_path, mode):
    """A picture of one opaque colour comes back as that colour from every mode, in 1, 3 and 4 channels."""
    grey = mode in ("1", "L", "LA")
    colour = (255, 255, 255) if grey else (204, 102, 51)  # of the web palette
    path = str(tmp_path / ("a.tif" if mode == "CMYK" else "a.png"))
    Image.new("RGB", (8, 6), colour).convert(mode).save(path)
    rgb = files.decode(path, 3)
    assert rgb.shape == (3, 6, 8) and rgb.dtype == torch.uint8
    assert (rgb.float() - torch.tensor(colour).view(3, 1, 1)).abs().max() <= 3
    luma = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
    assert (files.decode(path, 1).float() - luma).abs().max() <= 3 and files.decode(path, 1).shape == (1, 6, 8)
    assert files.decode(path, 4).shape == (4, 6, 8) and files.decode(path, 4)[3].min() == 255


def test_transparency_is_white_and_kept_in_four_channels(tmp_path):
    array = np.zeros((4, 4, 4), np.uint8)
    array[:, 2:] = (10, 20, 30, 255)
    path = str(write(tmp_path / "a.png", array))
    assert files.decode(path)[:, :, :2].min() == 255 and files.decode(path)[:, 0, 3].tolist() == [10, 20, 30]
    assert files.decode(path, 1)[0, 0, 0] == 255 and files.decode(path, 4)[3, 0].tolist() == [0, 0, 255, 255]


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm"])
def test_sixteen_bits_are_scaled(tmp_path, name):
    values = np.array([[0, 257, 128 * 257, 65535]], np.uint16)
    path = str(write(tmp_path / name, values))
    assert files.decode(path, 1)[0, 0].tolist() == [0, 1, 128, 255]
    assert files.decode(path, 3)[2, 0].tolist() == [0, 1, 128, 255]


def test_float_tiff_and_range(tmp_path):
    good, bad = (str(write(tmp_path / f"{v}.tif", np.array([[0, 0.5, v]], np.float32))) for v in (1.0, 3.0))
    assert files.decode(good, 1)[0, 0].tolist() == [0, 128, 255]
    with pytest.raises(files.Broken, match="outside"):
        files.decode(bad, 1)


def test_npy(tmp_path):
    def stored(array):
        np.save(tmp_path / "a.npy", array, allow_pickle=True)
        return str(tmp_path / "a.npy")

    five = noise(6, 7, 5)
    assert torch.equal(files.decode(stored(five), 5), torch.from_numpy(five).permute(2, 0, 1))
    assert files.decode(stored(np.float32([[0, 1]])), 1).tolist() == [[[0, 255]]]
    assert files.decode(stored(np.uint16([[0, 65535]])), 1).tolist() == [[[0, 255]]]
    for array, why in ((five, "5 channels"), (np.array([object()]), "Python objects"), (np.zeros(3), "shape"),
                       (np.full((2, 2), np.nan), "outside"), (np.zeros((0, 4, 3), np.uint8), "shape")):
        with pytest.raises(files.Broken, match=why):
            files.decode(stored(array), 3)
    path = stored(noise(60, 70, 3))
    Path(path).write_bytes(Path(path).read_bytes()[:1000])
    with pytest.raises(files.Broken):
        files.decode(path, 3)


def test_exif_orientation(tmp_path):
    array = np.zeros((16, 32, 3), np.uint8)
    array[:, :16] = 255  # left half white
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise: white goes to the top
    image = files.decode(str(write(tmp_path / "a.jpg", array, exif=exif, quality=95)))
    assert image.shape == (3, 32, 16) and image[:, :14].min() > 240 and image[:, 18:].max() < 15


def test_large_jpegs_are_decoded_small_enough_but_not_too_small(tmp_path):
    path = str(write(tmp_path / "a.jpg", noise(400, 800, 3)))
    assert files.decode(path).shape == (3, 400, 800)
    assert files.decode(path, min_side=200).shape == (3, 200, 400)
    assert files.decode(path, min_side=201).shape == (3, 400, 800)


@pytest.mark.parametrize("side", [9_600, 14_000])  # Pillow only warns about the first, refuses the second
def test_bombs_are_refused_before_they_are_decoded(tmp_path, side, monkeypatch):
    path = tmp_path / "bomb.png"
    Image.new("1", (side, side)).save(path)
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", lambda self: pytest.fail("decoded"))
    with pytest.raises(files.Broken, match=r"bomb\.png: DecompressionBomb"):
        files.decode(str(path))


def test_files_are_read_only_as_image_formats(tmp_path):
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    with pytest.raises(files.Broken, match="UnidentifiedImageError"):
        files.decode(str(tmp_path / "a.png"))


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
    assert line.index("bad0.jpg") < line.index("bad1.jpg") < line.index("--check")


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
    options = {"batch_size": 8, "drop_last": False, "stop": 4}  # 12 images: batches of 8 and 4
    one = stream(dataset, micro_batch=8, **options)
    assert len(one) == 24 and len(set(one.values())) == 24  # two epochs of different crops
    for workers, world, micro_batch in ((2, 1, 8), (4, 1, 3), (0, 2, 4), (0, 4, 1), (2, 2, 3), (0, 3, 1)):
        assert stream(dataset, workers, world, micro_batch=micro_batch, **options) == one, (workers, world, micro_batch)
    other = data.pretrain_set(config(data=str(folder), seed=1))
    assert not set(stream(other, micro_batch=8, **options).values()) & set(one.values())


def test_crops_differ_between_images_and_between_epochs():
    ramp = torch.arange(64, dtype=torch.uint8).expand(3, 64, 64)
    dataset = data.Images(data.Memory(ramp.repeat(5, 1, 1, 1), [0] * 5, ["a"]), data.v2.RandomCrop(16), 0)
    crops = [[dataset[epoch, i, 0][0][0, 0, 0].item() for i in range(5)] for epoch in range(2)]  # left edge of each
    assert len(set(crops[0])) > 1 and crops[0] != crops[1]
    assert [dataset[1, i, 9][0][0, 0, 0].item() for i in range(5)] == crops[1]  # the position has no say in it


def test_resume_at_any_step_gives_the_rest_of_the_stream(folder):
    dataset = data.pretrain_set(config(data=str(folder)))
    whole = stream(dataset, batch_size=4, micro_batch=2, stop=6)
    for start in range(7):
        rest = stream(dataset, batch_size=4, micro_batch=2, start=start, stop=6)
        assert rest == {key: value for key, value in whole.items() if key[0] >= start}


@pytest.mark.parametrize("world,micro_batch", [(1, 4), (2, 2), (2, 1), (3, 1), (4, 5)])
def test_every_image_once_an_epoch_with_a_tail(world, micro_batch):
    samplers = [data.GlobalBatches(21, 12, micro_batch, 0, rank, world, drop_last=False) for rank in range(world)]
    batches = [list(sampler) for sampler in samplers]
    assert len({len(b) for b in batches}) == 1 and all(part for b in batches for part in b)  # none waits for another
    assert len(batches[0]) == sum(samplers[0].micro_batches(step) for step in range(2))
    assert [samplers[0].size(step) for step in range(3)] == [12, 9, 12]
    triples = [t for b in batches for part in b for t in part]
    assert sorted(index for _, index, _ in triples) == list(range(21))
    assert sorted(position for _, _, position in triples) == sorted([*range(12), *range(9)])


def test_batches_of_an_epoch():
    sampler = data.GlobalBatches(21, 4, 4, 0, stop=10)
    epochs = {e: [t[1] for part in sampler for t in part if t[0] == e] for e in (0, 1)}
    assert sampler.steps_per_epoch == 5 and all(len(set(e)) == 20 for e in epochs.values()) and epochs[0] != epochs[1]
    assert data.GlobalBatches(21, 20, 1, 0, world=4, drop_last=False).steps_per_epoch == 1  # tail of 1 for 4
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

    dataset = Asking(data.Folder(folder, "train"), data.v2.Resize((8, 8)), 0)
    assert sum(len(batch[0]) for batch in data.loader(dataset, data.in_order(12, 4), workers=1)) == 12


# transforms


def test_evaluation_takes_the_centre_as_mae_does():
    crop = transforms.CentreCrop((224, 224), data.v2.InterpolationMode.BICUBIC)
    image = torch.randint(0, 256, (3, 300, 401), dtype=torch.uint8)
    expected = torchvision.transforms.v2.Compose([
        data.v2.Resize(256, data.v2.InterpolationMode.BICUBIC), data.v2.CenterCrop(224)])(image)
    assert torch.equal(crop(image), expected)
    assert crop(image.mT).shape == (3, 224, 224)
    exact = image[:, :224, :224]
    assert torch.equal(crop(exact), exact)
    assert transforms.CentreCrop((384, 384), data.v2.InterpolationMode.BICUBIC).cover == [384, 384]
    assert transforms.CentreCrop((96, 160), data.v2.InterpolationMode.BICUBIC)(image).shape == (3, 96, 160)


def test_no_augmentation_leaves_the_image_alone():
    dataset = data.Images(data.Shapes("val"), transforms.augmentation(transforms.with_defaults(
        config(img_size=(64, 64), crop_scale=(1, 1), flip=0))), 0)
    assert torch.equal(dataset[7, 3, 0][0], dataset.source.images[3])


def test_random_erasing_paints_noise_of_the_right_spread():
    erase = transforms.RandomErasing(1.0, scale=(0.3, 1 / 3), ratio=(1, 1), value="random")
    image = torch.full((3, 64, 64), 77, dtype=torch.uint8)
    torch.manual_seed(0)
    erased = erase(image)
    painted = data.normalize(erased)[:, (erased != 77).any(0)]
    assert erased.dtype == torch.uint8 and 0.28 < (erased != 77).any(0).float().mean() < 0.35
    assert painted.mean().abs() < 0.1 and 0.9 < painted.std() < 1.05


@pytest.mark.parametrize("in_chans", [1, 3])
def test_every_augmentation_at_once(in_chans):
    options = config(in_chans=in_chans, img_size=(24, 40), shift=2, rand_augment=True, color_jitter=0.4,
                     random_erasing=0.5)
    transform = transforms.augmentation(transforms.with_defaults(options))
    dataset = data.Images(data.open_source("shapes", "val", in_chans), transform, 0)
    images = [dataset[epoch, 0, 0][0] for epoch in range(20)]
    assert all(i.shape == (in_chans, 24, 40) and i.dtype == torch.uint8 for i in images)
    assert len({i.numpy().tobytes() for i in images}) == 20
    assert torch.equal(dataset[4, 0, 0][0], images[4])


def test_rand_augment_needs_grey_or_rgb():
    with pytest.raises(ValueError, match="--rand_augment"):
        transforms.augmentation(transforms.with_defaults(config(in_chans=4, rand_augment=True)))


@pytest.mark.parametrize("in_chans", [1, 3, 7])
def test_normalize_and_back(in_chans):
    imgs = torch.randint(0, 256, (2, in_chans, 5, 4), dtype=torch.uint8)
    x = data.normalize(imgs)
    assert x.dtype == torch.float32 and torch.allclose(transforms.denormalize(x), imgs / 255, atol=1e-6)
    assert in_chans != 3 or abs(x[0, 1, 2, 3].item() - (imgs[0, 1, 2, 3].item() / 255 - 0.456) / 0.224) < 1e-5
    assert transforms.denormalize(x * 100).max() == 1 and transforms.denormalize(x * 100 - 1000).min() == 0


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
    assert np.array_equal(chosen.source.images[5].permute(1, 2, 0), data.shapes_batch(0, numbers[5:6])["image"][0])


def test_sample_is_spread_over_the_classes(folder):
    dataset = data.labelled_set(config(data=str(folder)), "val")
    assert data.sample(dataset, 4).shape == (4, 3, 32, 32) and len(data.sample(dataset, 99)) == 6
    assert torch.equal(data.sample(dataset, 2)[1], dataset[0, 3, 0][0])


def run_check(*words):
    with pytest.raises(SystemExit) as stop:
        data.main(list(map(str, words)))
    return int(stop.value.code)


def test_check(folder, tmp_path, capsys):
    write(folder / "stray.png", noise(8, 200, 3))
    assert run_check("--check", folder) == 0
    said = capsys.readouterr().out
    for line in ("train/ant 6", "RGB 19", "40x48 18", "broken: 0", "odd-sized: 1", "stray.png: 8x200", "unlabelled: 1"):
        assert line in said
    (folder / "train" / "ant" / "0.png").write_bytes(b"")
    assert run_check("--check", folder) == 1
    said = capsys.readouterr().out
    assert "broken: 1" in said and "ant/0.png" in said and "RGB 18" in said


def test_check_of_a_bad_path_is_one_line_and_code_2(tmp_path, capsys):
    for words in (("--check", tmp_path / "nowhere"), ("--check",), ()):
        assert run_check(*words) == 2
        assert capsys.readouterr().err.count("\n") == 1
    command = [sys.executable, data.__file__, "--check", str(tmp_path / "nowhere")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "no such folder" in result.stderr
