"""images.py, files.py: every kind of image file is decoded exactly, or refused in one line."""

import os
import struct
import zlib
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


INTEGERS = ["uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"]


def stored(path, array):
    np.save(path, array)
    return str(path)


@pytest.mark.parametrize("channels", [1, 3, 4, 5])
@pytest.mark.parametrize("dtype", INTEGERS)
def test_integers_within_a_byte_are_what_they_say(tmp_path, dtype, channels):
    values = np.arange(120, dtype=dtype).reshape(4, 30, 1).repeat(channels, axis=2)
    path = stored(tmp_path / "a.npy", values)
    for value_range in (None, ()):
        found = images.decode(path, channels, value_range=value_range)
        assert torch.equal(found, torch.from_numpy(values.astype(np.uint8)).permute(2, 0, 1))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [*INTEGERS[2:], "float32", "float64"])
def test_wider_numbers_are_a_share_of_their_range(tmp_path, dtype, channels):
    values = np.array([[0, 3000, 10000, 12000]], dtype=dtype)[..., None].repeat(channels, axis=2)
    path = stored(tmp_path / "a.npy", values)
    for c in range(channels):  # 3000 of 10000 is 76.5 of 255; what lies beyond is white
        assert images.decode(path, channels, value_range=(0, 10000))[c, 0].tolist() == [0, 77, 255, 255]
    with pytest.raises(images.Broken, match="--value_range"):  # the first images were of another kind
        images.decode(path, channels, value_range=())
    own = [0, 64, 213, 255]  # of 12000
    if dtype.startswith("float"):
        with pytest.raises(images.Broken, match=r"outside.*--value_range"):
            images.decode(path, channels)
    else:
        assert images.decode(path, channels)[0, 0].tolist() == own


def test_other_numbers(tmp_path):
    path = tmp_path / "a.npy"
    assert images.decode(stored(path, np.array([[True, False]])), 1).tolist() == [[[255, 0]]]
    signed = stored(path, np.array([[-1000, 0, 3000]], np.int16))
    assert images.decode(signed, 1, value_range=(-1000, 3000)).tolist() == [[[0, 64, 255]]]
    assert images.decode(stored(path, np.full((1, 2), 700)), 1).tolist() == [[[0, 0]]]  # nothing to tell apart
    for array in (np.array([[1j]]), np.array([["a"]]), np.array([[np.datetime64(1, "s")]])):
        with pytest.raises(images.Broken, match="no kind of number"):
            images.decode(stored(path, array), 1)
    for bad in (np.nan, np.inf):
        with pytest.raises(images.Broken, match="finite"):
            images.decode(stored(path, np.array([[0, bad]])), 1, value_range=(0, 9))


def png16(path, array, colours, transparent=b""):
    """A PNG of 16 bits (h, w, C), which Pillow does not write; `transparent`: the bytes of a colour that is."""
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    h, w = array.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    header = struct.pack(">IIBBBBB", w, h, 16, colours, 0, 0, 0)
    key = chunk(b"tRNS", transparent) if transparent else b""
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + key + chunk(b"IDAT", zlib.compress(rows))
                     + chunk(b"IEND", b""))
    return str(path)


TYPES = {"H": 3, "I": 4}  # of TIFF: 16 and 32 bits


def tiff(path, array, order="<", **tags):
    """An uncompressed TIFF of an array (h, w[, C]) and of tags by number, as t262=0."""
    h, w = array.shape[:2]
    samples, bits = (array.shape[2] if array.ndim == 3 else 1), 8 * array.dtype.itemsize
    data = array.astype(array.dtype.newbyteorder(order)).tobytes()
    kind = {"u": 1, "i": 2, "f": 3}[array.dtype.kind]
    values = {256: w, 257: h, 258: (bits,) * samples, 259: 1, 262: 1 if samples == 1 else 2, 273: 8, 277: samples,
              278: h, 279: len(data), 339: (kind,) * samples, **{int(k[1:]): v for k, v in tags.items()}}
    extra, entries, place = b"", b"", 8 + len(data) + 2 + 12 * len(values) + 4
    for tag, value in sorted(values.items()):
        value = value if isinstance(value, tuple) else (value,)
        letter = "I" if tag in (273, 279) else "H"
        packed = struct.pack(f"{order}{len(value)}{letter}", *value)
        if len(packed) > 4:
            packed, extra = struct.pack(f"{order}I", place + len(extra)), extra + packed
        entries += struct.pack(f"{order}HHI", tag, TYPES[letter], len(value)) + packed.ljust(4, b"\0")
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(data))
    path.write_bytes(start + data + struct.pack(f"{order}H", len(values)) + entries + bytes(4) + extra)
    return str(path)


