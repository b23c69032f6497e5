"""From a decoded image to the network: augmentation of a uint8 image, on the CPU; normalisation, on the device."""

import functools
import types

import torch
from torchvision.transforms import v2

BILINEAR = v2.InterpolationMode.BILINEAR


def statistics(in_chans, cfg=None):
    """(mean, std) of --mean and --std, or else ImageNet's for RGB, 0.5 and 0.25 for other channels (ours): two lists
    of `in_chans` numbers."""
    mean, std = [0.5] * in_chans, [0.25] * in_chans
    if in_chans == 3:
        mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    own_mean, own_std = (for_each(getattr(cfg, name, ()), in_chans) for name in ("mean", "std"))
    return own_mean or mean, own_std or std


def for_each(numbers, in_chans):
    """A number for each channel: one number stands for all of them."""
    return list(numbers) * (in_chans if len(numbers) == 1 else 1)


def about_images(in_chans, cfg):
    """What an encoder.pt says of the images that it was made for: mean, std and, if there is one, value_range."""
    mean, std = statistics(in_chans, cfg)
    value_range = list(with_defaults(cfg).value_range)
    return {"mean": mean, "std": std, **({"value_range": value_range} if value_range else {})}


def mean_std(in_chans, device="cpu", cfg=None):
    """`statistics` as two float32 tensors (C, 1, 1). Made anew by every call: one that was kept from a `--plan` would
    be a fake tensor in whatever comes later."""
    mean_and_std = torch.tensor(statistics(in_chans, cfg)).to(device, non_blocking=True)  # (2, C)
    return mean_and_std[:, :, None, None].unbind()


def normalize(imgs, cfg=None):
    """uint8 (..., C, H, W) -> float32, about zero mean and unit variance: by --mean and --std of `cfg`."""
    mean, std = mean_std(imgs.shape[-3], imgs.device, cfg)
    return (imgs / 255 - mean) / std


def denormalize(imgs, cfg=None):
    """Normalised (..., C, H, W) -> float32 in [0, 1], for pictures."""
    mean, std = mean_std(imgs.shape[-3], imgs.device, cfg)
    return (imgs.float() * std + mean).clamp(0, 1)


class RandomErasing(v2.RandomErasing):
    """Noise in a random box; for uint8, where the published one comes after normalisation: so all that is random
    about an image stays a function of (seed, epoch, index), and its cost stays in the workers."""

    def __init__(self, *args, cfg=None, **options):
        super().__init__(*args, **options)
        self.cfg = cfg

    # DIFF: random erasing clips its normal noise to what a pixel can hold, about 2 standard deviations.
    def make_params(self, flat_inputs):
        params = super().make_params(flat_inputs)
        noise = params["v"]  # normal, (C, h, w); None where nothing is erased
        if noise is not None:
            params["v"] = (denormalize(noise, self.cfg) * 255).round().to(torch.uint8)
        return params


