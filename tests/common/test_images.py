"""images.py: every kind of image file is decoded exactly, or refused in one line."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common import images


def write(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_modes(tmp_path, mode):
    """A picture of one opaque colour comes back as that colour from every mode, in 1, 3 and 4 channels."""
    grey = mode in ("1", "L", "LA")
    colour = (255, 255, 255) if grey else (204, 102, 51)  # of the web palette
    path = str(tmp_path / ("a.tif" if mode == "CMYK" else "a.png"))
    Image.new("RGB", (8, 6), colour).convert(mode).save(path)
    rgb = images.decode(path, 3)
    assert rgb.shape == (3, 6, 8) and rgb.dtype == torch.uint8
    assert (rgb.float() - torch.tensor(colour).view(3, 1, 1)).abs().max() <= 3
    luma = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
    assert (images.decode(path, 1).float() - luma).abs().max() <= 3 and images.decode(path, 1).shape == (1, 6, 8)
    assert images.decode(path, 4).shape == (4, 6, 8) and images.decode(path, 4)[3].min() == 255


def test_transparency_is_white_and_kept_in_four_channels(tmp_path):
    array = np.zeros((4, 4, 4), np.uint8)
    array[:, 2:] = (10, 20, 30, 255)
    path = str(write(tmp_path / "a.png", array))
    assert images.decode(path)[:, :, :2].min() == 255 and images.decode(path)[:, 0, 3].tolist() == [10, 20, 30]
    assert images.decode(path, 1)[0, 0, 0] == 255 and images.decode(path, 4)[3, 0].tolist() == [0, 0, 255, 255]


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm"])
def test_sixteen_bits_are_scaled(tmp_path, name):
    values = np.array([[0, 257, 128 * 257, 65535]], np.uint16)
    path = str(write(tmp_path / name, values))
    assert images.decode(path, 1)[0, 0].tolist() == [0, 1, 128, 255]
    assert images.decode(path, 3)[2, 0].tolist() == [0, 1, 128, 255]


def test_float_tiff_and_range(tmp_path):
    good, bad = (str(write(tmp_path / f"{v}.tif", np.array([[0, 0.5, v]], np.float32))) for v in (1.0, 3.0))
    assert images.decode(good, 1)[0, 0].tolist() == [0, 128, 255]
    with pytest.raises(images.Broken, match="outside"):
        images.decode(bad, 1)


def test_npy(tmp_path):
    def stored(array):
        np.save(tmp_path / "a.npy", array, allow_pickle=True)
        return str(tmp_path / "a.npy")

    five = noise(6, 7, 5)
    assert torch.equal(images.decode(stored(five), 5), torch.from_numpy(five).permute(2, 0, 1))
    assert images.decode(stored(np.float32([[0, 1]])), 1).tolist() == [[[0, 255]]]
    assert images.decode(stored(np.uint16([[0, 65535]])), 1).tolist() == [[[0, 255]]]
    for array, why in ((five, "5 channels"), (np.array([object()]), "Python objects"), (np.zeros(3), "shape"),
                       (np.full((2, 2), np.nan), "outside"), (np.zeros((0, 4, 3), np.uint8), "shape")):
        with pytest.raises(images.Broken, match=why):
            images.decode(stored(array), 3)
    path = stored(noise(60, 70, 3))
    Path(path).write_bytes(Path(path).read_bytes()[:1000])
    with pytest.raises(images.Broken):
        images.decode(path, 3)


def test_exif_orientation(tmp_path):
    array = np.zeros((16, 32, 3), np.uint8)
    array[:, :16] = 255  # left half white
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise: white goes to the top
    image = images.decode(str(write(tmp_path / "a.jpg", array, exif=exif, quality=95)))
    assert image.shape == (3, 32, 16) and image[:, :14].min() > 240 and image[:, 18:].max() < 15


def test_large_jpegs_are_decoded_small_enough_but_not_too_small(tmp_path):
    path = str(write(tmp_path / "a.jpg", noise(400, 800, 3)))
    assert images.decode(path).shape == (3, 400, 800)
    assert images.decode(path, min_side=200).shape == (3, 200, 400)
    assert images.decode(path, min_side=201).shape == (3, 400, 800)


@pytest.mark.parametrize("side", [9_600, 14_000])  # Pillow only warns about the first, refuses the second
def test_bombs_are_refused_before_they_are_decoded(tmp_path, side, monkeypatch):
    path = tmp_path / "bomb.png"
    Image.new("1", (side, side)).save(path)
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", lambda self: pytest.fail("decoded"))
    with pytest.raises(images.Broken, match=r"bomb\.png: DecompressionBomb"):
        images.decode(str(path))


def test_files_are_read_only_as_image_formats(tmp_path):
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    with pytest.raises(images.Broken, match="UnidentifiedImageError"):
        images.decode(str(tmp_path / "a.png"))
