"""Figures about methods and encoders, each a command that writes OUT.json and OUT.png.

    python -m tools.analyze hog_stability --data shapes --out results/hog_stability_shapes

hog_stability: how much do FastMIM's targets change when the same image comes at a lower resolution, or with noise? (The
paper shows it on a few images, as PSNR, and does not say how it was computed.)
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.transforms import v2

import data
import fastmim
import models
from common import figures
from common.options import user_errors
from common.transforms import mean_std


def hog_map(imgs):
    return fastmim.hog(imgs, 8)  # (B, 9*C, H/8, W/8)


def norm_pixels_map(imgs):
    """Pixels (B, C, H, W), those of every 16x16 patch to mean 0 and std 1."""
    patches = models.patchify(imgs, 16)  # (B, N, 16*16*C)
    mean, std = models.patch_statistics(patches)
    return models.unpatchify((patches - mean) / std, 16, [n // 16 for n in imgs.shape[2:]])


TARGETS = {"pixels": lambda imgs: imgs, "norm_pixels": norm_pixels_map, "hog": hog_map}  # normalised images -> maps


def change(found, target):
    """{share: of the variance of a target (B, K, h, w) that another one misses; psnr: dB, for the target's range}.
    A share does not depend on the units of a target, a PSNR does on how its values spread within their range."""
    error = (found - target).square().mean()
    spread = (target - target.mean(dim=(0, 2, 3), keepdim=True)).square().mean()
    psnr = 10 * torch.log10((target.max() - target.min()).square() / error.clamp(min=1e-12))
    return {"share": round((error / spread).item(), 4), "psnr": round(psnr.item(), 2)}


def resize(imgs, side):
    return v2.functional.resize(imgs, [side, side], v2.InterpolationMode.BICUBIC, antialias=True)


def hog_stability(args):
    """Three ways to change an image: give it in another size, and bring its targets to the same grid; give it in
    another size and back, so that only detail is lost; add normal noise, of so many of 255 levels."""
    if args.size % 16 or args.size < 48 or args.images < 1:
        raise ValueError(f"--size takes a multiple of 16 from 48 on, and --images 1 or more, not {args.size} and "
                         f"{args.images}")
    full = args.size
    sizes = [side for side in range(full * 3 // 7 // 16 * 16, full, 16)]  # from 96 for 224
    source = data.open_source(args.data, "train", 3, False, "data", False)
    crop = data.CentreCrop((full, full), v2.InterpolationMode.BICUBIC)
    count = min(args.images, len(source))
    imgs = torch.stack([crop(source.load(i * len(source) // count)[0]) for i in range(count)])  # (B, 3, H, W)
    imgs = data.normalize(imgs)
    noise = torch.randn(imgs.shape, generator=torch.Generator().manual_seed(0))
    levels = noise / (255 * mean_std(3)[1])  # one of 255, in normalised pixels
    results = {}
    for name, target in TARGETS.items():
        exact = target(imgs)
        grid = exact.shape[2:]
        small = {side: F.interpolate(target(resize(imgs, side)), grid, mode="bicubic") for side in sizes}
        back = {side: target(resize(resize(imgs, side), full)) for side in sizes}
        noisy = {std: target(imgs + std * levels) for std in (2, 4, 8, 16, 32)}
        ways = {"another size": small, "another size and back": back, "noise": noisy}
        results[name] = {way: {k: change(found, exact) for k, found in maps.items()} for way, maps in ways.items()}
    about = {"data": Path(args.data).name, "images": count, "full_size": full, "hog_cell": 8, "patch": 16}
    write(args.out, {"about": about, "targets": results})
    figures.stability(f"{args.out}.png", results, f"{count} images of {about['data']}, {full} px")


def write(out, content):
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(f"{out}.json").write_text(json.dumps(content, indent=1) + "\n")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("hog_stability", help=hog_stability.__doc__)
    command.set_defaults(run=hog_stability)
    command.add_argument("--data", default="shapes", help="shapes, or a folder of images")
    command.add_argument("--out", default="results/hog_stability_shapes", help="path without ending")
    command.add_argument("--size", type=int, default=224, help="full size in pixels, a multiple of 16")
    command.add_argument("--images", type=int, default=64, help="how many, evenly spaced over the data set")
    args = parser.parse_args(argv)
    with user_errors():
        args.run(args)


if __name__ == "__main__":
    main()
