"""UM-MAE: MAE for pyramids. Of every 2x2 cell of units keep one; what is kept is again an image, of half the side.

A window or a pooled key needs a map without holes. Uniform sampling leaves one unit of every cell, and these make a
compact image: a quarter of the work from the first layer on. As this makes the task too easy, a quarter of the kept
units is then hidden behind a token (secondary masking).

    imgs (B,C,H,W) --gather--> compact (B,C,H/2,W/2) --embed--> tokens --token where hidden, encode--> latent
      |                                                                                     | back to units,
      +--target--> (B,U,u*u*C) <-- squared error on dropped units --> pred <--decode--------+ at their places

Paper: Li et al., Uniform Masking: Enabling MAE Pre-training for Pyramid-based Vision Transformers with Locality,
arXiv 2205.10063.

    CPU     python um_mae.py --config configs/um_mae_tiny.yaml --out runs/um_mae         (not measured)
    1 GPU   python um_mae.py --config configs/um_mae_swin_t.yaml --data /data/imagenet --out runs/um_t   (not measured)
    8 GPUs  torchrun --nproc-per-node 8 um_mae.py --config configs/um_mae_swin_t.yaml --data /data/imagenet ...
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import models
from common import engine, evaluate, figures


@dataclass
class Config(engine.RunConfig):
    """Pre-training of Swin-T for 200 epochs (UM-MAE, 4.1)."""
    model: str = "swin_t"  # swin_{tiny,t,b,l}, pvt_{tiny,s}, or a ViT
    patch_size: int = 0  # pixels; 0 is 16 for a ViT and 4 for a pyramid
    window: int = 16  # side of Swin's windows in tokens of the full map; half of it on the compact one
    reduction: tuple[int, int, int, int] = (8, 4, 2, 1)  # PVT: pooling of keys on the full map; half on the compact
    unit: int = 16  # pixels; what is kept or dropped are squares of this side
    sampling: str = "uniform"  # uniform: one random unit of every 2x2 cell; grid: the top-left one; random (ViT only)
    secondary_ratio: float = 0.25  # share of the kept units that is hidden behind a token, in [0, 1)
    published_order: bool = False  # decode the tokens of a pyramid at the places where the released code puts them
    target: str = "norm_pixels"  # pixels, norm_pixels (each unit to mean 0, std 1)
    decoder_depth: int = 2  # blocks
    decoder_width: int = 512  # channels
    decoder_heads: int = 16  # attention heads
    img_size: engine.Size = (256, 256)  # height x width in pixels
    in_chans: int = 3  # image channels
    crop_scale: tuple[float, float] = (0.2, 1.0)  # share of the image's area that a random crop covers; 1,1 for none
    flip: float = 0.5  # probability of a horizontal flip
    epochs: float = 200.0  # passes over the images
    warmup_epochs: float = 10.0  # linear warm-up of the learning rate
    batch_size: int = 4096  # images of one optimizer step, over all processes
    micro_batch: int = 128  # images that one process holds at once
    base_lr: float = 1.5e-4  # per lr_batch images: lr = base_lr * batch_size / lr_batch
    lr_batch: int = 256  # images that base_lr is stated for
    min_lr: float = 0.0  # end of the cosine
    weight_decay: float = 0.05  # AdamW
    betas: tuple[float, float] = (0.9, 0.95)  # AdamW
    clip_grad: float = 0.0  # largest gradient norm; 0 for no clipping


# ---------------------------------------- Masks: functions of noise (B, U) and the grid (h, w) of units, U = h * w

def uniform_sampling(noise, grid):
    """ids_keep (B, U/4): in every 2x2 cell, the unit with the lowest noise; cells in raster order (UM-MAE, 3.2)."""
    # DIFF: UM-MAE's released code draws the places from a pool in which all four are equally frequent; here they are
    # independent, which makes the same marginals.
    (h, w), B = grid, len(noise)
    cells = noise.view(B, h // 2, 2, w // 2, 2).transpose(2, 3).flatten(3)  # (B, h/2, w/2, 4)
    place = cells.argmin(dim=3)  # (B, h/2, w/2), 0 to 3: which of the cell's units
    row = 2 * torch.arange(h // 2, device=noise.device)[:, None] + place // 2
    column = 2 * torch.arange(w // 2, device=noise.device) + place % 2
    return (row * w + column).flatten(1)  # (B, U/4)


def grid_sampling(noise, grid):
    """ids_keep (B, U/4): the top-left unit of every 2x2 cell."""
    return uniform_sampling(torch.arange(noise.shape[1], device=noise.device).expand_as(noise), grid)


def random_sampling(noise, grid):
    """ids_keep (B, U // 4): a random quarter of all units, in raster order (MAE)."""
    return noise.argsort(dim=1, stable=True)[:, : noise.shape[1] // 4].sort(dim=1).values


SAMPLING = {"uniform": uniform_sampling, "grid": grid_sampling, "random": random_sampling}


def secondary_mask(noise, ids_keep, ratio):
    """Which of the kept units are hidden behind a token: bool (B, U/4), True = hidden. Those with the lowest noise
    (B, U) stay visible, floor(kept * (1 - ratio)) of them (UM-MAE, 3.2)."""
    kept = ids_keep.shape[1]
    rank = noise.gather(1, ids_keep).argsort(dim=1, stable=True).argsort(dim=1)  # (B, U/4)
    return rank >= max(1, math.floor(kept * (1 - ratio) + 1e-9))


# ---------------------------------------- Model

class UMMAE(nn.Module):
    """The model that `cfg` describes. ValueError if its options do not fit together."""

    def __init__(self, cfg):
        super().__init__()
        if cfg.sampling not in SAMPLING or cfg.target not in ("pixels", "norm_pixels"):
            raise ValueError("--sampling is uniform, grid or random and --target pixels or norm_pixels, not "
                             f"{cfg.sampling} and {cfg.target}")
        if not 0 <= cfg.secondary_ratio < 1:
            raise ValueError(f"--secondary_ratio must lie in [0, 1), not {cfg.secondary_ratio}")
        if cfg.model.startswith(("pvtv2", "torchvision:")):
            raise ValueError(f"--model {cfg.model} looks across the borders of units, which are no neighbours in a "
                             "compact image; UM-MAE takes a ViT, swin_* or pvt_*")
        self.cfg, full, half = cfg, {}, {}  # options of the encoder on the full map, and here, on the compact one
        if cfg.model.startswith("swin"):
            full, half = ({"bias": "continuous", "window": max(1, cfg.window // n)} for n in (1, 2))
        elif cfg.model.startswith("pvt"):
            full, half = ({"reduction": [max(1, r // n) for r in cfg.reduction]} for n in (1, 2))
        self.encoder = models.build(cfg.model, cfg.img_size, cfg.patch_size, cfg.in_chans, **half)
        self.encoder.arch["options"] |= full  # no weight depends on them, and encoder.pt is for full images
        u, stride, out = cfg.unit, self.encoder.stride, self.encoder.out_stride
        if out > stride and cfg.sampling == "random":
            raise ValueError("--sampling random leaves holes in the map of a pyramid, which takes uniform or grid")
        if u < 1 or u % stride or out % u:
            raise ValueError(f"--unit {u} must be divisible by {stride} and divide {out}, the strides of {cfg.model}")
        least = [max(1, 2 * u // stride >> s) for s in range(4)]  # two units in tokens of every stage of the full map
        if cfg.model.startswith("swin") and (cfg.window < 1 or cfg.window % least[0]):
            raise ValueError(f"--window {cfg.window} cuts units of {u} px: it must be divisible by {least[0]}")
        fits = all(r % n == 0 and (r % 2 == 0 or r == 1) for r, n in zip(cfg.reduction, least, strict=True))
        if cfg.model.startswith("pvt") and not fits:
            raise ValueError("--reduction {} cuts units of {} px: it must be multiples of {}, even or 1".format(
                *(",".join(map(str, n)) for n in (cfg.reduction, [u], least))))
        if any(n % (2 * out) for n in cfg.img_size):
            raise ValueError(f"--img_size {cfg.img_size[0]}x{cfg.img_size[1]} must be divisible by {2 * out} (cells "
                             f"of 2x2, a stride of {out} of {cfg.model}), "
                             f"as {models.next_size(cfg.img_size, 2 * out)} is")
        self.grid = (cfg.img_size[0] // u, cfg.img_size[1] // u)
        self.num_units = self.grid[0] * self.grid[1]  # U
        self.num_noise = 2 * self.num_units  # for sampling, and for secondary masking
        self.up = self.encoder.out_stride // u  # a latent token stands for up x up units
        self.secondary_token = nn.Parameter(torch.randn(1, 1, self.encoder.embed_width) * 0.02)
        self.mask_token = nn.Parameter(torch.randn(1, 1, cfg.decoder_width) * 0.02)
        self.decoder = models.Decoder(self.encoder.width, u * u * cfg.in_chans, self.grid, cfg.decoder_width,
                                      cfg.decoder_depth, cfg.decoder_heads, self.encoder.num_prefix, up=self.up)
        self.encoder.checkpointing = self.decoder.checkpointing = cfg.activation_checkpointing

    def mask(self, noise):
        """Uniform noise (B, 2U) -> ids_keep (B, K) in the order of the compact image, secondary (B, K) bool, True =
        behind a token, and mask (B, U) bool, True = dropped. K = U/4."""
        first, second = noise.chunk(2, dim=1)
        ids_keep = SAMPLING[self.cfg.sampling](first, self.grid)
        mask = torch.ones_like(first, dtype=torch.bool).scatter(1, ids_keep, False)  # (B, U)
        return ids_keep, secondary_mask(second, ids_keep, self.cfg.secondary_ratio), mask

    def compact(self, x, ids_keep):
        """Kept units of a map (B, D, H, W) packed into one of a quarter of its size: (B, D, H/2, W/2). Random sampling
        leaves no map; its units make one row, which is all that a ViT needs."""
        h, w = self.grid
        side = x.shape[2] // h  # of a unit in this map
        units = models.patchify(x, side)  # (B, U, side*side*D)
        units = models.gather(units, ids_keep)  # (B, K, side*side*D)
        place = (1, units.shape[1]) if self.cfg.sampling == "random" else (h // 2, w // 2)
        return models.unpatchify(units, side, place)

    def embed(self, imgs, ids_keep):
        """Only kept pixels go on: (B, C, H, W) -> tokens (B, N/4, D) of the compact image, and their true coords."""
        (h, w), compact = self.encoder.grid, self.compact(imgs, ids_keep)
        rows = torch.arange(h, device=imgs.device)[:, None].expand(h, w)
        columns = torch.arange(w, device=imgs.device).expand(h, w)
        coords = self.compact(torch.stack([rows, columns]).expand(len(imgs), -1, -1, -1), ids_keep)  # (B, 2, h/2, w/2)
        grid, coords = tuple(coords.shape[2:]), coords.flatten(2).transpose(1, 2)  # (B, N/4, 2)
        return self.encoder.embed(compact), coords, grid

    def encode(self, tokens, coords, grid, secondary):
        """A token where secondary masking hides a unit, then the encoder: latent (B, num_prefix + K / up^2, D')."""
        side = self.cfg.unit // self.encoder.stride  # of a unit in tokens
        hidden = secondary.unflatten(1, (grid[0] // side, -1))  # (B, h, w), units of the compact image
        hidden = hidden.repeat_interleave(side, 1).repeat_interleave(side, 2)  # (B, h*side, w*side)
        token = self.encoder.patch_embed.norm(self.secondary_token)  # Swin normalises what it embeds, so this, too
        tokens = torch.where(hidden.flatten(1)[..., None], token.to(tokens.dtype), tokens)  # (B, N/4, D)
        return self.encoder.encode(tokens, coords=coords, grid=grid)

    def decode(self, latent, ids_keep):
        """Latent tokens are unfolded into units and put at their own places among mask tokens; all units are predicted:
        (B, U, u*u*C)."""
        x, P = self.decoder.embed(latent), self.encoder.num_prefix  # (B, P + K / up^2, up^2 * decoder_width)
        prefix, x = x[:, :P], x[:, P:]
        if self.up > 1:
            h, w = (n // 2 // self.up for n in self.grid)
            x = F.pixel_shuffle(x.transpose(1, 2).unflatten(2, (h, w)), self.up)  # (B, decoder_width, h', w')
            x = x.flatten(2).transpose(1, 2)  # (B, K, decoder_width)
        # DIFF: UM-MAE's released code puts the tokens of a pyramid, which are in the order of cells, at the kept places
        # in raster order, so that three in four stand at a place that is not theirs; --published_order does it, too.
        places = ids_keep.sort(dim=1).values if self.cfg.published_order and self.up > 1 else ids_keep
        full = self.mask_token.to(x.dtype).expand(len(x), self.num_units, -1)  # (B, U, decoder_width)
        full = full.scatter(1, places[..., None].expand_as(x), x)
        return self.decoder(torch.cat([prefix, full], dim=1) if P else full)  # (B, U, u*u*C)

    def target(self, imgs, flat=False):
        """What to paint on each unit, fp32: (B, U, u*u*C). `flat`: as if it had one colour."""
        units = painted = models.patchify(imgs.float(), self.cfg.unit)  # (B, U, u*u*C)
        if flat:
            pixels = units.unflatten(2, (-1, self.cfg.in_chans))  # (B, U, u*u, C)
            painted = pixels.mean(dim=2, keepdim=True).expand_as(pixels).flatten(2)  # (B, U, u*u*C)
        mean, std = models.patch_statistics(units)
        return (painted - mean) / std if self.cfg.target == "norm_pixels" else painted

    def loss(self, pred, target, mask):
        """Mean squared error over dropped units, fp32; units behind a secondary token carry none (released code)."""
        error = (pred.float() - target).square().mean(dim=2)  # (B, U)
        return (error * mask).sum() / mask.sum()

    def forward(self, imgs, noise):
        """imgs (B, C, H, W) normalised, noise (B, 2U) uniform in [0, 1) -> loss, a scalar."""
        ids_keep, secondary, mask = self.mask(noise)
        latent = self.encode(*self.embed(imgs, ids_keep), secondary)
        pred = self.decode(latent, ids_keep)
        return self.loss(pred, self.target(imgs), mask)

    def prepare(self, imgs, noise):
        """Before training: the loss of two trivial predictors (zero, and each unit's true mean colour), which the
        first losses are to be read against."""
        target, mask = self.target(imgs), self.mask(noise)[2]
        guesses = {"zero": torch.zeros_like(target), "unit mean": self.target(imgs, flat=True)}
        return {name: round(self.loss(guess, target, mask).item(), 4) for name, guess in guesses.items()}


@torch.no_grad()
def reconstruct(model, imgs, noise):
    """{row title: images (B, C, H, W) in [0, 1]}: original, what sampling keeps, what secondary masking leaves of it,
    the compact image (half the side), prediction, prediction pasted between the kept units. imgs normalised."""
    cfg, (ids_keep, secondary, mask) = model.cfg, model.mask(noise)
    pred = model.decode(model.encode(*model.embed(imgs, ids_keep), secondary), ids_keep).float()
    units, note = models.patchify(imgs, cfg.unit), ""
    if cfg.target == "norm_pixels":
        mean, std = models.patch_statistics(units)
        pred, note = pred * std + mean, "\n(true mean and std\nof each unit)"
    hidden = mask.scatter(1, ids_keep, secondary)[..., None]  # (B, U, 1)
    seen = units.masked_fill(hidden, 0.0)
    rows = {"original": units, "uniform sampling": units.masked_fill(mask[..., None], 0.0), "secondary masking": seen,
            "prediction" + note: pred, "prediction\nand kept": torch.where(mask[..., None], pred, units)}
    rows = {title: models.unpatchify(row, cfg.unit, model.grid) for title, row in rows.items()}
    rows["compact image"] = model.compact(rows["secondary masking"], ids_keep)
    order = [*list(rows)[:3], "compact image", *list(rows)[3:5]]
    return {title: data.denormalize(rows[title]) for title in order}


# ---------------------------------------- Training

@engine.record
def main(argv=None):
    # Set-up: the same text in every method file, but for the name of the model.
    cfg = engine.configure(Config, __doc__, argv)
    run = engine.start(cfg)
    with engine.user_errors():
        if cfg.plan:
            return engine.plan(cfg, UMMAE)
        model = UMMAE(cfg).to(run.device)
        dataset = data.pretrain_set(cfg)
        sampler = data.global_batches(len(dataset), cfg, run)
        probe_sets = evaluate.probe_sets(cfg)
        sample = data.normalize(data.sample(dataset, 64).to(run.device))  # (64, C, H, W)
        sample_noise = engine.noise(cfg.seed, 0, len(sample), model.num_noise, use="sample").to(run.device)
        trivial = {"loss_of_trivial_predictors": model.prepare(sample, sample_noise)}
    optimizer = torch.optim.AdamW(engine.parameter_groups(model, cfg.weight_decay), betas=cfg.betas, fused=True)
    steps, warmup = engine.lengths(cfg, sampler.steps_per_epoch)
    peak = cfg.base_lr * cfg.batch_size / cfg.lr_batch  # linear scaling rule (MAE, A.1)
    first = engine.open_run(cfg, run, model, optimizer, sampler, steps, warmup=warmup, lr=peak, **trivial)
    net = engine.distribute(cfg, run, model)
    batches = engine.timed(run, data.loader(dataset, sampler, cfg.workers, pin=run.device.type == "cuda"))

    # The loop. Every step is one optimizer step on one global batch, whatever holds it: processes x micro-batches.
    for step in range(first, run.last):
        lr = engine.schedule(cfg.schedule, step, steps, warmup, peak, cfg.min_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        size = sampler.size(step)
        noise = engine.noise(cfg.seed, step, size, model.num_noise)  # (B of all processes, N)
        loss = torch.zeros((), device=run.device)
        for left in reversed(range(sampler.micro_batches(step))):
            imgs, _, where = next(batches)
            imgs = data.normalize(imgs.to(run.device, non_blocking=True))  # (B, C, H, W)
            with engine.sync_on(left == 0, net), engine.autocast(run):
                part = net(imgs, noise[where].to(run.device)) * (len(imgs) / size)
            run.scaler.scale(part * run.world).backward()  # DDP averages over processes: x world makes that a sum
            loss += part.detach()
        run.scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        if cfg.clip_grad:
            torch.nn.utils.clip_grads_with_norm_(model.parameters(), cfg.clip_grad, grad_norm)
        loss, grad_norm, told = engine.agree(run, loss, grad_norm)
        engine.check_finite(run, step, lr, loss, grad_norm)
        run.scaler.step(optimizer)
        run.scaler.update()
        optimizer.zero_grad(set_to_none=True)

        engine.log(cfg, run, step, (step + 1) / sampler.steps_per_epoch, size, loss, lr, grad_norm)
        if run.main and engine.due(run, step, cfg.picture_epochs * sampler.steps_per_epoch):
            pictures = reconstruct(model, sample[:8], sample_noise[:8])
            figures.grid(run.out / "pictures" / f"step_{step + 1:07d}.png", pictures, f"step {step + 1}")
        if told or engine.save_due(cfg, run, step, sampler.steps_per_epoch):
            engine.save(cfg, run, step + 1, model, optimizer)
        if told:
            break
        if probe_sets and engine.due(run, step, cfg.probe_epochs * sampler.steps_per_epoch):
            evaluate.probe(cfg, run, step, model.encoder, probe_sets)
    return engine.finish(run, step + 1 if run.last > first else first)


if __name__ == "__main__":
    main()
