"""Is a histogram of gradients the more stable target? FastMIM's paper (Figures 3, 8, 9) compares targets of an image
with those of a smaller copy, by SSIM and PSNR, and does not say how either was resized. So here the way of resizing is
part of every number.

A target is a grid of 16x16 cells at any size: a cell covers the same part of the image (14 px of 224, 8 px of 128).
"""

import torch
import torch.nn.functional as F
from torchvision.transforms import v2

import data
import fastmim
from common import figures, layers, transforms
from tools.analysis_figures import MAP, colour, panels, tidy

CELLS = 16  # a side; 8 px at FastMIM's 128
PATCHES = 8  # a side, of normalised pixels; FastMIM's 16 px at 128
STROKE = 14  # pixels of a cell in a picture of HOG
LEVELS = (2, 4, 8, 16, 32)  # of 255: standard deviation of noise

RESAMPLING = {  # name: arguments of F.interpolate
    "bicubic antialiased": {"mode": "bicubic", "antialias": True},
    "bilinear": {"mode": "bilinear"},
    "area": {"mode": "area"},
    "nearest": {"mode": "nearest"}}

SHARE, SSIM, PSNR = "change, per cent of the variance", "SSIM of pictures", "PSNR of pictures, dB"
NOISE = f"{SHARE}, noise of so many of 255 levels"
WINS = "images on which HOG is more alike"


# ---------------------------------------- Targets of images (B, 3, H, H) in [0, 1]

def resize(imgs, side, method):
    """Square images (B, C, H, H) -> (B, C, side, side)."""
    return F.interpolate(imgs, (side, side), **RESAMPLING[method])


def normalized(imgs):
    mean, std = transforms.mean_std(3)
    return (imgs - mean) / std