WIDE = np.array([[0, 255, 691, 4095], [1, 17, 256, 3000]], np.uint16)


@pytest.mark.parametrize("C,colours", [(3, 2), (4, 6)])
def test_sixteen_bits_in_several_channels_keep_all_of_them(tmp_path, C, colours):
    """Pillow gives the high bytes alone: 12 bits would have 16 levels."""
    array = np.stack([WIDE, WIDE[::-1], WIDE * 16, np.full_like(WIDE, 65535)][:C], axis=2)
    expected = np.floor(array[..., :3].astype(float).clip(0, 4095) * 255 / 4095 + 0.5)
    files = [png16(tmp_path / "a.png", array, colours)]
    for order in "<>":
        alpha = {"t338": 2} if C == 4 else {}
        files.append(tiff(tmp_path / f"{ord(order)}.tif", array, order, **alpha))
    for path in files:
        found = images.decode(path, C, value_range=(0, 4095)).permute(1, 2, 0).numpy()
        assert np.array_equal(found[..., :3], expected), path
        assert C == 3 or (found[..., 3] == 255).all()
    with pytest.raises(images.Broken, match="8 bits"):  # grey with transparency
        images.decode(png16(tmp_path / "b.png", array[..., :2], 4), 1)


@pytest.mark.parametrize("colours,channels", [(0, 1), (2, 3)])
def test_a_transparent_colour_of_sixteen_bits_is_refused(tmp_path, colours, channels):
    """Of 8 bits it becomes white; beside 16, Pillow would leave it out."""
    array = np.stack([WIDE] * channels, axis=2)
    key = np.array([4095] * channels, ">u2").tobytes()
    assert images.decode(png16(tmp_path / "a.png", array, colours), 3, value_range=(0, 4095))[0, 0, 3] == 255
    with pytest.raises(images.Broken, match="stands for transparency"):
        images.decode(png16(tmp_path / "b.png", array, colours, key), 3, value_range=(0, 4095))


def planes(path, array, **tags):
    """A TIFF (h, w, C) whose channels lie one behind the other."""
    size = array[..., 0].nbytes
    behind = np.ascontiguousarray(array.transpose(2, 0, 1)).reshape(array.shape)
    places = {"t273": tuple(8 + c * size for c in range(array.shape[2])), "t279": (size,) * array.shape[2]}
    return tiff(path, behind, t284=2, **places, **tags)


def test_wide_channels_that_lie_apart_are_refused(tmp_path):
    """Pillow takes their bytes for 8 bits each, without a word."""
    array = np.stack([WIDE, WIDE[::-1], WIDE * 16], axis=2)
    low = array.astype(np.uint8)
    assert np.array_equal(images.decode(planes(tmp_path / "a.tif", low)).permute(1, 2, 0).numpy(), low)
    with pytest.raises(images.Broken, match="more than 8 bits"):
        images.decode(planes(tmp_path / "b.tif", array), value_range=(0, 65535))


