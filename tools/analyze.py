"""Figures about methods and encoders, each a command that writes OUT.json and OUT.png.

    python -m tools.analyze hog_stability --data shapes --size 64 --out runs/hog_stability_shapes

hog_stability: how much do FastMIM's targets change when the same image comes at a lower resolution, or with noise? (The
paper shows it on a few images, as PSNR, and does not say how it was computed.)
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.transforms import v2

import data
import fastmim
from common import figures, layers, transforms
from common.config import user_errors
from tools import runner


def norm_pixels_map(imgs):
    """Pixels (B, C, H, W), those of every 16x16 patch to mean 0 and std 1."""
    patches = layers.patchify(imgs, 16)  # (B, N, 16*16*C)
    mean, std = layers.patch_statistics(patches)
    return layers.unpatchify((patches - mean) / std, 16, [n // 16 for n in imgs.shape[2:]])


# normalised images -> maps; those of hog (B, 9*C, H/8, W/8)
TARGETS = {"pixels": lambda imgs: imgs, "norm_pixels": norm_pixels_map, "hog": lambda imgs: fastmim.hog(imgs, 8)}


def change(found, target):
    """{share: of the variance of a target (B, K, h, w) that another one misses; psnr: dB, for the target's range}.
    A share does not depend on the units of a target, a PSNR does on how its values lie within their range."""
    error = (found - target).square().mean()
    variance = (target - target.mean(dim=(0, 2, 3), keepdim=True)).square().mean()
    psnr = 10 * torch.log10((target.max() - target.min()).square() / error.clamp(min=1e-12))
    return {"share": round((error / variance).item(), 4), "psnr": round(psnr.item(), 2)}


def resize(imgs, side):
    return v2.functional.resize(imgs, [side, side], v2.InterpolationMode.BICUBIC, antialias=True)


def hog_stability(args):
    """Three ways to change an image: give it in another size, and bring its targets to the same grid; give it in
    another size and back, so that only detail is lost; add normal noise, of so many of 255 levels."""
    full = args.size
    if full % 16 or full < 48 or args.images < 1:
        raise ValueError(f"--size takes a multiple of 16 from 48 on, --images 1 or more, not {full} and {args.images}")
    sizes = [side for side in range(full * 3 // 7 // 16 * 16, full, 16)]  # from 96 for 224
    source = data.open_source(args.data, "train", 3, False, "data", False)
    crop = transforms.CentreCrop((full, full), v2.InterpolationMode.BICUBIC)
    count = min(args.images, len(source))
    imgs = torch.stack([crop(source.load(i * len(source) // count)[0]) for i in range(count)])  # (B, 3, H, W)
    imgs = transforms.normalize(imgs)
    noise = torch.randn(imgs.shape, generator=torch.Generator().manual_seed(0))
    levels = noise / (255 * transforms.mean_std(3)[1])  # one of 255, in normalised pixels

    results = {}  # {measure after way: {target: {size or std: values}}}
    for name, target in TARGETS.items():
        exact = target(imgs)
        grid = exact.shape[2:]
        small = {side: F.interpolate(target(resize(imgs, side)), grid, mode="bicubic") for side in sizes}
        back = {side: target(resize(resize(imgs, side), full)) for side in sizes}
        noisy = {std: target(imgs + std * levels) for std in (2, 4, 8, 16, 32)}
        for way, maps in {"another size": small, "another size and back": back, "noise": noisy}.items():
            for key, found in maps.items():
                for measure, value in change(found, exact).items():
                    results.setdefault(f"{measure}, {way}", {}).setdefault(name, {})[str(key)] = [value]

    about = {"data": Path(args.data).name, "images": count, "full_size": full, "hog_cell": 8, "patch": 16}
    command = f"python -m tools.analyze hog_stability --data {about['data']} --size {full} --images {args.images}"
    threads = torch.get_num_threads()
    record = runner.new_record("hog_stability", [command], [0], threads, about=about, results=results)
    runner.write(f"{args.out}.json", record)
    draw(f"{args.out}.png", results, f"{count} images of {about['data']}, {full} px")


def draw(path, results, title):
    """A panel for every way to change an image: how much of each target changes."""
    ways = {name.removeprefix("share, "): rows for name, rows in results.items() if name.startswith("share")}
    figure, save = figures.new_figure(3.4 * len(ways), 3.2)
    for axis, (way, rows) in zip(figure.subplots(1, len(ways), sharey=True), ways.items(), strict=True):
        for target, cells in rows.items():
            percent = [100 * values[0] for values in cells.values()]
            axis.plot([float(key) for key in cells], percent, ".-", label=target)
        axis.set(title=way, xlabel="std, of 255 levels" if way == "noise" else "pixels", yscale="log")
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("change, % of the target's variance")
    figure.axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10)
    save(path)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["hog_stability"])
    parser.add_argument("--data", default="shapes", help="shapes, or a folder of images")
    parser.add_argument("--out", default="runs/hog_stability", help="path without ending")
    parser.add_argument("--size", type=int, default=224, help="full size in pixels, a multiple of 16")
    parser.add_argument("--images", type=int, default=64, help="how many, evenly spaced over the data set")
    args = parser.parse_args(argv)
    with user_errors():
        hog_stability(args)


if __name__ == "__main__":
    main()
