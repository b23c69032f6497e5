"""Checkpoints: written so that a crash, a full disk or a flipped bit costs no more than the last interval, and read so
that a hostile or damaged file is refused before anything of it is used.

A checkpoint holds tensors and plain data only. `encoder.pt` is {"arch": what models.build needs, "model": the encoder,
"method": who made it, "step"}, and "classifier" after fine-tuning; `last.pt` is {"model": all of it, "optimizer",
"scaler", "step", "config"}.
"""

import contextlib
import os
import pickle
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F

import models


def write(path, content):
    """Write `content` to `path` through a temporary file that is flushed, synced and read back first.

    What `path` held before stays beside it as `previous.<name>`. OSError if the disk is full or not writable: `path`
    and its predecessor are then as they were.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        if wrong := damage(temporary):
            raise OSError(f"it does not read back as it was written: {wrong}")
    except (OSError, RuntimeError) as error:  # RuntimeError: torch's zip writer on a full disk
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise OSError(f"cannot write {path} ({error}); what was saved before is intact") from error
    if path.exists() and not damage(path):  # a damaged file must not take the place of its whole predecessor
        os.replace(path, path.with_name("previous." + path.name))
    os.replace(temporary, path)
    directory = os.open(path.parent, os.O_RDONLY)  # the renames are durable only once the directory is, too
    os.fsync(directory)
    os.close(directory)


def read(path):
    """The content of a checkpoint, on the CPU. ValueError (one line) if it is damaged, cut short, or holds anything but
    tensors and plain data: nothing in it is executed. FileNotFoundError if it is not there."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    if wrong := damage(path):
        raise ValueError(f"{path} is not a whole checkpoint: {wrong}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} holds more than tensors and plain data, and is not opened") from error
    except Exception as error:  # rubbish behind right checksums raises whatever it likes
        raise ValueError(f"{path} is not a checkpoint: {type(error).__name__}") from error


def damage(path):
    """What is wrong with a file as torch.save's archive, in one line, or None. torch.save writes CRC-32 sums, but
    torch.load does not look at them, and reads entries whose flags or compression were changed as something else."""
    try:
        with zipfile.ZipFile(path) as archive:
            odd = [i.filename for i in archive.infolist()
                   if i.flag_bits & ~0x808 or i.compress_type or i.external_attr & 0x10]  # 0x10: "is a folder"
            wrong = odd[0] if odd else archive.testzip()
    except Exception as error:  # zipfile raises a dozen kinds of errors on a damaged directory
        return f"{type(error).__name__} {' '.join(str(error).split())}"
    return f"{wrong} is damaged" if wrong else None


def read_newest(path):
    """`read(path)`, or, with a line that says so, its predecessor if `path` is damaged or gone; None without either."""
    path = Path(path)
    previous = path.with_name("previous." + path.name)
    if not path.exists() and not previous.exists():
        return None
    try:
        return read(path)
    except (ValueError, FileNotFoundError) as error:
        if not previous.exists():
            raise
        print(f"{error}; going on from {previous}", flush=True)
        return read(previous)


def require_run(saved, where):
    """ValueError unless `saved` has the parts that a last.pt has."""
    kinds = {"model": dict, "optimizer": dict, "scaler": dict, "config": dict, "step": int}
    whole = isinstance(saved, dict) and all(isinstance(saved.get(name), kind) for name, kind in kinds.items())
    if not whole or saved["step"] < 0:
        raise ValueError(f"{where} is not a last.pt of this project")


def load_exactly(model, tensors, where):
    """Copy `tensors` (a state dict) into `model`. ValueError before anything is copied if a name, shape or dtype
    differs, or if a value is not finite."""
    own = model.state_dict()
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or extra:
        raise ValueError(f"{where} is of another architecture: it lacks {missing[:3]} and has unknown {extra[:3]}")
    for name, tensor in own.items():
        require_like(tensor, tensors[name], f"{where}, {name}")
    model.load_state_dict(tensors)


