"""transforms.py: crops, augmentation and normalisation, and constants that belong to no mode."""

import dataclasses
import re
import types

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torchvision.transforms import v2

import data
import fastmim
import finetune
import lut
import mae
import simmim
import um_mae
from common import transforms


def config(**options):
    return types.SimpleNamespace(**{"img_size": (32, 32), "in_chans": 3, "crop_scale": (0.2, 1.0), "flip": 0.5,
                                    **options})


def test_evaluation_takes_the_centre_as_mae_does():
    crop = transforms.CentreCrop((224, 224), v2.InterpolationMode.BICUBIC)
    image = torch.randint(0, 256, (3, 300, 401), dtype=torch.uint8)
    expected = v2.Compose([
        v2.Resize(256, v2.InterpolationMode.BICUBIC), v2.CenterCrop(224)])(image)
    assert torch.equal(crop(image), expected)
    assert crop(image.mT).shape == (3, 224, 224)
    exact = image[:, :224, :224]
    assert torch.equal(crop(exact), exact)
    assert transforms.CentreCrop((384, 384), v2.InterpolationMode.BICUBIC).cover == [384, 384]
    assert transforms.CentreCrop((96, 160), v2.InterpolationMode.BICUBIC)(image).shape == (3, 96, 160)


def test_no_augmentation_leaves_the_image_alone():
    dataset = data.Images(data.Shapes("val"), transforms.augmentation(
        config(img_size=(64, 64), crop_scale=(1, 1), flip=0)), 0)
    assert torch.equal(dataset[7, 3, 0][0], dataset.source.images[3])


def test_random_erasing_paints_noise_of_the_right_spread():
    erase = transforms.RandomErasing(1.0, scale=(0.3, 1 / 3), ratio=(1, 1), value="random")
    image = torch.full((3, 64, 64), 77, dtype=torch.uint8)
    torch.manual_seed(0)
    erased = erase(image)
    painted = transforms.normalize(erased)[:, (erased != 77).any(0)]
    assert erased.dtype == torch.uint8 and 0.28 < (erased != 77).any(0).float().mean() < 0.35
    assert painted.mean().abs() < 0.1 and 0.9 < painted.std() < 1.05


@pytest.mark.parametrize("in_chans", [1, 3])
def test_every_augmentation_at_once(in_chans):
    options = config(in_chans=in_chans, img_size=(24, 40), shift=2, rand_augment=True, color_jitter=0.4,
                     random_erasing=0.5)
    transform = transforms.augmentation(options)
    dataset = data.Images(data.open_source("shapes", "val", in_chans), transform, 0)
    images = [dataset[epoch, 0, 0][0] for epoch in range(20)]
    assert all(i.shape == (in_chans, 24, 40) and i.dtype == torch.uint8 for i in images)
    assert len({i.numpy().tobytes() for i in images}) == 20
    assert torch.equal(dataset[4, 0, 0][0], images[4])


def test_of_lut_s_crops_the_simple_one_is_shifted():
    """--shift is 4 by default, and the paper's other crop has none; elsewhere it goes with any crop."""
    cfg = lut.Config(img_size=(32, 32), flip=0)
    other = dataclasses.replace(cfg, crop="random_resized")
    for options, shifts in ((cfg, True), (other, False), (config(shift=4), True)):
        steps = transforms.augmentation(options).transforms
        assert any(isinstance(step, v2.RandomCrop) for step in steps) == shifts


def test_rand_augment_needs_grey_or_rgb():
    with pytest.raises(ValueError, match="--rand_augment"):
        transforms.augmentation(config(in_chans=4, rand_augment=True))


@pytest.mark.parametrize("in_chans", [1, 3, 7])
def test_normalize_and_back(in_chans):
    imgs = torch.randint(0, 256, (2, in_chans, 5, 4), dtype=torch.uint8)
    x = transforms.normalize(imgs)
    assert x.dtype == torch.float32 and torch.allclose(transforms.denormalize(x), imgs / 255, atol=1e-6)
    assert in_chans != 3 or abs(x[0, 1, 2, 3].item() - (imgs[0, 1, 2, 3].item() / 255 - 0.456) / 0.224) < 1e-5
    assert transforms.denormalize(x * 100).max() == 1 and transforms.denormalize(x * 100 - 1000).min() == 0


def test_mean_and_std_are_those_of_the_options():
    imgs = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    one = config(mean=(0.5,), std=(0.5,))
    assert torch.allclose(transforms.normalize(imgs, one).flatten(), torch.tensor([-1, -0.6, 1]))
    each = config(mean=(0, 0.2, 0.5), std=(1, 2, 0.25))
    assert torch.allclose(transforms.normalize(imgs, each).flatten(), torch.tensor([0, 0, 2.0]))
    for cfg in (one, each):
        assert torch.allclose(transforms.denormalize(transforms.normalize(imgs, cfg), cfg), imgs / 255, atol=1e-6)
    assert transforms.statistics(3, config(mean=(0.5,))) == ([0.5] * 3, [0.229, 0.224, 0.225])