def cover(image, size, interpolation):
    """An image in its own proportions, resized to the least that covers `size` (h, w). Of one that is longer than 64
    times its width, its middle: a line of pixels would grow beyond any memory."""
    longest = 64 * min(image.shape[-2:])
    image = v2.functional.center_crop(image, [min(n, longest) for n in image.shape[-2:]])
    (H, W), (h, w) = image.shape[-2:], size
    covering = [max(h, w * H // W), max(w, h * W // H)]
    return v2.functional.resize(image, covering, interpolation, antialias=True)


class CentreCrop:
    """MAE's released evaluation: 7/8 of an image, its centre, up to 224 px; all of its short side above that.
    Non-square sizes: as much as covers (h, w)."""

    # DIFF: an image that has the size of evaluation already is neither enlarged nor cropped.
    def __init__(self, size, interpolation):
        self.size, self.interpolation = tuple(size), v2.InterpolationMode(interpolation)
        self.cover = [side * 256 // 224 if max(size) <= 224 else side for side in size]

    def __call__(self, image):
        if tuple(image.shape[-2:]) == self.size:
            return image
        return v2.functional.center_crop(cover(image, self.cover, self.interpolation), self.size)


# What a script's Config need not have.
DEFAULTS = {"crop_ratio": (3 / 4, 4 / 3), "interpolation": "bicubic", "shift": 0, "rand_augment": False,
            "color_jitter": 0.0, "random_erasing": 0.0, "crop": "of crop_scale", "mean": (), "std": (),
            "value_range": ()}


def with_defaults(cfg):
    """A namespace of the options in `cfg`, and of DEFAULTS for those that its script does not have."""
    return types.SimpleNamespace(**{**DEFAULTS, **vars(cfg)})


def augmentation(cfg, whole=CentreCrop):
    """The training transforms that the options ask for, in one v2.Compose: uint8 (C, h, w) -> uint8 (C, *img_size).
    `whole` is what evaluation does to an image, and training where --crop_scale 1,1 asks for no random crop."""
    cfg = with_defaults(cfg)
    for name in ("rand_augment", "color_jitter"):
        if getattr(cfg, name) and cfg.in_chans not in (1, 3):
            raise ValueError(f"--{name} knows grey and RGB, not --in_chans {cfg.in_chans}")
    size, interpolation = tuple(cfg.img_size), v2.InterpolationMode(cfg.interpolation)

    if cfg.crop == "simple":
        steps = [functools.partial(cover, size=size, interpolation=interpolation)]
    elif tuple(cfg.crop_scale) == (1, 1):
        steps = [whole(size, interpolation)]
    else:
        # DIFF: MAE's linear probing draws area and shape of a crop once, and cuts off what lies outside of the image;
        # here, as everywhere else, they are drawn again, up to ten times, until a crop lies inside.
        steps = [v2.RandomResizedCrop(size, tuple(cfg.crop_scale), tuple(cfg.crop_ratio), interpolation)]

    shifted = cfg.shift and cfg.crop != "random_resized"  # LUT's option: of its crops, the simple one is shifted
    if shifted or cfg.crop == "simple":
        steps.append(v2.RandomCrop(size, padding=cfg.shift, padding_mode="reflect"))
    if cfg.flip:
        steps.append(v2.RandomHorizontalFlip(cfg.flip))
    if cfg.rand_augment:
        # DIFF: RandAugment is torchvision's. timm's rand-m9-mstd0.5-inc1, which recipes name, applies each operation
        # with p 0.5, varies its magnitude by normal noise, and knows Invert and SolarizeAdd. Magnitude 9 of 11 bins is
        # its strength (rotation by 27 degrees); 9 of torchvision's 31 would be a third of it.
        fill = (mean_std(cfg.in_chans, cfg=cfg)[0] * 255).round().flatten().tolist()
        steps.append(v2.RandAugment(2, 9, num_magnitude_bins=11, interpolation=BILINEAR, fill=fill))
    if cfg.color_jitter:
        steps.append(v2.ColorJitter(*[cfg.color_jitter] * 3))  # brightness, contrast, saturation
    if cfg.random_erasing:
        steps.append(RandomErasing(cfg.random_erasing, scale=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3), value="random",
                                   cfg=cfg))
    return v2.Compose(steps)


def jpeg_side(cfg):
    """How small a huge JPEG may be decoded, such that no random crop of it must be enlarged."""
    cfg = with_defaults(cfg)
    smallest = 1.0 if cfg.crop == "simple" else cfg.crop_scale[0] * min(cfg.crop_ratio)  # crop: share of the area
    return int(max(cfg.img_size) / smallest**0.5) + 1


def always_alike(cfg):
    """Does training see an image as the same pixels in every epoch?"""
    cfg = with_defaults(cfg)
    random = cfg.shift, cfg.flip, cfg.rand_augment, cfg.color_jitter, cfg.random_erasing
    return tuple(cfg.crop_scale) == (1, 1) and not any(random)
