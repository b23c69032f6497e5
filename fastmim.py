r"""FastMIM: small images, one learned colour in the place of hidden pixels, and histograms of
gradients to predict: for any backbone.

What the encoder gets is a plain image, so it need not know of masks. 128 px instead of 224 leave a
third of the work. A histogram of oriented gradients (HOG) says where edges run and not which colour
they have.

    imgs (B,C,H,W) --colour where hidden--> imgs --embed, encode--> latent (B,P+N,D)
      |                                                               | a few blocks, no positions
      +--target--> HOG of every token (B,N,9*C*cells) <--error--> pred (B,N,9*C*cells)

Paper: Guo et al., FastMIM: Expediting Masked Image Modeling Pre-training for Vision, arXiv
2212.06593; sections and tables are those of a later edition, Empirical Study on Enhancing
Efficiency in Masked Image Modeling Pre-training. FastMIM-P, on growing images, is three runs in a
row: `python -m tools.fastmim_p`.

    CPU     python fastmim.py --config configs/fastmim_tiny.yaml --out runs/fastmim     (loss 0.063)
    1 GPU   python fastmim.py --config configs/fastmim_vit_b.yaml --data /data/imagenet \
                --out runs/fastmim_vit_b
    8 GPUs  torchrun --nproc-per-node 8 fastmim.py --config configs/fastmim_vit_b.yaml \
                --data /data/imagenet --out runs/fastmim_vit_b                        (not measured)
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import models
from common import (
    checkpoint,
    config,
    engine,
    figures,
    layers,
    neighbours,
    optim,
    plan,
    randomness,
    transforms,
    weights,
)


@dataclass
class Config(config.RunConfig):
    """Pre-training of ViT-B for 800 epochs (FastMIM, Table 11, and its released recipe)."""
    # The method
    model: str = "vit_b"  # vit_*, swin_*, pvt_{tiny,s}, pvtv2_{tiny,b2,b5}, torchvision:NAME
    patch_size: int = 0  # pixels; 0 is 16 for a ViT and 4 for a pyramid
    window: int = 4  # side of Swin's windows in tokens
    mask_unit: int = 0  # pixels, side of what is hidden; 0 is one token of the last map
    mask_ratio: float = 0.75  # share of units that is hidden, in [0, 1); rounds what stays down
    target: str = "hog"  # hog, pixels, norm_pixels (each token's pixels to mean 0, std 1)
    decoder_depth: int = 1  # blocks; 0 for a linear layer instead of a decoder
    decoder_width: int = 256  # channels
    decoder_heads: int = 0  # attention heads; 0 is one for every 32 channels
    teacher: str = "none"  # distillation: a trained encoder's encoder.pt, or torchvision:NAME
    teacher_weight: float = 1.0  # of the distillation loss beside that of the target
    init: str = "none"  # last.pt of an earlier run, of another size maybe, to start from
    # The recipe
    img_size: config.Size = (128, 128)  # height x width in pixels
    in_chans: int = 3  # image channels
    crop_scale: tuple[float, float] = (0.2, 1.0)  # area that a crop covers; 1,1 for none
    shift: int = 0  # largest random shift in pixels; the border is mirrored
    flip: float = 0.5  # probability of a horizontal flip
    epochs: float = 800.0  # passes over the images
    warmup_epochs: float = 20.0  # linear warm-up of the learning rate
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
        config.one_of(self, target="hog pixels norm_pixels")
        config.in_range(self, mask_ratio="[0, 1)", teacher_weight="[0, inf)", mask_unit="[0, inf)",
                        shift="[0, inf)")


# ---------------------------------------- Histograms of oriented gradients

BINS = 9  # orientations in half a turn (FastMIM, 4.1)


def hog(imgs, cell):
    """imgs (B, C, H, W), fp32 -> (B, C*9, H/cell, W/cell), channels slowest: for every cell and
    channel, how much gradient there is in each orientation, of norm 1 (Dalal & Triggs, 2005, as
    MaskFeat has it). Sobel filters gx, left less right, and gy, top less bottom, on images with a
    reflected border. A pixel adds the strength of its gradient to bin floor(9 * atan2(gx, gy) / pi)
    mod 9 of its cell; no votes are shared between bins or cells, and there are no blocks."""
    B, C, H, W = imgs.shape
    h, w = H // cell, W // cell
    padded = F.pad(imgs, (1, 1, 1, 1), mode="reflect")  # (B, C, H + 2, W + 2)

    def neighbour(down, right):
        """Every pixel's neighbour, -1 to 1 rows down and columns to the right."""
        return padded[:, :, 1 + down : 1 + down + H, 1 + right : 1 + right + W]

    # Sobel filters, written out so that all devices round alike: on a straight edge one gradient is
    # 0 but for rounding, and that decides on the bin.
    gx = (neighbour(-1, -1) - neighbour(-1, 1)
          + 2 * neighbour(0, -1) - 2 * neighbour(0, 1)
          + neighbour(1, -1) - neighbour(1, 1))
    gy = (neighbour(-1, -1) + 2 * neighbour(-1, 0) + neighbour(-1, 1)
          - neighbour(1, -1) - 2 * neighbour(1, 0) - neighbour(1, 1))

    # A gradient and its opposite are one orientation; all of its strength goes to one bin.
    strength = torch.hypot(gx, gy)
    half_turns = torch.atan2(gx, gy) / math.pi  # -1 to 1
    bin = (half_turns * BINS).floor().long() % BINS

    # Every pixel votes in the histogram of its cell.
    row = torch.arange(H, device=imgs.device)[:, None] // cell  # (H, 1)
    column = torch.arange(W, device=imgs.device) // cell  # (W,)
    index = (bin * h + row) * w + column  # (B, C, H, W), a place in a map (9, h, w)
    histograms = imgs.new_zeros(B, C, BINS * h * w)
    histograms.scatter_add_(2, index.flatten(2), strength.flatten(2))
    histograms = histograms.view(B, C, BINS, h, w)  # (B, C, 9, h, w)
    return F.normalize(histograms, dim=2).flatten(1, 2)  # (B, C*9, h, w)