def test_what_is_painted_follows_mean_and_std():
    image = torch.full((3, 64, 64), 77, dtype=torch.uint8)
    options = config(crop_scale=(1, 1), flip=0, random_erasing=1.0, img_size=(64, 64), mean=(0.1,), std=(0.01,))
    erased = transforms.augmentation(options)(image)
    painted = erased[:, (erased != 77).any(0)]
    assert 15 <= painted.min() and painted.max() <= 37  # 25.5 and four times 2.55 about it


def test_every_script_normalises_as_its_options_say():
    """A call without them would take ImageNet's statistics in silence."""
    calls = []
    for path in [*ROOT.glob("*.py"), *ROOT.glob("common/*.py"), *ROOT.glob("tools/*.py")]:
        lines = path.read_text().splitlines()
        for line, following in zip(lines, [*lines[1:], ""], strict=True):
            if re.search(r"(?<!F\.)\b(de)?normalize\((?!imgs, cfg=None)", line) and path.stem != "analyze":
                has_options = "cfg" in line + following or "network)" in line  # of an analysis, with its own
                calls.append((path.name, line.strip(), has_options))
    assert len(calls) > 20 and all(has_options for _, _, has_options in calls), calls


@pytest.mark.parametrize("in_chans", [1, 3, 7])
def test_no_mode_leaves_its_tensors_to_another(in_chans):
    """After a plan, in which all tensors are fake, and after inference mode: plain tensors again."""
    imgs = torch.randint(0, 256, (2, in_chans, 5, 4), dtype=torch.uint8)
    with FakeTensorMode():
        planned = transforms.normalize(torch.empty(2, in_chans, 5, 4))
        assert isinstance(planned, FakeTensor) and isinstance(transforms.denormalize(planned), FakeTensor)
    with torch.inference_mode():
        transforms.normalize(imgs)
    mean, std = transforms.mean_std(in_chans)
    for tensor in (mean, std, transforms.normalize(imgs), transforms.denormalize(transforms.normalize(imgs))):
        assert type(tensor) is torch.Tensor and not tensor.is_inference()


@pytest.mark.parametrize("shape", [(3, 1, 400_000), (3, 400_000, 1), (1, 2, 30_000)])
@pytest.mark.parametrize("crop", ["simple", "centre"])
def test_a_line_of_pixels_does_not_grow_beyond_memory(shape, crop):
    image = torch.arange(shape[1] * shape[2], dtype=torch.int64).remainder(251).to(torch.uint8).view(1, *shape[1:])
    image = image.expand(shape)
    cover = transforms.cover(image, (224, 224), transforms.BILINEAR)
    assert sorted(cover.shape[1:]) == [224, 64 * 224]
    if crop == "centre":
        assert transforms.CentreCrop((224, 224), transforms.BILINEAR)(image).shape == (shape[0], 224, 224)


def test_without_a_crop_training_sees_what_evaluation_sees():
    """An image of other proportions is cut, not squashed: a square in it stays a square."""
    image = torch.zeros(3, 64, 128, dtype=torch.uint8)
    image[:, 22:42, 54:74] = 255
    options = config(img_size=(56, 56), crop_scale=(1.0, 1.0), flip=0)
    found = transforms.augmentation(options)(image)
    assert torch.equal(found, transforms.CentreCrop((56, 56), v2.InterpolationMode.BICUBIC)(image))
    bright = found[0] > 127
    assert bright.any(dim=0).sum() == bright.any(dim=1).sum() == 20


@pytest.mark.parametrize("method", [mae, simmim, um_mae, fastmim, lut, finetune])
def test_every_script_shifts_images(method):
    """By up to so many pixels both ways; what comes in is the mirrored border."""
    changes = {"crop": "simple"} if method is lut else {"crop_scale": (1.0, 1.0)}
    cfg = method.Config(img_size=(8, 8), in_chans=1, flip=0.0, shift=2, **changes)
    cfg.rand_augment = cfg.random_erasing = False
    shift = transforms.augmentation(cfg)
    image = torch.arange(64, dtype=torch.uint8).view(1, 8, 8)
    padded = F.pad(image.float(), (2, 2, 2, 2), mode="reflect").to(torch.uint8)
    windows = padded.unfold(1, 8, 1).unfold(2, 8, 1).flatten(0, 2)  # (25, 8, 8)
    places = {int((windows == shift(image)).all(dim=(1, 2)).nonzero()) for _ in range(400)}
    assert places == set(range(25))
    cfg = method.Config(data="shapes", model="vit_tiny", patch_size=8, img_size=(64, 64), shift=-1)
    with pytest.raises(ValueError, match="--shift"):
        cfg.check()
