"""Picture files as they are: which ones are read, and what of them Pillow would cut off, turn over or leave out."""

import contextlib
import re
import sys
import warnings

import numpy as np
from PIL import Image

from common.folder import require_regular

# What is read, whatever a name says, if the installed Pillow can. Of the others that it knows, EPS runs programs.
SUFFIXES = Image.registered_extensions()  # {suffix: format}; this also loads all of Pillow
FORMATS = "JPEG JPEG2000 PNG BMP DIB GIF WEBP AVIF TIFF PPM TGA PCX QOI".split()
FORMATS = [name for name in FORMATS if name in Image.OPEN]
EXTENSIONS = (*sorted(suffix for suffix, name in SUFFIXES.items() if name in FORMATS), ".npy")

ORIENTATION = 0x0112  # EXIF
BITS, PHOTOMETRIC, SAMPLES, PLANES, EXTRA_SAMPLES = 258, 262, 277, 284, 338  # TIFF
COLOURS = {0: 1, 1: 1, 2: 3, 3: 1, 4: 1, 5: 4, 6: 3, 8: 3}  # numbers of a pixel, by PHOTOMETRIC


@contextlib.contextmanager
def opened(path):
    """The file as a lazy PIL image. Above 89 Mpx, where Pillow would only warn, this is an error. Pillow gets no path:
    version 13 would map an uncompressed TIFF, and scramble its pixels where EXIF turns it by 90 degrees. ValueError if
    it is a pipe or a device."""
    require_regular(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with open(path, "rb") as file, Image.open(file, formats=FORMATS) as image:
            yield image


def orientation(image):
    """How a picture lies in its file, by its EXIF tag: 1 for upright, up to 8."""
    tag = image.getexif().get(ORIENTATION, 1)
    return tag if tag in range(1, 9) else 1


def is_negative(image):
    """Is 0 white in it (MinIsWhite)? Pillow turns 8 bits over, and leaves more as they are."""
    return image.format == "TIFF" and image.tag_v2.get(PHOTOMETRIC) == 0 and image.mode[0] in "IF"


def unknown_bands(image):
    """How many numbers a pixel has, if some are neither colour nor, as the file says, transparency: infrared, say. Else
    0. Pillow leaves them out, or takes them for transparency."""
    if image.format != "TIFF":
        return 0
    samples, extra = image.tag_v2.get(SAMPLES, 1), image.tag_v2.get(EXTRA_SAMPLES, ())
    has_alpha = extra[:1] in ((1,), (2,))
    known = COLOURS.get(image.tag_v2.get(PHOTOMETRIC), samples) + has_alpha
    return 0 if samples == known else samples


def numbers(image, path):
    """The numbers (h, w) or (h, w, C) of a picture, opened at `path`, whose file has more than 8 bits for each, else
    None. ValueError where Pillow gives 8 of them at most."""
    codec, _, _, arguments = image.tile[0] if image.tile else ("", None, 0, None)
    layout, *more = arguments if isinstance(arguments, tuple) else (arguments,)  # RGB;16B, ...
    maximum = more[0] if codec.startswith("ppm") else 255  # that the header of a PPM file names
    bits = jpeg2000_bits(path) if image.format == "JPEG2000" else 8
    if image.mode[0] in "IF":
        require_opaque(image)
        array = np.array(image)
        if codec.startswith("ppm") and image.mode == "I":  # Pillow has scaled it to 65535
            array = np.rint(array * (maximum / 65535)).astype(np.uint16)
        if image.format == "JPEG2000":  # Pillow has shifted it up to 16 bits
            array >>= max(0, 16 - bits)
        return array

    found = re.fullmatch(r"(\w+);16([LBN])", str(layout))
    in_planes = has_wide_planes(image)
    if found and found[1] in ("RGB", "RGBA") and not in_planes:
        require_opaque(image)
        return both_bytes(image, path, found[1], found[2])
    if found or in_planes or maximum > 255 or bits > 8:
        raise ValueError("more than 8 bits in several channels, of which Pillow gives 8: convert it to PNG, or to .npy")
    return None


def require_opaque(image):
    """ValueError if one of its colours stands for transparency, as in a PNG: beside numbers, Pillow leaves that out."""
    if "transparency" in image.info:
        raise ValueError("more than 8 bits, and a colour that stands for transparency: convert it to RGBA, or to .npy")


def has_wide_planes(image):
    """Does a TIFF hold each channel by itself, with more than 8 bits for a number? Pillow takes these bytes for 8 bits
    each, or one byte of two."""
    return image.format == "TIFF" and image.tag_v2.get(PLANES) == 2 and max(image.tag_v2.get(BITS, (1,))) > 8


def both_bytes(image, path, colours, order):
    """(h, w, C) uint16 of a picture of 16 bits, of which Pillow keeps the high bytes. Opened with bytes swapped, it
    keeps the low ones."""
    high = np.array(image)  # (h, w, C)
    if order == "N":
        order = "L" if sys.byteorder == "little" else "B"
    swapped = f"{colours};16{'B' if order == 'L' else 'L'}"
    with opened(path) as again:
        tiles = []
        for tile in again.tile:
            arguments = swapped if isinstance(tile.args, str) else (swapped, *tile.args[1:])
            tiles.append(tile._replace(args=arguments))
        again.tile = tiles
        low = np.array(again)  # (h, w, C)
    return high.astype(np.uint16) * 256 + low


def jpeg2000_bits(path):
    """Bits of the first channel, from the header of the code stream (ISO 15444-1, A.5.1)."""
    with open(path, "rb") as file:
        start = file.read(100_000)
    size = start.find(b"\xff\x4f\xff\x51") + 2
    return (start[size + 40] & 0x7F) + 1