def load_optimizer(optimizer, state, where):
    """Copy an optimizer's state dict back. ValueError before anything is copied if groups, shapes or dtypes differ."""
    try:
        check_optimizer(optimizer, state, where)
    except (AttributeError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{where}: the optimizer's state is none: {error!r}") from error
    optimizer.load_state_dict(state)


def check_optimizer(optimizer, state, where):
    """ValueError, or an error of its kind for nonsense, unless `state` fits the optimizer."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    groups = [group["names"] for group in optimizer.param_groups]
    saved = [group.get("names") for group in state["param_groups"]]
    if groups != saved or not set(state["state"]) <= set(range(len(params))):
        raise ValueError(f"{where}: the optimizer was saved with other parameter groups")
    for index, moments in state["state"].items():
        for name, value in moments.items():
            expected = torch.zeros(()) if name == "step" else params[index]
            require_like(expected, value, f"{where}, {name} of optimizer parameter {index}")


def require_like(expected, found, where):
    """ValueError unless `found` is a finite tensor of the shape and dtype of `expected`."""
    if not isinstance(found, torch.Tensor) or (found.shape, found.dtype) != (expected.shape, expected.dtype):
        kind = f"{tuple(found.shape)} {found.dtype}" if isinstance(found, torch.Tensor) else type(found).__name__
        raise ValueError(f"{where} should be {tuple(expected.shape)} {expected.dtype}, not {kind}")
    if not torch.isfinite(found).all():
        raise ValueError(f"{where} holds values that are not finite")


def read_encoder(path):
    """The content of an encoder.pt. ValueError if it is damaged, hostile or something else, such as a last.pt."""
    saved = read(path)
    arch = saved.get("arch") if isinstance(saved, dict) else None
    fits = isinstance(arch, dict) and isinstance(saved.get("model"), dict) and isinstance(arch.get("model"), str)
    fits = fits and isinstance(arch.get("options"), dict) and isinstance(arch.get("img_size"), list)
    numbers = [*arch["img_size"], arch.get("patch_size"), arch.get("in_chans")] if fits else []
    if len(numbers) != 4 or not all(isinstance(n, int) and 0 < n <= 2**16 for n in numbers) \
            or not all(isinstance(arch.get(name), int | list) for name in ("width", "depth", "num_heads")):
        raise ValueError(f"{path} is not an encoder.pt of this project")
    return saved


def load_encoder(encoder, saved, where):
    """Copy the encoder of an encoder.pt, its positions resized if the grid differs, and say what was done.

    ValueError if heads, depth, width, patch or channels differ (weights of 12 heads fit 6 heads, and are wrong there),
    or if a tensor of the encoder would be left unset.
    """
    arch, tensors = saved["arch"], dict(saved["model"])
    for name in ("model", "patch_size", "in_chans", "width", "depth", "num_heads"):
        if arch[name] != encoder.arch[name]:
            raise ValueError(f"{where} holds an encoder with {name} {arch[name]}, not {encoder.arch[name]}")
    for name in ("bias", "layer_scale"):
        there, here = arch["options"].get(name), encoder.arch["options"].get(name)
        if there != here:
            raise ValueError(f"{where} holds an encoder with {name} {there}, not {here}")
    grid = tuple(n // arch["patch_size"] for n in arch["img_size"])
    notes = adapt_bias_tables(tensors, arch, encoder, where)
    if grid != encoder.grid and "pos_embed" in tensors:
        rows = encoder.num_prefix + grid[0] * grid[1]
        require_like(torch.empty(1, rows, encoder.embed_width, device="meta"), tensors["pos_embed"], where)
        tensors["pos_embed"] = resize_positions(tensors["pos_embed"], grid, encoder.grid, encoder.num_prefix)
        notes.append(f"positions resized from {grid[0]}x{grid[1]} to {encoder.grid[0]}x{encoder.grid[1]}")
    over = [name for name in tensors if name not in encoder.state_dict()]
    if over and all(name.startswith("norm.") for name in over):  # a head with its own norm replaces the last one
        notes.append(f"left over: {', '.join(over)}")
        tensors = {name: tensor for name, tensor in tensors.items() if name not in over}
    load_exactly(encoder, tensors, where)
    if os.environ.get("RANK", "0") == "0":
        notes = [f"loaded {len(tensors)} tensors of {arch['model']} from {where}", *notes]
        print("; ".join(notes), flush=True)


def resize_positions(table, old_grid, new_grid, num_prefix=1):
    """A position table (1, num_prefix + h*w, D) for another grid, by bicubic interpolation of its two dimensions; the
    rows of class tokens in front stay. The grids are given, not guessed: 64 tokens may be 8x8 or 4x16."""
    prefix, grid = table[:, :num_prefix], table[:, num_prefix:]
    grid = grid.reshape(1, *old_grid, -1).permute(0, 3, 1, 2)  # (1, D, h, w)
    grid = F.interpolate(grid, new_grid, mode="bicubic", align_corners=False)  # (1, D, h', w')
    return torch.cat([prefix, grid.flatten(2).transpose(1, 2)], dim=1)  # (1, num_prefix + h'*w', D)


def adapt_bias_tables(tensors, arch, encoder, where):
    """Make the bias tables among `tensors`, of the encoder that `arch` describes, fit `encoder`: one for all blocks
    becomes one per block, and other windows get resized tables. Changes `tensors`; returns what was done, as lines."""
    own, table, sizes = encoder.state_dict(), "relative_position_bias_table", set()
    notes = []
    if f"rel_pos_bias.{table}" in tensors and f"blocks.0.attn.{table}" in own:  # SimMIM's fine-tuning starts like this
        shared = tensors.pop(f"rel_pos_bias.{table}")
        tensors |= {name: shared for name in own if name.endswith(f".attn.{table}")}
        notes.append("one bias table for all blocks copied to every block")
    for name in [name for name in tensors if name.endswith(table) and name in own]:
        stage = int(name.split(".")[1]) if name.startswith("layers.") else None  # None: a ViT, one window over the grid
        old, new = (tuple(n // a["patch_size"] for n in a["img_size"]) if stage is None else
                    models.window_sizes(a["img_size"], a["options"]["window"])[stage] for a in (arch, encoder.arch))
        if old != new:
            rows = (2 * old[0] - 1) * (2 * old[1] - 1) + (3 if stage is None else 0)  # 3: BEiT's, for a class token
            require_like(torch.zeros(rows, own[name].shape[1]), tensors[name], f"{where}, {name}")
            tensors[name] = resize_bias_table(tensors[name], old, new)
            sizes.add(f"{old[0]}x{old[1]} to {new[0]}x{new[1]}")
    return notes + [f"bias tables resized from {', '.join(sorted(sizes))}"] * bool(sizes)


def resize_bias_table(table, old_window, new_window, method="geometric"):
    """A table of relative-position biases (T, heads), T = (2h-1)*(2w-1) and rows of a class token, for other windows.

    "geometric" is SimMIM's way: entries are taken to lie at distances that grow like a geometric series until the old
    table reaches as far as the new one, so that near neighbours, which matter most, keep their resolution; a cubic
    spline runs through them; for a smaller window, the table is cut. "bicubic" interpolates the table like an image
    (FastMIM's paper). ValueError for another method.
    """
    (h, w), new = ((2 * a - 1, 2 * b - 1) for a, b in (old_window, new_window))
    offsets, extra = table[: h * w].view(h, w, -1), table[h * w :]  # (h, w, heads)
    if method == "bicubic":
        offsets = F.interpolate(offsets.permute(2, 0, 1)[None], new, mode="bicubic")[0].permute(1, 2, 0)
    elif method == "geometric":
        rows, columns = (spline_matrix(geometric_places(n // 2, m // 2), m // 2) for n, m in ((h, new[0]), (w, new[1])))
        offsets = torch.einsum("ij,jlc,kl->ikc", rows, offsets.double(), columns).to(table.dtype)  # (h', w', heads)
    else:
        raise ValueError(f"bias tables are resized by geometric or bicubic interpolation, not {method}")
    return torch.cat([offsets.flatten(0, 1), extra])


def geometric_places(count, radius):
    """Where the entries of one side of a table lie: 0 and +-(1 + q + ... + q^(i-1)) for i = 1 to `count`, fp64, with q
    such that the last one lies at `radius`, or q = 1 if `radius` is not larger than `count`."""
    low, high, powers = 1.0, 1.0 + radius, torch.arange(count, dtype=torch.float64)
    for _ in range(60):  # bisection
        q = (low + high) / 2
        low, high = (low, q) if (q**powers).sum() > radius else (q, high)
    places = (low**powers).cumsum(0)
    return torch.cat([-places.flip(0), places.new_zeros(1), places])


def spline_matrix(places, radius):
    """What takes values at `places` (n,) to values at -radius ... radius, (2 * radius + 1, n): the cubic spline whose
    third derivative does not jump next to its ends (a polynomial for n <= 4), constant beyond its ends."""
    scale = max(1, radius)  # keeps the system well-conditioned

    def basis(x):
        powers = [(x / scale) ** k for k in range(min(4, len(places)))]
        return torch.stack(powers + [((x - knot) / scale).clamp(min=0) ** 3 for knot in places[2:-2]], dim=1)

    targets = torch.arange(-radius, radius + 1, dtype=torch.float64).clamp(places[0], places[-1])
    return torch.linalg.solve(basis(places), basis(targets), left=False)