@pytest.mark.parametrize("bits", [9, 12, 15, 16])
def test_the_numbers_of_a_jpeg_2000_are_those_of_its_file(tmp_path, bits):
    """Pillow writes 16 bits. With fewer in its header, the same file holds numbers around another middle."""
    if ".j2k" not in images.EXTENSIONS:
        pytest.skip("this Pillow reads no JPEG 2000")
    values = np.tile(np.array([[0, 100, 255, 511]], np.uint16), (8, 4))  # (8, 16)
    path = write(tmp_path / "a.j2k", values + np.uint16(2**15 - 2 ** (bits - 1)))
    stream = bytearray(path.read_bytes())
    place = stream.index(b"\xff\x51") + 40  # of the first channel's bits
    assert stream[place] == 15
    stream[place] = bits - 1
    path.write_bytes(stream)
    assert np.array_equal(images.wide_numbers(str(path)), values)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_min_is_white_is_no_negative(tmp_path, dtype, order):
    """One picture of 0 to 200, whose bytes, 16 bits or floats say how dark it is."""
    if (dtype, order) == ("uint16", ">"):
        pytest.skip("Pillow does not read it")
    bright = np.arange(0, 201, 8, dtype=np.uint8).reshape(2, 13)
    dark = (255 - bright) / 255 if dtype == "float32" else 255 - bright
    path = tiff(tmp_path / "a.tif", dark.astype(dtype), order, t262=0)
    assert np.array_equal(images.decode(path, 1)[0].numpy(), bright)
    wide = tiff(tmp_path / "b.tif", (255 - bright).astype(np.uint16) * 257, t262=0)
    assert np.array_equal(images.decode(wide, 1, value_range=(0, 65535))[0].numpy(), bright)


def test_one_bit_min_is_white(tmp_path):
    path = tmp_path / "a.tif"
    for white in (0, 1):  # TIFF's MinIsWhite and MinIsBlack
        Image.fromarray(np.array([[255, 0]], np.uint8)).convert("1").save(path, tiffinfo={262: white})
        with images.opened(path) as image:
            assert image.tag_v2[262] == white
        assert images.decode(str(path), 1)[0, 0].tolist() == [255, 0]


def test_the_numbers_of_a_pgm_are_those_of_its_file(tmp_path):
    path = tmp_path / "a.pgm"
    path.write_bytes(b"P5\n3 1\n4095\n" + np.array([0, 3000, 4095], ">u2").tobytes())
    assert images.decode(str(path), 1, value_range=(0, 10000))[0, 0].tolist() == [0, 77, 104]
    path.write_bytes(b"P6\n1 1\n4095\n" + np.array([0, 3000, 4095], ">u2").tobytes())
    with pytest.raises(images.Broken, match="8 bits"):
        images.decode(str(path), 3)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_every_depth_is_turned_by_exif(tmp_path, suffix):
    exif = Image.Exif()
    exif[0x0112] = 6
    grey = images.to_bytes(WIDE, (0, 4095))
    for array in (WIDE, grey, np.stack([grey] * 3, axis=2)):
        path = str(write(tmp_path / f"a{suffix}", array, exif=exif))
        assert np.array_equal(images.decode(path, 1, value_range=(0, 4095))[0].numpy(), np.rot90(grey, -1))


def test_a_fourth_band_stays_or_is_refused(tmp_path):
    bands = noise(5, 6, 4)
    for name, tags in (("spec", {"t338": 0}), ("untold", {})):  # GDAL's way; not told what it is
        path = tiff(tmp_path / f"{name}.tif", bands, **tags)
        assert torch.equal(images.decode(path, 4), torch.from_numpy(bands).permute(2, 0, 1)), name
        for in_chans in (1, 3):
            with pytest.raises(images.Broken, match="4 channels"):
                images.decode(path, in_chans)
    for C, extra in ((5, (0, 0)), (6, (0, 0, 0)), (5, (2, 0))):
        path = tiff(tmp_path / "more.tif", noise(5, 6, C), t338=extra)
        for in_chans in (3, 4):
            with pytest.raises(images.Broken, match=f"{C} channels"):
                images.decode(path, in_chans)
    alpha = tiff(tmp_path / "alpha.tif", bands, t338=2)
    assert torch.equal(images.decode(alpha, 4), torch.from_numpy(bands).permute(2, 0, 1))
    assert images.decode(alpha, 3).shape == (3, 5, 6)