def hog(imgs):
    """Histograms of 16x16 cells, (B, 27, 16, 16)."""
    return fastmim.hog(normalized(imgs), imgs.shape[2] // CELLS)


def norm_pixels(imgs):
    """Pixels (B, 3, H, H), those of each of 8x8 patches to mean 0 and std 1."""
    patch = imgs.shape[2] // PATCHES
    patches = layers.patchify(normalized(imgs), patch)  # (B, 64, patch*patch*3)
    mean, std = layers.patch_statistics(patches)
    return layers.unpatchify((patches - mean) / std, patch, (PATCHES, PATCHES))


# ---------------------------------------- How alike are two of them?

def change(found, target):
    """Which per cent of the variance of targets (B, K, h, w) others differ by; whatever the units."""
    error = (found - target).square().mean()
    variance = (target - target.mean(dim=(0, 2, 3), keepdim=True)).square().mean()
    return 100 * (error / variance).item()


def ssim(one, two):
    """Structural similarity (Wang et al., 2004) of grey pictures (B, 1, H, W) in [0, 1]: (B,). Gaussian windows of 11
    pixels with a standard deviation of 1.5, constants 0.01^2 and 0.03^2, only windows that lie inside."""
    place = torch.arange(11).double() - 5
    line = torch.exp(-place.square() / (2 * 1.5**2))
    line = line / line.sum()

    def smooth(picture):
        columns = F.conv2d(picture, line.view(1, 1, 11, 1))
        return F.conv2d(columns, line.view(1, 1, 1, 11))  # (B, 1, H - 10, W - 10)

    one, two = one.double(), two.double()
    mean_one, mean_two = smooth(one), smooth(two)
    var_one = smooth(one.square()) - mean_one.square()
    var_two = smooth(two.square()) - mean_two.square()
    covariance = smooth(one * two) - mean_one * mean_two
    alike = (2 * mean_one * mean_two + 0.01**2) * (2 * covariance + 0.03**2)
    largest = (mean_one.square() + mean_two.square() + 0.01**2) * (var_one + var_two + 0.03**2)
    return (alike / largest).mean(dim=(1, 2, 3))


def psnr(one, two):
    """Peak signal-to-noise ratio, in dB, of pictures (B, 1, H, W) in [0, 1]: (B,)."""
    error = (one.double() - two.double()).square().mean(dim=(1, 2, 3))
    return -10 * error.clamp(min=1e-12).log10()


MEASURES = {SSIM: ssim, PSNR: psnr}


# ---------------------------------------- The measurement

def grey(imgs):
    """Images as pictures (B, 1, H, W)."""
    return v2.functional.rgb_to_grayscale(imgs.clamp(0, 1))


def at_another_size(imgs, side):
    """{title: {"down, up": {column: number}}}: smaller copies of images, made by one way of resizing, against the
    images. Pixels are enlarged again, by another way maybe, to be compared; HOG has equally many cells at both sizes.
    """
    full, tables = imgs.shape[2], {f"{title}, {side} px": {} for title in (SHARE, SSIM, PSNR)}
    exact_hog, exact_norm = hog(imgs), norm_pixels(imgs)
    exact_pictures = figures.glyphs(exact_hog, size=STROKE), grey(imgs)
    for down in RESAMPLING:
        small = resize(imgs, side, down)
        small_hog, small_norm = hog(small), norm_pixels(small)
        hog_picture = figures.glyphs(small_hog, size=STROKE)  # (B, 1, 16 * STROKE, 16 * STROKE)
        alike = {title: measure(hog_picture, exact_pictures[0]) for title, measure in MEASURES.items()}  # each (B,)
        for up in RESAMPLING:
            enlarged = resize(small, full, up)
            row = f"down {down}, up {up}"
            tables[f"{SHARE}, {side} px"][row] = {
                "HOG": change(small_hog, exact_hog),
                "normalised pixels": change(resize(small_norm, full, up), exact_norm),
                "pixels": change(enlarged, imgs)}
            for title, measure in MEASURES.items():
                of_pixels = measure(grey(enlarged), exact_pictures[1])  # (B,)
                wins = (alike[title] > of_pixels).sum().item()
                tables[f"{title}, {side} px"][row] = {
                    "HOG": alike[title].mean().item(), "pixels": of_pixels.mean().item(), WINS: wins}
    return tables


def with_noise(imgs, seed):
    """{title: {target: {standard deviation: number}}}: images with normal noise of so many of 255 levels."""
    noise = torch.randn(imgs.shape, generator=torch.Generator().manual_seed(seed))
    rows = {}
    for name, target in {"HOG": hog, "normalised pixels": norm_pixels, "pixels": lambda imgs: imgs}.items():
        exact = target(imgs)
        rows[name] = {str(level): change(target(imgs + noise * level / 255), exact) for level in LEVELS}
    return {NOISE: rows}


def sizes_below(full):
    """Sizes of smaller copies: multiples of 16 from about 3/7 of the full size on."""
    step = max(16, full // 7 // 16 * 16)
    return [side for side in range(full * 3 // 7 // 16 * 16, full, step) if side >= 32]


def stability(source, full, count, seed=0):
    """The record of `count` images of a source, evenly spaced, at `full` pixels, without those that are broken.
    ValueError for other sizes."""
    if full % 16 or full < 48 or count < 1:
        raise ValueError(f"--size takes a multiple of 16 from 48 on, --images 1 or more, not {full} and {count}")
    count = min(count, len(source))
    crop = transforms.CentreCrop((full, full), v2.InterpolationMode.BICUBIC)
    dataset = data.Images(source, crop, seed, substitutes=0)
    indices = [i * len(source) // count for i in range(count)]
    whole = [imgs for imgs, _, _ in data.loader(dataset, [[(0, i, i)] for i in indices])]  # each uint8 (1, 3, H, H)
    if not whole:
        raise ValueError(f"none of {count} images can be read")
    imgs = torch.cat(whole) / 255  # (B, 3, H, H)
    tables = {}
    for side in sizes_below(full):
        tables |= at_another_size(imgs, side)
    tables |= with_noise(imgs, seed)
    results = {title: {row: {column: [float(f"{number:.4g}")] for column, number in cells.items()}
                       for row, cells in rows.items()} for title, rows in tables.items()}
    return {"results": results, "sizes": sizes_below(full), "full_size": full, "images": len(imgs)}


def draw(path, record):
    """SSIM over sizes; on how many images HOG is more alike, for every way to resize; and noise."""
    results, sizes, count = record["results"], record["sizes"], record["images"]
    save, (left, middle, right) = panels(3, 4.2, 3.6)
    for i, method in enumerate(RESAMPLING):
        cells = [results[f"{SSIM}, {side} px"][f"down {method}, up {method}"] for side in sizes]
        left.plot(sizes, [cell["HOG"][0] for cell in cells], "o-", color=colour(i), lw=1.4, ms=4, label=method)
        left.plot(sizes, [cell["pixels"][0] for cell in cells], "s--", color=colour(i), lw=1.2, ms=4, mfc="none")
    tidy(left, title="HOG (solid) and pixels (dashed)", xlabel="pixels of the smaller copy", ylabel=SSIM)
    left.set_xticks(sizes)
    left.legend(frameon=False, fontsize=7)

    side = min(sizes, key=lambda size: abs(size - record["full_size"] * 4 / 7))  # FastMIM's 128 of 224
    rows = results[f"{SSIM}, {side} px"]
    wins = [[rows[f"down {down}, up {up}"][WINS][0] for up in RESAMPLING] for down in RESAMPLING]
    middle.imshow(wins, cmap=MAP, vmin=0, vmax=count)
    for i, line in enumerate(wins):
        for j, number in enumerate(line):
            shade = "white" if number < count / 2 else "black"
            middle.text(j, i, f"{number:.0f}", ha="center", va="center", color=shade)
    middle.set_xticks(range(len(wins)), list(RESAMPLING), rotation=30, ha="right", fontsize=7)
    middle.set_yticks(range(len(wins)), list(RESAMPLING), fontsize=7)
    middle.set(title=f"HOG more alike by SSIM, of {count}", xlabel=f"up from {side} px", ylabel=f"down to {side} px")

    for i, (name, cells) in enumerate(results[NOISE].items()):
        levels, changes = [float(level) for level in cells], [values[0] for values in cells.values()]
        right.plot(levels, changes, "o-", color=colour(i), ms=4, label=name)
    tidy(right, title="noise", xlabel="standard deviation, of 255 levels", ylabel=SHARE, yscale="log")
    right.legend(frameon=False, fontsize=8)
    save(path)
