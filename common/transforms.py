"""What happens to pixels between a decoded image and the network: augmentation of one uint8 image, on the CPU, and the
normalisation of a batch, on the device.
"""

import collections
import functools
import math

import torch
from torchvision.transforms import v2

BILINEAR = v2.InterpolationMode.BILINEAR


@functools.cache  # one copy to the device, not one a step
def mean_std(in_chans, device="cpu"):
    """Two float32 tensors (C, 1, 1): ImageNet's statistics for RGB, a plain 0.5 and 0.25 for other channels (ours)."""
    mean, std = [0.5] * in_chans, [0.25] * in_chans
    if in_chans == 3:
        mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return torch.tensor(mean, device=device).view(-1, 1, 1), torch.tensor(std, device=device).view(-1, 1, 1)


def normalize(imgs):
    """uint8 (..., C, H, W) -> float32, about zero mean and unit variance."""
    mean, std = mean_std(imgs.shape[-3], imgs.device)
    return (imgs / 255 - mean) / std


def denormalize(imgs):
    """Normalised (..., C, H, W) -> float32 in [0, 1], for pictures."""
    mean, std = mean_std(imgs.shape[-3], imgs.device)
    return (imgs.float() * std + mean).clamp(0, 1)


class RandomErasing(v2.RandomErasing):
    """Noise in a random box; for uint8, where the published one comes after normalisation: so all that is random
    about an image stays a function of (seed, epoch, index), and its cost stays in the workers.

    # DIFF: random erasing clips its normal noise to what a pixel can hold, about 2 standard deviations.
    """

    def make_params(self, flat_inputs):
        params = super().make_params(flat_inputs)
        if params["v"] is not None:  # normal noise (C, h, w)
            mean, std = mean_std(len(params["v"]))
            params["v"] = ((params["v"] * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
        return params


def cover(image, size, interpolation):
    """An image in its own proportions, resized to the least that covers `size` (h, w). Of one that is longer than 64
    times its width, its middle: a line of pixels would grow beyond any memory."""
    limit = 64 * min(image.shape[-2:])
    image = v2.functional.center_crop(image, [min(n, limit) for n in image.shape[-2:]])
    (H, W), (h, w) = image.shape[-2:], size
    h, w = (h, h * W // H) if h * W >= w * H else (w * H // W, w)
    return v2.functional.resize(image, [h, w], interpolation, antialias=True)


class CentreCrop:
    """MAE's evaluation: 7/8 of an image, its centre, up to 224 px; all of its short side above that (MAE's released
    code). Non-square sizes: as much as covers (h, w)."""

    # DIFF: an image that has the size of evaluation already is neither enlarged nor cropped.
    def __init__(self, size, interpolation):
        self.size, self.interpolation = tuple(size), interpolation
        self.cover = [s * 256 // 224 if max(size) <= 224 else s for s in size]

    def __call__(self, image):
        if tuple(image.shape[-2:]) == self.size:
            return image
        return v2.functional.center_crop(cover(image, self.cover, self.interpolation), self.size)


class TwoViews:
    """Two independent draws of one image, uint8 (C, h, w) -> (2, C, *img_size), the second one with its colours
    jittered, brightness, contrast, saturation and hue by up to `jitter`, in four of five images (LUT's released code).
    Channels other than RGB have no hue: their brightness and contrast are jittered, every channel by the same factors.

    `share_first`: the first step draws nothing, and is done once for both.
    """

    def __init__(self, steps, share_first, jitter, in_chans):
        if min(jitter) < 0 or max(jitter) > 1 or jitter[3] > 0.5:
            raise ValueError(f"--view_jitter takes four numbers in [0, 1], the last in [0, 0.5], not {jitter}")
        self.once, self.each = steps[:share_first], v2.Compose(steps[share_first:])
        self.rgb = in_chans == 3
        self.jitter = v2.RandomApply([v2.ColorJitter(*jitter if self.rgb else jitter[:2])], 0.8)

    def __call__(self, image):
        for step in self.once:
            image = step(image)
        one, two = self.each(image), self.each(image)
        two = self.jitter(two) if self.rgb else self.jitter(two[:, None])[:, 0]  # (C, h, w), as C grey images
        return torch.stack([one, two])  # (2, C, h, w)


def blur(imgs, sigma):
    """Every image (B, C, H, W) with a Gaussian of its own standard deviation, sigma (B,): rows, then columns, each as a
    product with a matrix whose lines are the Gaussian around one pixel, as far as it lies in the image, with sum 1."""
    def weights(n):
        offset = torch.arange(n, device=imgs.device) - torch.arange(n, device=imgs.device)[:, None]  # (n, n)
        return (offset.square() / (-2 * sigma.square()[:, None, None, None])).softmax(dim=3)  # (B, 1, n, n)

    return weights(imgs.shape[2]) @ imgs @ weights(imgs.shape[3]).mT  # (B, C, H, W)


@torch.no_grad()
def three_augment(imgs, noise):
    """Each normalised image (B, C, H, W) in grey, solarized from half brightness up, or blurred by 0.1 to 2 pixels
    (DeiT III, as LUT uses it), in fp32. noise (B, 2), uniform in [0, 1), tells which, and how far it is blurred.
    Channels other than RGB are solarized or blurred."""
    mean, std = mean_std(imgs.shape[1], imgs.device)
    with torch.autocast(imgs.device.type, enabled=False):
        pixels = imgs.float() * std + mean  # in [0, 1]
        # DIFF: LUT's second view is blurred by a Gaussian itself; Pillow, in its released code, takes box filters.
        kinds = [v2.functional.solarize(pixels, 0.5), blur(pixels, 0.1 + 1.9 * noise[:, 1])]
        if imgs.shape[1] == 3:
            kinds.append(v2.functional.rgb_to_grayscale(pixels, num_output_channels=3))
        which = (noise[:, 0] * len(kinds)).long()  # (B,)
        pixels = torch.stack(kinds)[which, torch.arange(len(imgs), device=imgs.device)]  # (B, C, H, W)
        return (pixels - mean) / std


# What a script's Config need not have.
DEFAULTS = {"crop_ratio": (3 / 4, 4 / 3), "interpolation": "bicubic", "shift": 0, "labels": 0, "rand_augment": False,
            "color_jitter": 0.0, "random_erasing": 0.0, "crop": "random_resized", "view_jitter": None}


def with_defaults(cfg):
    return collections.ChainMap(vars(cfg), DEFAULTS)


def augmentation(o):
    """The training transforms that the options `o` (a mapping) ask for: uint8 (C, h, w) -> uint8 (C, *img_size), or
    (2, C, *img_size) if they ask for two views."""
    for name in ("rand_augment", "color_jitter"):
        if o[name] and o["in_chans"] not in (1, 3):
            raise ValueError(f"--{name} knows grey and RGB, not --in_chans {o['in_chans']}")
    size, cubic = tuple(o["img_size"]), v2.InterpolationMode(o["interpolation"])
    first = v2.Resize(size, cubic)  # returns what has the right size already
    if o["crop"] == "simple":
        first = functools.partial(cover, size=size, interpolation=cubic)
    elif tuple(o["crop_scale"]) != (1, 1):
        first = v2.RandomResizedCrop(size, tuple(o["crop_scale"]), tuple(o["crop_ratio"]), cubic)
    steps = [first]
    if o["shift"] or o["crop"] == "simple":
        steps.append(v2.RandomCrop(size, padding=o["shift"], padding_mode="reflect"))
    if o["flip"]:
        steps.append(v2.RandomHorizontalFlip(o["flip"]))
    if o["rand_augment"]:
        # DIFF: RandAugment is torchvision's. timm's rand-m9-mstd0.5-inc1, which recipes name, applies each operation
        # with p 0.5, varies its magnitude by normal noise, and knows Invert and SolarizeAdd. Magnitude 9 of 11 bins is
        # its strength (rotation by 27 degrees); 9 of torchvision's 31 would be a third of it.
        fill = (mean_std(o["in_chans"])[0] * 255).round().flatten().tolist()
        steps.append(v2.RandAugment(2, 9, num_magnitude_bins=11, interpolation=BILINEAR, fill=fill))
    if o["color_jitter"]:
        steps.append(v2.ColorJitter(*[o["color_jitter"]] * 3))  # brightness, contrast, saturation
    if o["random_erasing"]:
        steps.append(RandomErasing(o["random_erasing"], scale=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3), value="random"))
    if o["view_jitter"] is None:
        return v2.Compose(steps)
    return TwoViews(steps, o["crop"] == "simple", o["view_jitter"], o["in_chans"])


def always_alike(cfg):
    """Does training see an image as the same pixels in every epoch?"""
    o = with_defaults(cfg)
    random = ("shift", "flip", "rand_augment", "color_jitter", "random_erasing")
    return tuple(o["crop_scale"]) == (1, 1) and not any(o[name] for name in random)


# Five strengths, those of ImageNet-C for 224 px (Hendrycks & Dietterich, 2019): standard deviation of noise; of blur,
# in pixels of an image of 224; share of the contrast that is left; share of the pixels of a side that are left.
CORRUPTIONS = {"noise": (0.08, 0.12, 0.18, 0.26, 0.38), "blur": (1, 2, 3, 4, 6), "contrast": (0.4, 0.3, 0.2, 0.1, 0.05),
               "pixelate": (0.6, 0.5, 0.4, 0.3, 0.25)}


def corruption(kind, strength, size):
    """A transform that spoils uint8 images (C, *size), grey or RGB: a kind of CORRUPTIONS at a strength from 0 to 4."""
    amount = CORRUPTIONS[kind][strength]
    if kind == "noise":
        return v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.GaussianNoise(sigma=amount),
                           v2.ToDtype(torch.uint8, scale=True)])
    if kind == "blur":
        sigma = amount * min(size) / 224
        return v2.GaussianBlur(2 * math.ceil(3 * sigma) + 1, sigma)
    if kind == "contrast":
        return v2.ColorJitter(contrast=(amount, amount))
    small = [max(1, round(amount * n)) for n in size]
    return v2.Compose([v2.Resize(small, BILINEAR), v2.Resize(size, v2.InterpolationMode.NEAREST)])


def mix(imgs, targets, cfg, seed):
    """Mixup (Zhang et al., 2018) or cutmix (Yun et al., 2019) with one ratio for the whole global batch.

    imgs (B, C, H, W), targets (B, K) one-hot -> the same shapes. Images at positions 2i and 2i + 1 are each
    other's partners, so that no process needs an image that another one holds. torchvision's transforms mix an image
    with the next of its batch: handing over all first and all second partners as a "batch" of two does just that.
    """
    kinds = {v2.MixUp: cfg.mixup, v2.CutMix: cfg.cutmix}
    choices = [kind(alpha=alpha, num_classes=2) for kind, alpha in kinds.items() if alpha > 0]
    if not choices:
        return imgs, targets
    # DIFF: partners in mixup and cutmix are neighbours; timm pairs the first image of a batch with the last.
    B, C, H, W = imgs.shape
    if B % 2:  # the last image of a short batch is its own partner
        imgs, targets = (torch.cat([x, x[-1:]]) for x in (imgs, targets))  # (B + 1, ...)
        return tuple(x[:B] for x in mix(imgs, targets, cfg, seed))
    pairs = imgs.view(B // 2, 2, C, H, W).transpose(0, 1).reshape(2, -1, H, W)  # (2, B/2 * C, H, W)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pairs, share = v2.RandomChoice(choices)(pairs, torch.arange(2, device=imgs.device))  # share (2, 2)
    imgs = pairs.view(2, B // 2, C, H, W).transpose(0, 1).reshape(B, C, H, W)  # (B, C, H, W)
    partners = targets.view(B // 2, 2, -1).flip(1).view(B, -1)  # (B, K)
    return imgs, share[0, 0] * targets + share[0, 1] * partners