# ---------------------------------------- Model

class FastMIM(nn.Module):
    """The model that `cfg` describes. ValueError if its sizes do not fit together."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        options = {"window": cfg.window} if cfg.model.startswith("swin") else {}
        self.encoder = models.build(
            cfg.model, cfg.img_size, cfg.patch_size, cfg.in_chans, **options)
        self.encoder.checkpointing = cfg.activation_checkpointing

        self.stride = self.encoder.out_stride  # pixels of a token of the latent
        self.mask_unit = cfg.mask_unit or self.stride
        # DIFF: FastMIM's cells are 8 px; here the largest divisor up to 8 of which two fit a token,
        # for small images.
        divisors = [n for n in range(1, 9) if self.stride % n == 0 and 2 * n <= self.stride]
        self.cell = max(divisors, default=1)
        self.part = self.cell if cfg.target == "hog" else 1  # pixels that are hidden as one
        self.require_fit()

        h, w = cfg.img_size
        self.grid = (h // self.mask_unit, w // self.mask_unit)
        self.num_units = self.num_noise = self.grid[0] * self.grid[1]  # U
        kept = self.num_units * (1 - cfg.mask_ratio)
        self.num_kept = math.floor(kept + 1e-9)  # 100 * (1 - 0.9) is 9.999...
        if self.num_kept == 0:
            raise ValueError(f"--mask_ratio {cfg.mask_ratio} hides all {self.num_units} units of "
                             f"{self.mask_unit} px: it must be lower, or --mask_unit smaller")

        cells = (self.stride // self.part) ** 2  # of a token
        out_width = cells * cfg.in_chans * (BINS if cfg.target == "hog" else 1)
        if cfg.decoder_depth:
            self.decoder = models.Decoder(
                self.encoder.width, out_width, None, cfg.decoder_width, cfg.decoder_depth,
                cfg.decoder_heads or max(1, cfg.decoder_width // 32), self.encoder.num_prefix,
                eps=1e-5 if options else 1e-6)  # Swin's norms have 1e-5
            self.decoder.checkpointing = cfg.activation_checkpointing
        else:
            self.decoder = nn.Linear(self.encoder.width, out_width)
        self.mask_token = nn.Parameter(torch.randn(1, cfg.in_chans, 1, 1) * 0.02)  # a colour

        self.teacher = None
        if cfg.teacher != "none":
            self.teacher = weights.frozen_encoder(
                cfg.teacher, cfg, models.from_arch, models.SIZES)
            self.project = nn.Linear(self.encoder.width, self.teacher.width)
            if self.teacher.out_stride != self.stride:
                raise ValueError("--teacher and --model need equal strides, not "
                                 f"{self.teacher.out_stride}, {self.stride}")
        resumes = cfg.resume and checkpoint.exists(Path(cfg.out) / "last.pt")
        if cfg.init != "none" and not cfg.plan and not resumes:
            start_from(self, cfg.init)

    def require_fit(self):
        """ValueError, with the way out, unless units, cells, tokens and image fit together."""
        cfg, unit, part, stride = self.cfg, self.mask_unit, self.part, self.stride
        if cfg.target == "hog" and stride < 2:
            raise ValueError("--target hog needs tokens of 2 px or more; pixels and norm_pixels "
                             "take any of two values")
        if unit % part or (unit % stride and stride % unit):
            raise ValueError(f"--mask_unit {unit} must be a multiple of {part} that divides "
                             f"{stride}, the stride of {cfg.model}, or a multiple of {stride}")
        h, w = cfg.img_size
        step = max(unit, stride)  # one divides the other
        if h % step or w % step:
            raise ValueError(f"--img_size {h}x{w} must be divisible by --mask_unit {unit} and by "
                             f"{stride}, the stride of {cfg.model}, as "
                             f"{layers.next_size(cfg.img_size, step)} is")

    def forward(self, imgs, noise):
        """imgs (B, C, H, W) normalised, noise (B, U) uniform in [0, 1) -> loss, a scalar."""
        mask = self.mask(noise)
        latent = self.encode(imgs, mask)
        pred = self.decode(latent)
        loss = self.loss(pred, self.target(imgs), mask)
        if self.teacher:
            distance = self.distil(latent, imgs)
            self.terms = {"target_loss": loss.detach(), "distillation_loss": distance.detach()}
            loss = loss + self.cfg.teacher_weight * distance
        return loss

    def mask(self, noise):
        """noise (B, U) of the units -> mask (B, U) bool, True = hidden; floor(U * (1 - ratio)) of
        them stay visible, those with the lowest noise, of equal ones the first."""
        rank = noise.argsort(dim=1, stable=True).argsort(dim=1)  # (B, U)
        return rank >= self.num_kept

    def encode(self, imgs, mask):
        """Hidden pixels take the learned colour; what is left is an image -> latent (B, P + N, D),
        P class tokens first."""
        hidden = layers.expand_mask(mask, self.grid, self.mask_unit)[:, None]  # (B, 1, H, W)
        return self.encoder(torch.where(hidden, self.mask_token, imgs))  # (B, P + N, D)

    def decode(self, latent):
        """No mask token, no position: the encoder has seen all places. latent (B, P + N, D) ->
        (B, N, out_width)."""
        if self.cfg.decoder_depth:
            return self.decoder(self.decoder.embed(latent))
        return self.decoder(latent[:, self.encoder.num_prefix :])

    def target(self, imgs):
        """What to predict of each token of the latent, fp32: its HOG cells (B, N, C*9 * cells),
        cells fastest, or its pixels (B, N, pixels * C), channels fastest."""
        imgs = imgs.float()
        if self.cfg.target == "hog":
            with torch.autocast(imgs.device.type, enabled=False):
                cells = hog(imgs, self.cell)  # (B, C*9, H/cell, W/cell)
            tokens = F.pixel_unshuffle(cells, self.stride // self.cell)  # (B, C*9 * cells, h, w)
            return tokens.flatten(2).transpose(1, 2)  # (B, N, C*9 * cells)

        patches = layers.patchify(imgs, self.stride)  # (B, N, pixels * C)
        if self.cfg.target == "norm_pixels":
            mean, std = layers.patch_statistics(patches)
            patches = (patches - mean) / std
        return patches

    def loss(self, pred, target, mask):
        """Mean squared error over all hidden parts of the batch, fp32 (FastMIM, 4.1); 0 if none is.
        Parts of a token are its HOG cells or its pixels; a small mask unit hides some of them."""
        # DIFF: FastMIM's mask units have the size of a token of the last map; where --mask_unit is
        # smaller, the hidden cells or pixels of a token count.
        hidden = layers.expand_mask(mask, self.grid, self.mask_unit // self.part)[:, None]
        hidden = layers.patchify(hidden, self.stride // self.part)  # (B, N, parts)
        num_parts = hidden.shape[2]  # cells or pixels of a token

        error = (pred.float() - target).square()  # (B, N, out_width)
        if self.cfg.target == "hog":  # cells fastest
            error = error.unflatten(2, (-1, num_parts)).mean(dim=2)  # (B, N, parts)
        else:  # channels fastest
            error = error.unflatten(2, (num_parts, -1)).mean(dim=3)  # (B, N, parts)
        return (error * hidden).sum() / hidden.sum().clamp(min=1)

    def distil(self, latent, imgs):
        """How far the projected latent is from what the teacher makes of the whole image, fp32
        (FastMIM, 5.6)."""
        # DIFF: of FastMIM's distillation, layers and scale are not given; here it is the last map,
        # normalised, in mean.
        with torch.no_grad():
            wanted = self.teacher(imgs)[:, self.teacher.num_prefix :].float()  # (B, N, D')
            wanted = F.layer_norm(wanted, wanted.shape[2:])
        found = self.project(latent[:, self.encoder.num_prefix :]).float()  # (B, N, D')
        return F.l1_loss(found, wanted)

    # The teacher is no part of what is trained: it stays in eval mode, where BatchNorm goes by the
    # averages that it came with, and out of checkpoints.

    def train(self, mode=True):
        super().train(mode)
        if self.teacher:
            self.teacher.eval()
        return self

    def state_dict(self, *args, **options):
        tensors = super().state_dict(*args, **options)
        return {name: tensor for name, tensor in tensors.items() if not name.startswith("teacher.")}

    def load_state_dict(self, tensors, *args, **options):
        own = {name: tensor for name, tensor in super().state_dict().items()
               if name.startswith("teacher.")}
        return super().load_state_dict({**tensors, **own}, *args, **options)


def start_from(model, path):
    """Copy the weights of an earlier run's last.pt into `model`, which may be of another image size
    (FastMIM-P). ValueError if it is another model."""
    saved = checkpoint.read(path)
    checkpoint.require_run(saved, path)
    then, now = dict(saved["config"]), dict(vars(model.cfg))
    for options in (then, now):  # 0 is the default, which follows from the width
        heads = max(1, model.cfg.decoder_width // 32)
        options["decoder_heads"] = options.get("decoder_heads") or heads
    for name in ("model", "in_chans", "target", "teacher", "decoder_heads"):
        if then.get(name) != now[name]:
            raise ValueError(f"{path} is of a run with --{name} {then.get(name)}, not {now[name]}")
    tensors, notes = weights.fit_run(saved, model.encoder, path)
    checkpoint.load_exactly(model, tensors, path)
    notes = [f"weights start from {path}, step {saved['step']}", *notes]
    config.print_once("; ".join(notes))


@torch.no_grad()
def prepare(model, imgs, noise):
    """Before the first step: the loss of two trivial predictors (zero, and the mean target of
    `imgs`), which first losses are read against."""
    target, mask = model.target(imgs), model.mask(noise)
    mean = target.mean(dim=(0, 1)).expand_as(target)
    guesses = {"zero": torch.zeros_like(target), "mean": mean}
    return {name: round(model.loss(pred, target, mask).item(), 4) for name, pred in guesses.items()}


@torch.no_grad()
def reconstruct(model, imgs, noise):
    """{row title: images (B, C, H, W) in [0, 1]}; imgs normalised. HOG has no colours: it is drawn
    as strokes along edges. Mean and contrast of a normalised target are the original's."""
    mask = model.mask(noise)
    pred, target = model.decode(model.encode(imgs, mask)).float(), model.target(imgs)
    hidden = layers.expand_mask(mask, model.grid, model.mask_unit)[:, None]  # (B, 1, H, W)
    masked = imgs.masked_fill(hidden, 0.0)
    rows = {"original": transforms.denormalize(imgs, model.cfg),
            "masked": transforms.denormalize(masked, model.cfg)}
    h, w = imgs.shape[2] // model.stride, imgs.shape[3] // model.stride

    if model.cfg.target == "hog":
        size = model.stride // model.cell
        target = F.pixel_shuffle(layers.as_map(target, (h, w)), size)  # (B, C*9, H/cell, W/cell)
        pred = F.pixel_shuffle(layers.as_map(pred, (h, w)), size)  # (B, C*9, H/cell, W/cell)
        hidden = layers.expand_mask(mask, model.grid, model.mask_unit // model.cell)[:, None]
        rows["HOG"] = figures.bright_glyphs(target)
        rows["prediction"] = figures.bright_glyphs(figures.dimmed(pred, hidden))
        rows["prediction\nand visible"] = figures.bright_glyphs(torch.where(hidden, pred, target))
        return rows

    note = ""
    if model.cfg.target == "norm_pixels":
        mean, std = layers.patch_statistics(layers.patchify(imgs, model.stride))
        pred = pred * std + mean
        note = "\n(true mean and std\nof each token)"
    pred = layers.unpatchify(pred, model.stride, (h, w))  # (B, C, H, W)
    seen = figures.dimmed(pred, hidden)
    rows["prediction" + note] = transforms.denormalize(seen, model.cfg)
    rows["prediction\nand visible"] = transforms.denormalize(
        torch.where(hidden, pred, imgs), model.cfg)
    return rows


# ---------------------------------------- Training

@engine.record
def main(argv=None):
    cfg = config.parse(Config, __doc__, argv)
    run = engine.Run(cfg)  # processes, device, precision
    with config.user_errors():  # what is wrong with options, images or a checkpoint: one line
        if cfg.plan:
            return plan.show(cfg, FastMIM)
        model = FastMIM(cfg).to(run.device)
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
