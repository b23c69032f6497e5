"""jpeg.py against its referee, Pillow: the same pixels, turned alike, and the same files refused."""

import io
import re

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from common import images, jpeg

needs_torchvision = pytest.mark.skipif(not jpeg.has_torchvision(), reason="this torchvision decodes no JPEG")


@pytest.fixture
def used(monkeypatch):
    """A list that gets an entry for each file that torchvision has decoded."""
    jpeg.has_torchvision()  # which tries it once
    real, entries = jpeg.torchvision_decode, []

    def counted(data, mode):
        array = real(data, mode)
        entries.append(mode)
        return array

    monkeypatch.setattr(jpeg, "torchvision_decode", counted)
    return entries


def picture(h, w, mode="RGB", seed=0):
    """Smooth colours with edges and a little noise, as photographs have."""
    draw = np.random.default_rng(seed)
    rows, columns = np.mgrid[:h, :w]
    waves = [np.sin(rows / (3 + i) + i) + np.cos(columns / (5 + i)) for i in range(3)]
    array = np.stack(waves, axis=2) * 50 + 128 + draw.normal(0, 8, (h, w, 3))
    array[h // 3 : h // 2, w // 4 : w // 2] = (250, 10, 60)
    return Image.fromarray(array.clip(0, 255).astype(np.uint8)).convert(mode)


def encoded(size=(48, 64), mode="RGB", seed=0, turn=None, **options):
    """The bytes of a JPEG file."""
    exif, file = Image.Exif(), io.BytesIO()
    if turn:
        exif[0x0112] = turn
    picture(*size, mode, seed).save(file, "JPEG", exif=exif, **options)
    return file.getvalue()


def pillow(path, in_chans):
    """What Pillow makes of a file, or None if it refuses it."""
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            array = np.array(image.convert({1: "L", 3: "RGB"}[in_chans]))
    except Exception:
        return None
    return torch.from_numpy(array.reshape(*array.shape[:2], -1)).permute(2, 0, 1)


def compare(tmp_path, data, in_chans=3):
    """Is a file decoded? The assertion is that Pillow does the same, with the same pixels."""
    path = tmp_path / "a.jpg"
    path.write_bytes(data)
    expected = pillow(path, in_chans)
    try:
        found = images.decode(str(path), in_chans)
    except images.Broken:
        assert expected is None
        return False
    assert expected is not None and found.shape == expected.shape and found.dtype == torch.uint8
    assert (found.float() - expected.float()).abs().mean() < 1.5
    return True


SIZES = [(1, 1), (7, 5), (8, 16), (33, 17), (120, 161)]
PLAIN = {"444": {"subsampling": 0}, "422": {"subsampling": 1}, "420": {"subsampling": 2},
         "optimized": {"optimize": True}, "restarts": {"restart_marker_blocks": 3}, "low": {"quality": 5},
         "high": {"quality": 100}, "no YCbCr": {"keep_rgb": True}, "comment": {"comment": b"\xff\xd9 \xff\xda"}}


@needs_torchvision
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("options", PLAIN.values(), ids=PLAIN)
def test_ordinary_files_have_the_pixels_of_pillow(tmp_path, used, size, mode, options):
    if mode == "L":
        options = {name: value for name, value in options.items() if name not in ("subsampling", "keep_rgb")}
    assert compare(tmp_path, encoded(size, mode, **options), in_chans=len(mode))
    assert used == [mode]


@needs_torchvision
@pytest.mark.parametrize("turn", range(10))
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_files_are_turned_as_pillow_turns_them(tmp_path, used, turn, mode):
    """0 and 9 are no orientations."""
    assert compare(tmp_path, encoded((24, 40), mode, turn=turn, quality=95), in_chans=len(mode))
    assert used == [mode]


@pytest.mark.parametrize("mode,in_chans,options", [
    ("RGB", 3, {"progressive": True}), ("L", 1, {"progressive": True}), ("CMYK", 3, {}), ("CMYK", 1, {}),
    ("L", 3, {}), ("RGB", 1, {})])
def test_what_is_unusual_is_left_to_pillow(tmp_path, used, mode, in_chans, options):
    for seed, size in enumerate(SIZES):
        assert compare(tmp_path, encoded(size, mode, seed, turn=6, **options), in_chans)
    assert not used


def test_twelve_bits_are_refused(tmp_path, used):
    data = bytearray(encoded())
    data[data.index(b"\xff\xc0") + 4] = 12
    assert not compare(tmp_path, bytes(data)) and not used


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 2}, {"turn": 6}],
                         ids=["baseline", "progressive", "restarts", "turned"])
