"""JPEG files as they are in most data sets, decoded without the copies that Pillow makes. All others are Pillow's."""

import functools
import io
import re
import warnings

import numpy as np
import PIL
import torch
import torchvision
from PIL import Image

MODES = {"L": "GRAY", "RGB": "RGB"}  # Pillow's name of what is in a file: torchvision's
# What is in a scan beside numbers, but for stuffed zeros, restarts and padding. In a whole file of one scan, this is
# the end of the image.
MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
END_OF_IMAGE = b"\xff\xd9"


def torchvision_decode(data, mode):
    """bytearray of a JPEG file -> uint8 (C, h, w), its bytes in the order (h, w, C). RuntimeError if it is refused.
    Damage that libjpeg repairs is no error: it prints a line to stderr, and gives the pixels that Pillow gives."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        io_mode = torchvision.io.ImageReadMode[MODES[mode]]
        return torchvision.io.decode_jpeg(torch.frombuffer(data, dtype=torch.uint8), io_mode)


@functools.cache
def has_torchvision():
    """Does the installed torchvision decode JPEG? A build may lack it, and later versions leave it to torchcodec."""
    sample = io.BytesIO()
    Image.new("RGB", (8, 8), "white").save(sample, "JPEG")
    try:
        return torchvision_decode(bytearray(sample.getvalue()), "RGB").shape == (3, 8, 8)
    except (AttributeError, RuntimeError):
        return False


def decoder():
    """Name and version of what decodes most JPEG files here. Others may round a pixel to another number."""
    return f"torchvision {torchvision.__version__}" if has_torchvision() else f"Pillow {PIL.__version__}"


def decode(image):
    """uint8 (h, w, C) of a file that Pillow has just opened, as it lies in the file; or None if Pillow is to decode it,
    or to refuse it. That is all but grey and RGB JPEGs of one scan (progressive ones have several) which is whole."""
    if image.format != "JPEG" or image.mode not in MODES or not has_torchvision():
        return None

    begin = image.fp.tell()  # Pillow has read the header. An earlier place would find the header's markers: None
    image.fp.seek(0)
    data = bytearray(image.fp.read())
    marker = MARKER.search(data, begin)
    if marker is None or marker[0] != END_OF_IMAGE:
        return None
    try:
        array = torchvision_decode(data, image.mode).permute(1, 2, 0).numpy()  # (h, w, C)
    except RuntimeError:  # Pillow finds out why
        return None
    return array if array.shape[:2] == (image.height, image.width) else None


def upright(array, turn):
    """(h, w, C), turned and mirrored as its EXIF orientation says, 1 to 8."""
    if turn >= 5:
        array = array.swapaxes(0, 1)  # (w, h, C)
    rows = -1 if turn in (3, 4, 7, 8) else 1
    columns = -1 if turn in (2, 3, 6, 7) else 1
    return np.ascontiguousarray(array[::rows, ::columns])