def fill(folder, arrays, suffix=".npy"):
    folder.mkdir(parents=True)
    for i, array in enumerate(arrays):
        if suffix == ".npy":
            np.save(folder / f"{i}.npy", array)
        else:
            write(folder / f"{i}{suffix}", array)
    return folder


@pytest.mark.parametrize("suffix", [".npy", ".png", ".tif"])
def test_the_range_of_the_first_images_is_used_and_said(tmp_path, capsys, suffix):
    """Two X-rays of 12 bits: neither black, nor each stretched on its own."""
    scans = [np.array([[0, 30]], np.uint16), np.array([[291, 694]], np.uint16)]
    source = images.Folder(fill(tmp_path / "set", scans, suffix), "train", in_chans=1)
    assert source.value_range == (0, 694) and "--value_range 0,694" in capsys.readouterr().out
    assert [source.load(i)[0].flatten().tolist() for i in (0, 1)] == [[0, 11], [107, 255]]
    given = images.Folder(tmp_path / "set", "train", in_chans=1, value_range=(0, 4095))
    assert given.load(1)[0].flatten().tolist() == [18, 43] and "black is" not in capsys.readouterr().out


def test_val_has_the_range_of_train(tmp_path):
    fill(tmp_path / "train" / "a", [np.array([[0, 1000]])])
    fill(tmp_path / "train" / "b", [np.array([[0, 500]])])
    for name in ("a", "b"):
        fill(tmp_path / "val" / name, [np.array([[0, 250]])])
    val = images.Folder(tmp_path, "val", 1, labelled=True)
    assert val.value_range == (0, 1000) and val.load(0)[0].flatten().tolist() == [0, 64]


def test_the_range_is_that_of_the_first_wide_images(tmp_path):
    """Of whichever folder: in the first one there may be more bytes than images that a range is taken of."""
    for i in range(images.FIRST + 1):
        write(tmp_path / "a" / f"{i}.png", noise(2, 2))
    fill(tmp_path / "b", [np.array([[0, 500]], np.uint16)] * images.FIRST, ".png")
    fill(tmp_path / "c", [np.array([[0, 900]], np.uint16)], ".png")
    assert images.first_range(tmp_path) == (0, 500)


def test_transparency_has_no_part_in_the_range(tmp_path):
    array = np.stack([WIDE, WIDE, WIDE, np.full_like(WIDE, 65535)], axis=2)
    for name, save in (("png", lambda path: png16(path, array, 6)), ("tif", lambda path: tiff(path, array, t338=2))):
        (tmp_path / name).mkdir()
        path = save(tmp_path / name / f"a.{name}")
        assert images.first_range(tmp_path / name) == (0, 4095)
        assert images.wide_numbers(path).shape == (2, 4, 4)  # a report of the file has it


def test_ranges_that_need_no_word_and_one_that_needs_more(tmp_path, capsys):
    bytes_only = fill(tmp_path / "bytes", [np.array([[0, 255]], np.int32), np.array([[True, False]])])
    assert images.Folder(bytes_only, "train", 1).value_range == ()
    shares = fill(tmp_path / "shares", [np.array([[0, 0.5]])])
    assert images.Folder(shares, "train", 1).value_range == () and "black is" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="integers and floats"):
        images.Folder(fill(tmp_path / "both", [np.array([[0, 900]]), np.array([[0, 0.5]])]), "train", 1)


def test_what_is_passed_over_is_said(tmp_path, capsys):
    root = tmp_path / "set"
    for i in range(3):
        write(root / "train" / f"{i}.jfif", noise(8, 8, 3), format="JPEG")
    for name in ("a.heic", "b.HEIC", "notes.txt", "nothing", ".hidden"):
        (root / "train" / name).write_bytes(b"")
    (root / "unlabelled").mkdir()
    assert len(images.Folder(root, "train")) == 3
    said = capsys.readouterr().out
    assert f"{root}/train: 3 images; files passed over: 2 .heic, 1 .txt, 1 without suffix" in said
    assert "folders passed over: unlabelled" in said
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "a.heic").touch()
    with pytest.raises(ValueError, match=r"no images.*1 \.heic"):
        images.Folder(tmp_path / "none", "train")