def test_truncated_files_are_refused_wherever_they_end(tmp_path, used, options):
    data = encoded((90, 120), **options)
    for cut in [*range(0, len(data), len(data) // 10), len(data) - 2, len(data) - 1]:
        assert not compare(tmp_path, data[:cut]), cut
    assert not used


@needs_torchvision
def test_what_stands_behind_the_image_does_not_count(tmp_path, used):
    data = encoded()
    for tail in (b"", b"\0\0\0", b"\xff\xd8\xff\xe0 another image", data):
        assert compare(tmp_path, data + tail)
    assert compare(tmp_path, data[:-2] + b"\xff\xff\xff\xd9")  # padding before the end
    assert len(used) == 5


def test_half_a_scan_that_ends_as_a_file_does(tmp_path):
    """libjpeg fills up what is missing, and both decoders let it."""
    data = encoded((90, 120))
    for share in (0.5, 0.7, 0.9):
        compare(tmp_path, data[: int(share * len(data))] + b"\xff\xd9")


def test_markers_within_a_scan_are_left_to_pillow(tmp_path, used):
    """libjpeg may skip over what follows them, to the end of the file and beyond it: Pillow refuses that."""
    data = encoded((90, 120))
    middle = (data.index(b"\xff\xda") + len(data)) // 2
    for marker in (b"\xff\xe5\xff\xf0", b"\xff\xc4\x00\x04", b"\xff\xda", b"\xff\xfe\x00\x02", b"\xff\xd8"):
        compare(tmp_path, data[:middle] + marker + data[middle:])
        compare(tmp_path, data[:-2] + marker + data[-2:])
    assert not used


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 2}, {"mode": "L"}],
                         ids=["baseline", "progressive", "restarts", "grey"])
def test_flipped_bits_do_to_both_the_same(tmp_path, options):
    """In the header, where most are fatal, and in the numbers, where few are."""
    data, draw = encoded((60, 80), **options), np.random.default_rng(0)
    scan, decoded = data.index(b"\xff\xda"), 0
    for place in [*draw.integers(0, scan, 60), *draw.integers(scan, len(data), 120)]:
        damaged = bytearray(data)
        damaged[place] ^= 1 << int(draw.integers(8))
        decoded += compare(tmp_path, bytes(damaged), in_chans=1 if options.get("mode") == "L" else 3)
    assert 60 < decoded < 180


def test_what_torchvision_refuses_is_left_to_pillow(tmp_path, monkeypatch):
    def refuse(data, mode):
        raise RuntimeError("arithmetic coding")

    jpeg.has_torchvision()
    monkeypatch.setattr(jpeg, "torchvision_decode", refuse)
    assert compare(tmp_path, encoded(turn=6))


def test_huge_files_are_pillows_where_it_decodes_fewer_pixels(tmp_path, used):
    path = tmp_path / "a.jpg"
    path.write_bytes(encoded((400, 800), subsampling=0))
    assert images.decode(str(path), min_side=200).shape == (3, 200, 400) and not used
    assert images.decode(str(path), min_side=201).shape == (3, 400, 800)
    assert len(used) == jpeg.has_torchvision()


def test_other_formats_are_none_of_its_business(tmp_path, used):
    path = tmp_path / "a.jpg"
    picture(20, 30).save(path, "PNG")
    assert torch.equal(images.decode(str(path)), pillow(path, 3)) and not used


def test_without_torchvisions_decoder_pillow_takes_its_place(tmp_path, monkeypatch):
    data = encoded(turn=5)
    assert re.fullmatch(r"(torchvision|Pillow) \d+\.\d+.*", jpeg.decoder())
    monkeypatch.delattr(jpeg.torchvision.io, "decode_jpeg")
    jpeg.has_torchvision.cache_clear()
    try:
        assert compare(tmp_path, data) and jpeg.decoder().startswith("Pillow ")
    finally:
        jpeg.has_torchvision.cache_clear()


@needs_torchvision
def test_a_warning_changes_no_decoder(tmp_path, used, recwarn):
    """torchvision announces that its decoder will go: with warnings as errors, too, it is used, and says nothing."""
    with jpeg.warnings.catch_warnings():
        jpeg.warnings.simplefilter("error")
        assert compare(tmp_path, encoded())
    assert len(used) == 1 and not recwarn.list
