"""weights.py: an encoder.pt fits the encoder it is loaded into, or is refused."""

import pytest
import torch
from conftest import equal
from encoders import read_encoder

import models
from common import checkpoint, weights


def encoder_file(encoder, **changes):
    return {"arch": encoder.arch, "model": encoder.state_dict(), "step": 3, "method": "MAE", **changes}


def test_an_encoder_makes_the_round_trip(tmp_path, capsys):
    one, two = (models.build("vit_tiny", (32, 64), 8) for _ in range(2))
    checkpoint.write(tmp_path / "encoder.pt", encoder_file(one))
    weights.load_encoder(two, read_encoder(tmp_path / "encoder.pt"), "encoder.pt")
    imgs = torch.randn(2, 3, 32, 64)
    assert torch.equal(one(imgs), two(imgs))
    assert "loaded" in capsys.readouterr().out


@pytest.mark.parametrize("name,value", [("num_heads", 8), ("depth", 5), ("width", 100), ("patch_size", 4),
                                        ("in_chans", 1), ("model", "vit_s")])
def test_an_encoder_of_another_architecture_is_refused(name, value):
    """Heads above all: the weights of 4 heads have the shapes of 8, and would load without a word."""
    encoder, other = (models.build("vit_tiny", (32, 32), 8) for _ in range(2))
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    with pytest.raises(ValueError, match=rf"encoder\.pt.*{name} {value}"):
        weights.load_encoder(encoder, encoder_file(other, arch={**other.arch, name: value}), "encoder.pt")
    assert equal(dict(encoder.state_dict()), before)


@pytest.mark.parametrize("changes", [
    {"arch": None}, {"arch": {}}, {"model": None}, {"model": {}}, {"arch": {"model": "vit_tiny"}},
    {"arch.img_size": [32]}, {"arch.img_size": ["a", "b"]}, {"arch.img_size": [None, 32]}, {"arch.img_size": 32},
    {"arch.img_size": {"a": 1, "b": 2}}, {"arch.img_size": [10**9, 10**9]}, {"arch.img_size": [-32, 32]},
    {"arch.img_size": [0, 0]}, {"arch.patch_size": 0}, {"arch.patch_size": -8}, {"arch.patch_size": 8.0},
    {"arch.model": 7}, {"arch.options": {"windows": 7}}, {"arch.options": {"positions": 3}},
    {"arch.options": {"layer_scale": "0.1"}}], ids=repr)
def test_a_file_that_only_looks_like_an_encoder_is_refused_in_one_line(tmp_path, changes):
    encoder = models.build("vit_tiny", (32, 32), 8)
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    nested = {k.removeprefix("arch."): v for k, v in changes.items() if k.startswith("arch.")}
    saved = encoder_file(encoder, arch={**encoder.arch, **nested})
    torch.save({**saved, **{k: v for k, v in changes.items() if "." not in k}}, tmp_path / "encoder.pt")
    with pytest.raises(ValueError, match=r"encoder\.pt") as caught:
        weights.load_encoder(encoder, read_encoder(tmp_path / "encoder.pt"), tmp_path / "encoder.pt")
    assert len(str(caught.value).splitlines()) == 1
    assert equal(dict(encoder.state_dict()), before)


@pytest.mark.parametrize("value", [[1, 2], 3, "text", torch.zeros(3), {}], ids=repr)
def test_a_checkpoint_of_something_else_is_no_encoder(tmp_path, value):
    torch.save(value, tmp_path / "encoder.pt")
    with pytest.raises(ValueError, match=r"encoder\.pt"):
        read_encoder(tmp_path / "encoder.pt")


def test_an_encoder_for_another_image_size_has_its_positions_resized(capsys):
    learned = {"learn_positions": True}
    old, new = (models.build("vit_tiny", size, 8, **learned) for size in ((32, 32), (32, 64)))
    with torch.no_grad():
        old.pos_embed.normal_()
    saved = encoder_file(old)
    weights.load_encoder(new, saved, "encoder.pt")
    assert "positions resized from 4x4 to 4x8" in capsys.readouterr().out
    assert torch.equal(new.pos_embed, weights.resize_positions(old.pos_embed, (4, 4), (4, 8)))
    assert saved["model"]["pos_embed"].shape == old.pos_embed.shape  # the caller's tensors are as they were


def test_resize_positions_to_the_same_grid_is_the_identity():
    table = torch.randn(1, 1 + 12, 8)
    torch.testing.assert_close(weights.resize_positions(table, (3, 4), (3, 4)), table, rtol=0, atol=1e-6)


def test_resize_positions_keeps_what_stands_in_front():
    table = torch.randn(1, 2 + 12, 8)
    assert torch.equal(weights.resize_positions(table, (3, 4), (6, 8), num_prefix=2)[:, :2], table[:, :2])
    assert weights.resize_positions(table, (3, 4), (6, 8), num_prefix=2).shape == (1, 2 + 48, 8)
    assert weights.resize_positions(table[:, 2:], (3, 4), (6, 8), num_prefix=0).shape == (1, 48, 8)


def test_resize_positions_is_told_the_grid_and_does_not_guess_it():
    table = torch.randn(1, 64, 8)  # 64 tokens: 8x8, or 4x16
    square, flat = (weights.resize_positions(table, grid, (8, 8), num_prefix=0) for grid in ((8, 8), (4, 16)))
    torch.testing.assert_close(square, table, rtol=0, atol=1e-6)
    assert (flat - table).abs().max() > 0.1


def test_resize_positions_interpolates_rows_and_columns_alike():
    ramp = torch.arange(8.0)
    table = torch.stack([ramp[:, None].expand(8, 6), ramp[:6].expand(8, 6)], dim=2).view(1, 48, 2)  # (row, column)
    big = weights.resize_positions(table, (8, 6), (16, 12), num_prefix=0).view(16, 12, 2)[4:-4, 4:-4]
    # bicubic interpolation with torch's a = -0.75 keeps a ramp to about 0.05 only
    torch.testing.assert_close(big[:, 0, 0], (torch.arange(4, 12) + 0.5) / 2 - 0.5, rtol=0, atol=0.1)
    torch.testing.assert_close(big[0, :, 1], (torch.arange(4, 8) + 0.5) / 2 - 0.5, rtol=0, atol=0.1)