def test_files_are_found_in_folders_links_and_odd_names(tmp_path):
    for name in ("b/c/2.JPG", "b/10.png", "a.b/x.jpeg", "e/.hidden/1.png", "e/._1.png", "z.jpg", "b/jpg", "d.png/read"):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / os.fsdecode(b"\xff.webp")).touch()
    (tmp_path / "set" / "link").symlink_to(tmp_path / "other")
    (tmp_path / "set" / "circle").symlink_to(tmp_path / "set")
    linked = os.path.join("link", os.fsdecode(b"\xff.webp"))
    assert images.find_images(tmp_path / "set") == ["a.b/x.jpeg", "b/10.png", "b/c/2.JPG", linked, "z.jpg"]
    assert list(images.files_below(tmp_path / "set" / "b")) == ["10.png", "jpg", "c/2.JPG"]
    source = images.Folder(tmp_path / "set", "train")
    assert [os.fsdecode(path) for path in source.paths] == images.find_images(tmp_path / "set")


@pytest.mark.parametrize("link", ["a", "c"])  # before the folder, and behind it
def test_a_folder_beside_a_link_to_it_is_listed_once(tmp_path, link):
    for name in ("1.png", "deep/2.png"):
        write(tmp_path / "b" / name, noise(2, 2))
    (tmp_path / link).symlink_to(tmp_path / "b")
    first = min(link, "b")
    assert images.find_images(tmp_path) == [f"{first}/1.png", f"{first}/deep/2.png"]


def test_the_way_to_a_folder_is_found_once(tmp_path, monkeypatch):
    """Not for each of its files: of a million, that took six seconds of seven."""
    for i in range(50):
        write(tmp_path / "train" / "ab"[i % 2] / f"{i}.png", noise(2, 2))
    calls, real = [], os.path.relpath
    monkeypatch.setattr(os.path, "relpath", lambda *words: calls.append(words) or real(*words))
    assert len(images.Folder(tmp_path, "train")) == 50 and 0 < len(calls) < 20


@pytest.mark.parametrize("suffix", [".avif", ".jfif", ".jp2", ".tga", ".qoi", ".pcx", ".pbm"])
def test_what_the_installed_pillow_reads_is_read(tmp_path, suffix):
    if suffix not in images.EXTENSIONS:
        pytest.skip(f"this Pillow reads no {suffix}")
    Image.new("1" if suffix == ".pbm" else "RGB", (16, 16), 1).save(tmp_path / f"a{suffix}")
    assert images.find_images(tmp_path) == [f"a{suffix}"]
    assert images.decode(str(tmp_path / f"a{suffix}")).shape == (3, 16, 16)


def test_npy(tmp_path):
    def stored(array):
        np.save(tmp_path / "a.npy", array, allow_pickle=True)
        return str(tmp_path / "a.npy")

    five = noise(6, 7, 5)
    assert torch.equal(images.decode(stored(five), 5), torch.from_numpy(five).permute(2, 0, 1))
    assert images.decode(stored(np.float32([[0, 1]])), 1).tolist() == [[[0, 255]]]
    assert images.decode(stored(np.uint16([[0, 65535]])), 1).tolist() == [[[0, 255]]]
    for array, why in ((five, "5 channels"), (np.array([object()]), "Python objects"), (np.zeros(3), "shape"),
                       (np.full((2, 2), np.nan), "outside"), (np.zeros((0, 4, 3), np.uint8), "shape"),
                       (np.zeros((4, 4, 0), np.uint8), "shape")):
        with pytest.raises(images.Broken, match=why):
            images.decode(stored(array), 3)
    with pytest.raises(images.Broken, match=r"a\.npy.*shape"):  # as tools.check_images reads it
        images.decode(stored(np.zeros((4, 4, 0), np.uint8)), None)
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
