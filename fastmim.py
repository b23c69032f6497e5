"""FastMIM: small images, hidden pixels under one learned colour, and histograms of gradients to predict: any backbone.

What the encoder gets is a plain image, so it need not know of masks; 128 px instead of 224 leave a third of the work.
A histogram of oriented gradients (HOG) says where edges run and not which colour they have, and so asks less of chance.

    imgs (B,C,H,W) --colour where hidden--> imgs --embed--> tokens (B,N,D) --encode--> latent (B,1+N',D')
      |                                                                                  | a few blocks, no positions
      +--target--> HOG of every token (B,N',9*C*cells) <-- squared error where hidden --> pred <--decode--+

Paper: FastMIM: Expediting Masked Image Modeling Pre-training for Vision, arXiv 2212.06593 (Guo et al., 2022).

    CPU     python fastmim.py --config configs/fastmim_tiny.yaml --out runs/fastmim      (not measured)
    1 GPU   python fastmim.py --config configs/fastmim_vit_b.yaml --data /data/imagenet --out runs/fastmim_b
    8 GPUs  torchrun --nproc-per-node 8 fastmim.py --config configs/fastmim_p_swin_l.yaml --data /data/imagenet ...
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import models
from common import engine, evaluate, figures, phases, teachers


@dataclass
class Config(engine.RunConfig):
    """Pre-training of ViT-B for 800 epochs (FastMIM, Table 11, and its released recipe)."""
    model: str = "vit_b"  # a ViT, swin_{tiny,t,b,l}, pvt_{tiny,s}, pvtv2_{tiny,b2,b5}, torchvision:NAME
    patch_size: int = 0  # pixels; 0 is 16 for a ViT and 4 for a pyramid
    window: int = 4  # side of Swin's windows in tokens
    mask_unit: int = 0  # pixels, side of what is hidden; 0 is one token of the last map
    mask_ratio: float = 0.75  # share of units that is hidden, in [0, 1); what is left is rounded down
    target: str = "hog"  # hog, pixels, norm_pixels (each token's pixels to mean 0, std 1)
    decoder_depth: int = 1  # blocks; 0 for a linear layer instead of a decoder
    decoder_width: int = 256  # channels
    decoder_heads: int = 0  # attention heads; 0 is one for every 32 channels
    teacher: str = "none"  # distillation: encoder.pt of a trained encoder, or torchvision:NAME with its weights
    teacher_weight: float = 1.0  # of the distillation loss beside that of the target
    init: str = "none"  # last.pt of an earlier run, of another image size maybe, whose weights to start from
    phase_sizes: str = "none"  # FastMIM-P: img_size of every phase, such as 128,160,192; see phases.py
    phase_epochs: str = "none"  # epochs of every phase, such as 200,100,100
    phase_batches: str = "none"  # batch_size of every phase; none for the same in all
    img_size: engine.Size = (128, 128)  # height x width in pixels
    in_chans: int = 3  # image channels
    crop_scale: tuple[float, float] = (0.2, 1.0)  # share of the image's area that a random crop covers; 1,1 for none
    flip: float = 0.5  # probability of a horizontal flip
    epochs: float = 800.0  # passes over the images
    warmup_epochs: float = 20.0  # linear warm-up of the learning rate
    batch_size: int = 4096  # images of one optimizer step, over all processes
    micro_batch: int = 256  # images that one process holds at once
    base_lr: float = 1.5e-4  # per lr_batch images: lr = base_lr * batch_size / lr_batch
    lr_batch: int = 256  # images that base_lr is stated for
    min_lr: float = 0.0  # end of the cosine
    weight_decay: float = 0.05  # AdamW
    betas: tuple[float, float] = (0.9, 0.95)  # AdamW
    clip_grad: float = 0.0  # largest gradient norm; 0 for no clipping


# ---------------------------------------- Histograms of oriented gradients

BINS = 9  # orientations in half a turn (FastMIM, 4.1)


def hog(imgs, cell):
    """imgs (B, C, H, W), fp32 -> (B, 9*C, H/cell, W/cell): for every cell and channel, how much gradient there is in
    each orientation, of norm 1 (Dalal & Triggs, 2005, as MaskFeat has it: Sobel filters, no overlapping blocks).

    The filters are written out in the order of their rows: on a straight edge one gradient is 0 but for rounding, which
    decides on the bin; a convolution would round as the device likes, to TF32 on some."""
    (H, W), x = imgs.shape[2:], F.pad(imgs, (1, 1, 1, 1), mode="reflect")  # x: (B, C, H + 2, W + 2)
    nw, n, ne, west, _, east, sw, s, se = (x[..., i : i + H, j : j + W] for i in range(3) for j in range(3))
    gx = nw - ne + 2 * west - 2 * east + sw - se  # (B, C, H, W)
    gy = nw + 2 * n + ne - sw - 2 * s - se
    # A gradient and its opposite are one orientation; all of its strength goes to one bin.
    bins = (torch.atan2(gx, gy) / math.pi * BINS).floor().long() % BINS
    h, w = H // cell, W // cell
    rows, columns = torch.arange(H, device=imgs.device)[:, None] // cell, torch.arange(W, device=imgs.device) // cell
    place = ((bins * h + rows) * w + columns).flatten(2)  # (B, C, H*W), in a histogram (9, h, w) of every channel
    votes = gx.new_zeros(*gx.shape[:2], BINS * h * w).scatter_add_(2, place, torch.hypot(gx, gy).flatten(2))
    return F.normalize(votes.unflatten(2, (BINS, h, w)), dim=2).flatten(1, 2)  # (B, C*9, h, w)


# ---------------------------------------- Model

class FastMIM(teachers.Student):
    """The model that `cfg` describes. ValueError if its options do not fit together."""

    def __init__(self, cfg):
        super().__init__()
        options = {"window": cfg.window} if cfg.model.startswith("swin") else {}
        self.encoder = models.build(cfg.model, cfg.img_size, cfg.patch_size, cfg.in_chans, **options)
        side, C = self.encoder.out_stride, cfg.in_chans  # pixels of a token of the latent
        self.unit = cfg.mask_unit or side
        # DIFF: FastMIM's cells are 8 px; here the largest divisor up to 8 of which two fit a token, for small images.
        self.cell = max(n for n in range(1, 9) if side % n == 0 and (2 * n <= side or n == 1))
        self.part = self.cell if cfg.target == "hog" else 1  # pixels of what can be hidden by itself
        self.check(cfg, side)
        self.cfg = cfg
        self.units = tuple(n // self.unit for n in cfg.img_size)
        self.num_noise = self.units[0] * self.units[1]  # U
        self.kept = math.floor(self.num_noise * (1 - cfg.mask_ratio) + 1e-9)  # 100 * (1 - 0.9) is 9.999...
        if self.kept == 0:
            raise ValueError(f"--mask_ratio {cfg.mask_ratio} hides all {self.num_noise} units of {self.unit} px: it "
                             "must be lower, or --mask_unit smaller")
        values = (BINS * C if cfg.target == "hog" else C) * (side // self.part) ** 2
        if cfg.decoder_depth:
            heads, eps = cfg.decoder_heads or max(1, cfg.decoder_width // 32), 1e-5 if options else 1e-6  # Swin: 1e-5
            self.decoder = models.Decoder(self.encoder.width, values, None, cfg.decoder_width, cfg.decoder_depth, heads,
                                          self.encoder.num_prefix, eps=eps)
            self.decoder.checkpointing = cfg.activation_checkpointing
        else:
            self.decoder = nn.Linear(self.encoder.width, values)
        self.encoder.checkpointing = cfg.activation_checkpointing
        self.mask_token = nn.Parameter(torch.randn(1, C, 1, 1) * 0.02)
        self.teacher = None if cfg.teacher == "none" else teachers.frozen_encoder(cfg.teacher, cfg)
        if self.teacher:
            self.project = nn.Linear(self.encoder.width, self.teacher.width)
            if self.teacher.out_stride != side:
                raise ValueError(f"--teacher and --model need equal strides, not {self.teacher.out_stride}, {side}")
        if cfg.init != "none" and not cfg.plan and not phases.goes_on(cfg):
            phases.start_from(self, cfg.init)

    def check(self, cfg, side):
        """ValueError, with the way out, unless units, parts, tokens and image fit together."""
        unit, part = self.unit, self.part
        if not 0 <= cfg.mask_ratio < 1 or cfg.target not in ("hog", "pixels", "norm_pixels"):
            raise ValueError("--mask_ratio must lie in [0, 1) and --target be hog, pixels or norm_pixels, not "
                             f"{cfg.mask_ratio} and {cfg.target}")
        if cfg.target == "hog" and side < 2:
            raise ValueError("--target hog needs tokens of 2 px or more; pixels and norm_pixels take any of two values")
        if unit < 1 or unit % part or (unit % side and side % unit):
            raise ValueError(f"--mask_unit {unit} must be a multiple of {part} that divides {side}, the stride of "
                             f"{cfg.model}, or a multiple of {side}")
        if any(n % unit or n % side for n in cfg.img_size):
            raise ValueError(f"--img_size {cfg.img_size[0]}x{cfg.img_size[1]} must be divisible by --mask_unit {unit} "
                             f"and by {side}, the stride of {cfg.model}, as "
                             f"{models.next_size(cfg.img_size, max(unit, side))} is")

    def embed(self, imgs, mask):
        """Hidden pixels take the learned colour; what is left is an image: (B, C, H, W) -> tokens (B, N, D)."""
        hidden = self.spread(mask, self.unit)  # (B, 1, H, W)
        return self.encoder.embed(torch.where(hidden, self.mask_token, imgs))

    def mask(self, noise):
        """Uniform noise (B, U) of the units -> mask (B, U) bool, True = hidden; floor(U * (1 - ratio)) stay visible."""
        return noise.argsort(dim=1, stable=True).argsort(dim=1) >= self.kept

    def spread(self, mask, size):
        """A mask of units (B, U) as a map with `size` to a unit's side: (B, 1, h*size, w*size)."""
        mask = mask.unflatten(1, (1, *self.units))  # (B, 1, h, w)
        return mask.repeat_interleave(size, 2).repeat_interleave(size, 3)  # (B, 1, h*size, w*size)

    def encode(self, tokens):
        return self.encoder.encode(tokens)  # (B, num_prefix + N', D')

    def decode(self, latent):
        """No mask token, no position: the encoder has seen all places. (B, num_prefix + N', D') -> (B, N', values)."""
        if self.cfg.decoder_depth:
            return self.decoder(self.decoder.embed(latent))
        return self.decoder(latent[:, self.encoder.num_prefix :])

    def target(self, imgs):
        """What to predict of each token of the latent, fp32: its HOG cells (B, N', 9*C * cells), bins slowest, or its
        pixels (B, N', pixels * C), channels fastest."""
        side, imgs = self.encoder.out_stride, imgs.float()
        if self.cfg.target == "hog":
            with torch.autocast(imgs.device.type, enabled=False):
                return F.pixel_unshuffle(hog(imgs, self.cell), side // self.cell).flatten(2).transpose(1, 2)
        patches = models.patchify(imgs, side)  # (B, N', side*side*C)
        if self.cfg.target == "norm_pixels":
            mean, std = models.patch_statistics(patches)
            patches = (patches - mean) / std
        return patches

    def loss(self, pred, target, mask):
        """Mean squared error over what is hidden, fp32 (FastMIM, 4.1); 0 if nothing is."""
        # DIFF: FastMIM's mask units have the size of a token of the last map; where --mask_unit is smaller, the hidden
        # cells or pixels of a token count.
        hidden = models.patchify(self.spread(mask, self.unit // self.part), self.encoder.out_stride // self.part)
        split, of = ((-1, hidden.shape[2]), 2) if self.cfg.target == "hog" else ((hidden.shape[2], -1), 3)
        error = (pred.float() - target).square().unflatten(2, split).mean(dim=of)  # (B, N', parts)
        return (error * hidden).sum() / hidden.sum().clamp(min=1)

    def forward(self, imgs, noise):
        """imgs (B, C, H, W) normalised, noise (B, U) uniform in [0, 1) -> loss, a scalar."""
        mask = self.mask(noise)
        latent = self.encode(self.embed(imgs, mask))
        pred = self.decode(latent)
        loss = self.loss(pred, self.target(imgs), mask)
        return loss + self.cfg.teacher_weight * self.distil(latent, imgs) if self.teacher else loss

    def distil(self, latent, imgs):
        """How far the projected latent is from what the teacher makes of the whole image, fp32 (FastMIM, 5.6)."""
        # DIFF: of FastMIM's distillation, layers and scale are not given; here it is the last map, normalised, in mean.
        with torch.no_grad():
            wanted = self.teacher.encode(self.teacher.embed(imgs))[:, self.teacher.num_prefix :].float()
        found = self.project(latent[:, self.encoder.num_prefix :]).float()  # (B, N', width of the teacher)
        return F.l1_loss(found, F.layer_norm(wanted, wanted.shape[2:]))

    def prepare(self, imgs, noise):
        """Before training: the loss of two trivial predictors (zero, and the mean target of `imgs`), which the first
        losses are to be read against."""
        target, mask = self.target(imgs), self.mask(noise)
        guesses = {"zero": torch.zeros_like(target), "mean": target.mean(dim=(0, 1)).expand_as(target)}
        return {name: round(self.loss(guess, target, mask).item(), 4) for name, guess in guesses.items()}


@torch.no_grad()
def reconstruct(model, imgs, noise):
    """{row title: images (B, C, H, W) in [0, 1]}; imgs normalised. HOG has no colours: it is drawn as strokes along the
    edges. A normalised target says nothing about a token's own mean and contrast: these come from the original."""
    mask, side, r = model.mask(noise), model.encoder.out_stride, model.encoder.out_stride // model.part
    grid = [n // side for n in imgs.shape[2:]]
    pred, target = model.decode(model.encode(model.embed(imgs, mask))).float(), model.target(imgs)
    hidden = model.spread(mask, model.unit)  # (B, 1, H, W)
    rows = {"original": data.denormalize(imgs), "masked": data.denormalize(imgs.masked_fill(hidden, 0.0))}
    if model.cfg.target == "hog":
        pred, target = (F.pixel_shuffle(x.transpose(1, 2).unflatten(2, grid), r) for x in (pred, target))
        pasted = torch.where(model.spread(mask, model.unit // model.part), pred, target)  # (B, 9*C, H/cell, W/cell)
        hogs = {"HOG": target, "prediction": pred, "prediction\nand visible": pasted}
        return rows | {title: figures.glyphs(cells) for title, cells in hogs.items()}
    note = ""
    if model.cfg.target == "norm_pixels":
        mean, std = models.patch_statistics(models.patchify(imgs, side))
        pred, note = pred * std + mean, "\n(true mean and std\nof each token)"
    pred = models.unpatchify(pred, side, grid)  # (B, C, H, W)
    pictures = {"prediction" + note: pred, "prediction\nand visible": torch.where(hidden, pred, imgs)}
    return rows | {title: data.denormalize(row) for title, row in pictures.items()}


# ---------------------------------------- Training

@engine.record
@phases.in_phases(Config, FastMIM, __doc__)
def main(argv=None):
    # Set-up: the same text in every method file, but for the name of the model.
    cfg = engine.configure(Config, __doc__, argv)
    run = engine.start(cfg)
    with engine.user_errors():
        if cfg.plan:
            return engine.plan(cfg, FastMIM)
        model = FastMIM(cfg).to(run.device)
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
