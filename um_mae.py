r"""UM-MAE: MAE for pyramids. Of every 2x2 cell of units keep one; what is kept is again an image,
of half the side.

A window or a pooled key needs a map without holes. Uniform sampling leaves one unit of every cell,
and these make a compact image: a quarter of the work from the first layer on. As this makes the
task too easy, a quarter of the kept units is then hidden behind a token (secondary masking).

    imgs (B,C,H,W) --gather--> compact (B,C,H/2,W/2) --embed, token where hidden, encode--> latent
      |                                                                                       |
      +--target--> (B,U,u*u*C) <-- squared error on dropped units --> pred <--units, decode---+

Paper: Li et al., Uniform Masking: Enabling MAE Pre-training for Pyramid-based Vision Transformers
with Locality, arXiv 2205.10063.

    CPU     python um_mae.py --config configs/um_mae_tiny.yaml --out runs/um_mae         (loss 0.39)
    1 GPU   python um_mae.py --config configs/um_mae_swin_t.yaml --data /data/imagenet \
                --out runs/um_mae_swin_t
    8 GPUs  torchrun --nproc-per-node 8 um_mae.py --config configs/um_mae_swin_t.yaml \
                --data /data/imagenet --out runs/um_mae_swin_t                        (not measured)
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import models
from common import config, engine, figures, layers, neighbours, optim, plan, randomness, transforms


@dataclass
class Config(config.RunConfig):
    """Pre-training of Swin-T for 200 epochs (UM-MAE, 4.2)."""
    # The method
    model: str = "swin_t"  # swin_{tiny,t,b,l}, pvt_{tiny,s}, or a ViT
    patch_size: int = 0  # pixels; 0 is 16 for a ViT and 4 for a pyramid
    window: int = 16  # side of Swin's windows in tokens of the full map; half of it on the compact
    reduction: tuple[int, int, int, int] = (8, 4, 2, 1)  # PVT: pooling of keys, on the full map
    unit: int = 16  # pixels; what is kept or dropped are squares of this side
    sampling: str = "uniform"  # one random unit of every 2x2 cell; grid: the top-left; random (ViT)
    secondary_ratio: float = 0.25  # share of kept units that is hidden behind a token, in [0, 1)
    published_order: bool = False  # decode a pyramid's tokens where the released code puts them
    target: str = "norm_pixels"  # pixels, norm_pixels (each unit to mean 0, std 1)
    decoder_depth: int = 2  # blocks
    decoder_width: int = 512  # channels
    decoder_heads: int = 16  # attention heads
    # The recipe
    img_size: config.Size = (256, 256)  # height x width in pixels
    in_chans: int = 3  # image channels
    crop_scale: tuple[float, float] = (0.2, 1.0)  # area that a crop covers; 1,1 for none
    shift: int = 0  # largest random shift in pixels; the border is mirrored
    flip: float = 0.5  # probability of a horizontal flip
    epochs: float = 200.0  # passes over the images
    warmup_epochs: float = 10.0  # linear warm-up of the learning rate
    batch_size: int = 4096  # images of one optimizer step, over all processes
    micro_batch: int = 512  # images that one process holds at once
    base_lr: float = 1.5e-4  # per lr_batch images: lr = base_lr * batch_size / lr_batch
    lr_batch: int = 256  # images that base_lr is stated for
    min_lr: float = 0.0  # end of the cosine
    weight_decay: float = 0.05  # AdamW
    betas: tuple[float, float] = (0.9, 0.95)  # AdamW
    clip_grad: float = 0.0  # largest gradient norm; 0 for no clipping

    def check(self):
        super().check()
        config.one_of(self, sampling="uniform grid random", target="pixels norm_pixels")
        config.in_range(self, secondary_ratio="[0, 1)", unit="[1, inf)", window="[1, inf)",
                        shift="[0, inf)")
        if self.model.startswith(("pvtv2", "torchvision:")):
            raise ValueError(f"--model {self.model}: UM-MAE takes vit_*, swin_* and pvt_*; most "
                             "other networks look across the borders of units, which are no "
                             "neighbours in a compact image")


# ---------------------------------------- Masks: noise (B, U), grid (h, w) of units -> ids_keep

def uniform_sampling(noise, grid):
    """ids_keep (B, U/4): in every 2x2 cell, the unit with the lowest noise, the first of equals;
    cells in raster order (UM-MAE, 3.1)."""
    # DIFF: UM-MAE's released code draws the places from a pool in which all four are equally
    # frequent; here they are independent, which makes the same marginals.
    B, (h, w) = len(noise), grid
    cells = noise.view(B, h // 2, 2, w // 2, 2).transpose(2, 3)  # (B, h/2, w/2, 2, 2)
    place = cells.flatten(3).argmin(dim=3)  # (B, h/2, w/2), 0 to 3: which of the cell's units
    row = 2 * torch.arange(h // 2, device=noise.device)[:, None] + place // 2
    column = 2 * torch.arange(w // 2, device=noise.device) + place % 2
    return (row * w + column).flatten(1)  # (B, U/4)


def grid_sampling(noise, grid):
    """ids_keep (B, U/4): the top-left unit of every 2x2 cell."""
    raster = torch.arange(noise.shape[1], device=noise.device)  # lowest at the top left
    return uniform_sampling(raster.expand_as(noise), grid)


def random_sampling(noise, grid):
    """ids_keep (B, U // 4): a random quarter of all units, in raster order (MAE)."""
    ids_shuffle = noise.argsort(dim=1, stable=True)  # (B, U)
    return ids_shuffle[:, : noise.shape[1] // 4].sort(dim=1).values


SAMPLING = {"uniform": uniform_sampling, "grid": grid_sampling, "random": random_sampling}


def secondary_mask(noise, ids_keep, ratio):
    """Which of the kept units are hidden behind a token: bool (B, K), True = hidden. Those with the
    lowest noise (B, U) stay visible, of equal ones the first: floor(K * (1 - ratio)) of them in
    exact arithmetic, and at least 1 (UM-MAE, 3.2)."""
    num_visible = max(1, math.floor(ids_keep.shape[1] * (1 - ratio) + 1e-9))
    noise = noise.gather(1, ids_keep)  # (B, K)
    rank = noise.argsort(dim=1, stable=True).argsort(dim=1)  # (B, K)
    return rank >= num_visible


# ---------------------------------------- Model

class UMMAE(nn.Module):
    """The model that `cfg` describes. ValueError if its sizes do not fit together."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        options = {}
        if cfg.model.startswith("swin"):
            options = {"bias": "continuous", "window": cfg.window, "compact": 2}
        elif cfg.model.startswith("pvt"):
            options = {"reduction": cfg.reduction, "compact": 2}
        self.encoder = models.build(
            cfg.model, cfg.img_size, cfg.patch_size, cfg.in_chans, **options)
        self.require_fit()

        h, w = cfg.img_size
        self.grid = (h // cfg.unit, w // cfg.unit)
        self.num_units = self.grid[0] * self.grid[1]  # U
        self.num_noise = 2 * self.num_units  # for sampling, and for secondary masking
        self.up = self.encoder.out_stride // cfg.unit  # a latent token stands for up x up units
        token_width = self.encoder.embed_width
        self.secondary_token = nn.Parameter(torch.randn(1, 1, token_width) * 0.02)
        self.mask_token = nn.Parameter(torch.randn(1, 1, cfg.decoder_width) * 0.02)
        self.decoder = models.Decoder(
            self.encoder.width, cfg.unit**2 * cfg.in_chans, self.grid, cfg.decoder_width,
            cfg.decoder_depth, cfg.decoder_heads, self.encoder.num_prefix, up=self.up)
        self.encoder.checkpointing = self.decoder.checkpointing = cfg.activation_checkpointing

    def require_fit(self):
        """ValueError, with the way out, unless units, windows, pooling and image fit together."""
        cfg, unit = self.cfg, self.cfg.unit
        stride, out_stride = self.encoder.stride, self.encoder.out_stride
        if out_stride > stride and cfg.sampling == "random":
            raise ValueError("--sampling random leaves holes in the map of a pyramid, which takes "
                             "uniform or grid")
        if unit % stride or out_stride % unit:
            raise ValueError(f"--unit {unit} must be divisible by {stride} and divide "
                             f"{out_stride}, the strides of {cfg.model}")

        two_units = [max(1, 2 * unit // stride >> stage) for stage in range(4)]  # in tokens
        if cfg.model.startswith("swin") and cfg.window % two_units[0]:
            raise ValueError(f"--window {cfg.window} cuts units of {unit} px: it must be divisible "
                             f"by {two_units[0]}")
        if cfg.model.startswith("swin") and cfg.window % (2 * two_units[0]):
            if cfg.window < max(self.encoder.grid):  # so that windows are shifted (UM-MAE, 3.1)
                config.print_once(f"shifted windows of {cfg.window} tokens cut units of {unit} px: "
                                  f"better --window {2 * two_units[0]}, or a multiple")
        fits = [pool % n == 0 and (pool % 2 == 0 or pool == 1)
                for pool, n in zip(cfg.reduction, two_units, strict=True)]
        if cfg.model.startswith("pvt") and not all(fits):
            reduction = ",".join(map(str, cfg.reduction))
            multiples = ",".join(map(str, two_units))
            raise ValueError(f"--reduction {reduction} cuts units of {unit} px: it must be "
                             f"multiples of {multiples}, even or 1")
        h, w = cfg.img_size
        if h % (2 * out_stride) or w % (2 * out_stride):
            raise ValueError(f"--img_size {h}x{w} must be divisible by {2 * out_stride} (cells of "
                             f"2x2, a stride of {out_stride} of {cfg.model}), as "
                             f"{layers.next_size(cfg.img_size, 2 * out_stride)} is")

    def forward(self, imgs, noise):
        """imgs (B, C, H, W) normalised, noise (B, 2U) uniform in [0, 1) -> loss, a scalar."""
        ids_keep, is_secondary, mask = self.mask(noise)
        latent = self.encode(imgs, ids_keep, is_secondary)
        pred = self.decode(latent, ids_keep)
        return self.loss(pred, self.target(imgs), mask)

    def mask(self, noise):
        """noise (B, 2U) -> ids_keep (B, K) in the order of the compact image, is_secondary (B, K)
        bool, True = behind a token, and mask (B, U) bool, True = dropped. K = U/4."""
        first, second = noise.chunk(2, dim=1)  # each (B, U)
        ids_keep = SAMPLING[self.cfg.sampling](first, self.grid)
        is_secondary = secondary_mask(second, ids_keep, self.cfg.secondary_ratio)
        mask = torch.ones_like(first, dtype=torch.bool).scatter(1, ids_keep, False)  # (B, U)
        return ids_keep, is_secondary, mask

    def compact(self, x, ids_keep):
        """Kept units of a map (B, D, H, W), be it an image or something for each token, packed
        into one of a quarter of its size: (B, D, H/2, W/2). Random sampling leaves no map; its
        units make one row, (B, D, side, K*side): a ViT needs no more."""
        h, w = self.grid
        side = x.shape[2] // h  # of a unit in this map
        units = layers.patchify(x, side)  # (B, U, side*side*D)
        kept = layers.gather(units, ids_keep)  # (B, K, side*side*D)
        grid = (1, kept.shape[1]) if self.cfg.sampling == "random" else (h // 2, w // 2)
        return layers.unpatchify(kept, side, grid)  # (B, D, H/2, W/2)

    def encode(self, imgs, ids_keep, is_secondary):
        """Only kept units go through the encoder, some of them behind a token -> latent (B, P + K /
        up^2, D'), P class tokens first."""
        tokens = self.encoder.embed(self.compact(imgs, ids_keep))  # (B, N/4, D)

        # Where these tokens lie on the full grid: its coordinates, gathered like the pixels
        h, w = self.encoder.grid
        coords = layers.as_map(layers.raster((h, w), imgs.device), (h, w))  # (1, 2, h, w)
        coords = self.compact(coords.expand(len(imgs), -1, -1, -1), ids_keep)  # (B, 2, h/2, w/2)
        grid = tuple(coords.shape[2:])
        coords = coords.flatten(2).transpose(1, 2)  # (B, N/4, 2)

        # Secondary masking. Swin normalises what it embeds, and so this token, too.
        side = self.cfg.unit // self.encoder.stride  # of a unit, in tokens
        units = (grid[0] // side, grid[1] // side)
        hidden = layers.expand_mask(is_secondary, units, side).flatten(1)  # (B, N/4)
        token = self.encoder.patch_embed.norm(self.secondary_token).to(tokens.dtype)
        tokens = torch.where(hidden[..., None], token, tokens)  # (B, N/4, D)
        return self.encoder.encode(tokens, coords=coords, grid=grid)

    def decode(self, latent, ids_keep):
        """Latent tokens are unfolded into units by a pixel shuffle (UM-MAE, 3.3), and put at their
        own places among mask tokens; all units are predicted: (B, U, u*u*C). With published_order
        the tokens of a pyramid go, as they come, to the kept places in raster order."""
        num_prefix = self.encoder.num_prefix  # P
        x = self.decoder.embed(latent)  # (B, P + K / up^2, up^2 * decoder_width)
        prefix, kept = x[:, :num_prefix], x[:, num_prefix:]
        if self.up > 1:
            h, w = self.grid[0] // (2 * self.up), self.grid[1] // (2 * self.up)
            kept = F.pixel_shuffle(layers.as_map(kept, (h, w)), self.up)  # (B, D', h', w')
            kept = kept.flatten(2).transpose(1, 2)  # (B, K, decoder_width)

        # DIFF: UM-MAE's released code puts the tokens of a pyramid, which are in the order of
        # cells, at the kept places in raster order, so that three in four stand at a place that is
        # not theirs; --published_order does it, too.
        places = ids_keep
        if self.cfg.published_order and num_prefix == 0:
            places = ids_keep.sort(dim=1).values
        units = self.mask_token.to(x.dtype).expand(len(x), self.num_units, -1)
        units = units.scatter(1, places[..., None].expand_as(kept), kept)  # (B, U, decoder_width)
        if num_prefix:  # a ViT, whose tokens are units
            units = torch.cat([prefix, units], dim=1)  # (B, P + U, decoder_width)
        return self.decoder(units)  # (B, U, u*u*C)

    def target(self, imgs):
        """What to predict for each unit, fp32: (B, U, u*u*C)."""
        units = layers.patchify(imgs.float(), self.cfg.unit)  # (B, U, u*u*C)
        return self.normalise(units, imgs)

    def normalise(self, units, imgs):
        """Units (B, U, u*u*C) on the scale of the target of imgs, fp32."""
        if self.cfg.target == "norm_pixels":
            own = layers.patchify(imgs.float(), self.cfg.unit)  # (B, U, u*u*C)
            mean, std = layers.patch_statistics(own)
            return (units - mean) / std
        return units

    def loss(self, pred, target, mask):
        """Mean squared error over dropped units, fp32; units behind a secondary token carry none
        (released code)."""
        error = (pred.float() - target).square().mean(dim=2)  # (B, U)
        return (error * mask).sum() / mask.sum()


@torch.no_grad()
def prepare(model, imgs, noise):
    """Before the first step: the loss of two trivial predictors (zero, and each unit's own mean
    colour), which first losses are read against."""
    target, mask = model.target(imgs), model.mask(noise)[2]
    units = layers.patchify(imgs, model.cfg.unit)  # (B, U, u*u*C)
    flat = model.normalise(layers.mean_colours(units, model.cfg.in_chans), imgs)
    guesses = {"zero": torch.zeros_like(target), "unit mean": flat}
    return {name: round(model.loss(pred, target, mask).item(), 4) for name, pred in guesses.items()}


@torch.no_grad()
def reconstruct(model, imgs, noise):
    """{row title: images (B, C, H, W) in [0, 1]}: among them what sampling keeps, what secondary
    masking leaves of it, and the compact image, of half the side. imgs normalised."""
    unit = model.cfg.unit
    ids_keep, is_secondary, mask = model.mask(noise)
    pred = model.decode(model.encode(imgs, ids_keep, is_secondary), ids_keep).float()
    units = layers.patchify(imgs, unit)  # (B, U, u*u*C)

    note = ""
    if model.cfg.target == "norm_pixels":
        mean, std = layers.patch_statistics(units)
        pred = pred * std + mean
        note = "\n(true mean and std\nof each unit)"

    dropped = mask[..., None]  # (B, U, 1)
    hidden = mask.scatter(1, ids_keep, is_secondary)[..., None]  # (B, U, 1), dropped or behind one
    visible = layers.unpatchify(units.masked_fill(hidden, 0.0), unit, model.grid)  # (B, C, H, W)
    rows = {
        "original": imgs,
        f"{model.cfg.sampling} sampling":
            layers.unpatchify(units.masked_fill(dropped, 0.0), unit, model.grid),
        "secondary masking": visible,
        "compact image": model.compact(visible, ids_keep),
        "prediction" + note:
            layers.unpatchify(figures.dimmed(pred, dropped), unit, model.grid),
        "prediction\nand kept":
            layers.unpatchify(torch.where(dropped, pred, units), unit, model.grid),
    }
    return {title: transforms.denormalize(row, model.cfg) for title, row in rows.items()}


# ---------------------------------------- Training

@engine.record
def main(argv=None):
    cfg = config.parse(Config, __doc__, argv)
    run = engine.Run(cfg)  # processes, device, precision
    with config.user_errors():  # what is wrong with options, images or a checkpoint: one line
        if cfg.plan:
            return plan.show(cfg, UMMAE)
        model = UMMAE(cfg).to(run.device)
        dataset = data.pretrain_set(cfg)
        sampler = data.global_batches(len(dataset), cfg, run)
        preview = data.preview(dataset, cfg, model, run.device)  # images and their noise
        probe_sets = data.probe_sets(cfg, run)
        groups = optim.parameter_groups(model, cfg.weight_decay)
        optimizer = torch.optim.AdamW(groups, betas=cfg.betas, fused=True)
        schedule = optim.Schedule(cfg, sampler.steps_per_epoch)
        start_step = run.begin(model, optimizer, schedule, sampler, dataset,
                               loss_of_trivial_predictors=prepare(model, *preview))
    net = run.distribute(model)
    batches = data.loader(dataset, sampler.batches(start_step, run.last_step), cfg.workers)
    batches = run.timed(batches)

    for step in range(start_step, run.last_step):
        # Learning rate of this step
        lr = schedule.lr(step)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]

        # Forward and backward: one global batch, shared by processes and cut into micro-batches
        batch_size, num_micro_batches = sampler.size(step), sampler.num_micro_batches(step)
        noise = randomness.noise(cfg.seed, step, batch_size, model.num_noise)  # (batch_size, N)
        loss_sum = torch.zeros((), device=run.device)
        for micro_step in range(num_micro_batches):
            imgs, _, positions = next(batches)  # positions of these images in the global batch
            imgs = transforms.normalize(imgs.to(run.device, non_blocking=True), cfg)  # (B, C, H, W)
            own_noise = noise[positions].to(run.device, non_blocking=True)  # (B, N)
            is_last = micro_step == num_micro_batches - 1
            with run.sync_gradients(net, is_last), run.autocast():
                loss = net(imgs, own_noise) * (len(imgs) / batch_size)
            run.scaler.scale(loss * run.world_size).backward()  # DDP averages: this makes it a sum
            loss_sum += loss.detach()

        # Update
        run.scaler.unscale_(optimizer)
        grad_norm = optim.clip(model, cfg.clip_grad)
        loss, grad_norm = run.all_reduce_stats(step, lr, loss_sum, grad_norm)  # stops at a NaN
        run.scaler.step(optimizer)
        run.scaler.update()
        optimizer.zero_grad(set_to_none=True)

        # Log, picture, checkpoint, probe
        run.log(step, batch_size, loss, lr, grad_norm)
        if run.picture_due(step):
            rows = reconstruct(model, preview[0][:8], preview[1][:8])
            figures.grid(run.picture_path(step), rows, run.picture_title(step))
        if run.save_due(step):
            run.save(step, model, optimizer)
        if run.stop_requested:
            break
        if run.probe_due(step):
            neighbours.probe(run, step, model.encoder, *probe_sets)
    run.finish()


if __name__ == "__main__":
    main()
