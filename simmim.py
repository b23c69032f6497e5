"""SimMIM: put a learned token in the place of hidden patches, encode everything, predict the hidden pixels linearly.

Unlike MAE's encoder, this one sees the whole grid, mask tokens included: slower, but any backbone that embeds patches
will do, pyramids with windows among them, and the decoder shrinks to one linear layer.

    imgs (B,C,H,W) --embed--> tokens (B,N,D) --token where hidden--> (B,N,D) --encode--> latent (B,N_out,D')
      |                                                                                      | linear, pixel shuffle
      +--target--> (B,C,H,W) <----- absolute error on hidden pixels -----> pred (B,C,H,W) <--+

Paper: Xie et al., SimMIM: A Simple Framework for Masked Image Modeling, arXiv 2111.09886; its 47 x 47 target is that of
Xie et al., Revealing the Dark Secrets of Masked Image Modeling, arXiv 2205.13543.

    CPU     python simmim.py --config configs/simmim_tiny.yaml --out runs/simmim         (not measured)
    1 GPU   python simmim.py --config configs/simmim_swin_b.yaml --data /data/imagenet --out runs/simmim_b
    8 GPUs  torchrun --nproc-per-node 8 simmim.py --config configs/simmim_swin_b.yaml --data /data/imagenet ...
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
    """Pre-training of Swin-B for 800 epochs (SimMIM's released recipe)."""
    model: str = "swin_b"  # a ViT, swin_{tiny,t,b,l}, pvt_{tiny,s}, torchvision:swin_v2_{t,s,b} (windows of 8)
    patch_size: int = 0  # pixels; 0 is 16 for a ViT and 4 for a pyramid
    window: int = 6  # side of Swin's windows in tokens
    bias: str = "table"  # of Swin's positions: table, or continuous as UM-MAE's Swin has it
    positions: str = "shared_bias"  # of a ViT: shared_bias as in BEiT, or absolute as in MAE
    layer_scale: float = 0.1  # of a ViT with shared_bias: initial scale of every branch
    mask_unit: int = 32  # pixels; what is hidden are squares of this side, whatever the patch size
    mask_ratio: float = 0.6  # share of units that is hidden, rounded up, in [0, 1)
    target: str = "pixels"  # pixels, or window_pixels: normalised by the 47 x 47 pixels around each
    drop_path: float = 0.0  # stochastic depth of the last block; grows linearly from 0 at the first
    img_size: engine.Size = (192, 192)  # height x width in pixels
    in_chans: int = 3  # image channels
    crop_scale: tuple[float, float] = (0.67, 1.0)  # share of the image's area that a random crop covers; 1,1 for none
    interpolation: str = "bilinear"  # of crops
    flip: float = 0.5  # probability of a horizontal flip
    epochs: float = 800.0  # passes over the images
    warmup_epochs: float = 10.0  # linear warm-up of the learning rate
    batch_size: int = 2048  # images of one optimizer step, over all processes
    micro_batch: int = 128  # images that one process holds at once
    base_lr: float = 1e-4  # per lr_batch images: lr = base_lr * batch_size / lr_batch
    lr_batch: int = 512  # images that base_lr is stated for
    schedule: str = "step"  # of the learning rate: cosine, or step (to a tenth after 7/8 of the run)
    min_lr: float = 0.0  # end of the cosine
    weight_decay: float = 0.05  # AdamW
    betas: tuple[float, float] = (0.9, 0.999)  # AdamW
    clip_grad: float = 5.0  # largest norm of the accumulated gradient; 0 for no clipping


# ---------------------------------------- Model

class SimMIM(nn.Module):
    """The model that `cfg` describes. ValueError if its options do not fit together."""

    def __init__(self, cfg):
        super().__init__()
        if not 0 <= cfg.mask_ratio < 1 or cfg.target not in ("pixels", "window_pixels"):
            raise ValueError("--mask_ratio must lie in [0, 1) and --target be pixels or window_pixels, not "
                             f"{cfg.mask_ratio} and {cfg.target}")
        self.cfg = cfg
        options = {"drop_path": cfg.drop_path}
        if cfg.model.startswith("swin"):
            options |= {"window": cfg.window, "bias": cfg.bias}
        elif cfg.model.startswith("vit") and cfg.positions != "absolute":
            options |= {"positions": cfg.positions, "layer_scale": cfg.layer_scale}
        self.encoder = models.build(cfg.model, cfg.img_size, cfg.patch_size, cfg.in_chans, **options)
        self.encoder.checkpointing = cfg.activation_checkpointing
        if not self.encoder.patchwise:
            raise ValueError(f"--model {cfg.model} has no tokens that stand for one patch each, to put mask tokens in "
                             "their place; fastmim.py, which masks pixels, takes it")
        unit, stride, out = cfg.mask_unit, self.encoder.stride, self.encoder.out_stride
        if unit < 1 or unit % stride:
            raise ValueError(f"--mask_unit {unit} must be divisible by {stride}, the patches of {cfg.model}")
        if any(n % unit or n % out for n in cfg.img_size):
            raise ValueError(f"--img_size {cfg.img_size[0]}x{cfg.img_size[1]} must be divisible by --mask_unit {unit} "
                             f"and by {out}, the stride of {cfg.model}, as "
                             f"{models.next_size(cfg.img_size, math.lcm(unit, out))} is")
        self.units = (cfg.img_size[0] // unit, cfg.img_size[1] // unit)
        self.num_units = self.units[0] * self.units[1]  # U
        self.num_noise = self.num_units + 2 * self.encoder.num_layers  # for the mask, and for stochastic depth
        self.mask_token = nn.Parameter(torch.randn(1, 1, self.encoder.embed_width) * 0.02)
        self.head = nn.Linear(self.encoder.width, out * out * cfg.in_chans)

    def embed(self, imgs):
        return self.encoder.embed(imgs)  # (B, N, D)

    def mask(self, noise):
        """Uniform noise (B, U) of the mask units -> mask (B, U) bool, True = hidden; ceil(U * ratio) of them are."""
        order = noise.argsort(dim=1, stable=True).argsort(dim=1)  # (B, U), rank of every unit
        return order >= self.num_units - math.ceil(self.num_units * self.cfg.mask_ratio - 1e-9)  # 10 * 0.3 is 3.000...4

    def spread(self, mask, size):
        """A mask of units (B, U) on squares of `size` to a unit's side: (B, h*size, w*size)."""
        mask = mask.unflatten(1, self.units)  # (B, h, w)
        return mask.repeat_interleave(size, 1).repeat_interleave(size, 2)  # (B, h*size, w*size)

    def encode(self, tokens, mask, noise=None):
        """The token in the place of what is hidden, before any position: (B, N, D) -> latent (B, N_out, D')."""
        hidden = self.spread(mask, self.cfg.mask_unit // self.encoder.stride).flatten(1)  # (B, N)
        tokens = torch.where(hidden[..., None], self.mask_token.to(tokens.dtype), tokens)  # (B, N, D)
        latent = self.encoder.encode(tokens, noise=noise)
        return latent[:, self.encoder.num_prefix :]  # (B, N_out, D')

    def decode(self, latent):
        """One linear layer paints the square of pixels that a latent token stands for: (B, C, H, W)."""
        h, w = (n // self.encoder.out_stride for n in self.cfg.img_size)
        squares = self.head(latent).transpose(1, 2).unflatten(2, (h, w))  # (B, C*s*s, h, w)
        return F.pixel_shuffle(squares, self.encoder.out_stride)  # (B, C, H, W)

    def target(self, imgs):
        """What to paint, fp32: the pixels (B, C, H, W), as they are or normalised by their neighbourhood."""
        return window_normalise(imgs.float()) if self.cfg.target == "window_pixels" else imgs.float()

    def loss(self, pred, target, mask):
        """Mean absolute error over hidden pixels and channels, fp32 (SimMIM, 3.4); 0 if none is hidden."""
        hidden = self.spread(mask, self.cfg.mask_unit)[:, None]  # (B, 1, H, W)
        return ((pred.float() - target).abs() * hidden).sum() / (hidden.sum() + 1e-5) / pred.shape[1]

    def forward(self, imgs, noise):
        """imgs (B, C, H, W) normalised, noise (B, U + 2 * layers) uniform in [0, 1) -> loss, a scalar."""
        mask = self.mask(noise[:, : self.num_units])
        latent = self.encode(self.embed(imgs), mask, noise[:, self.num_units :])
        pred = self.decode(latent)
        return self.loss(pred, self.target(imgs), mask)

    def prepare(self, imgs, noise):
        """Before training: the loss of two trivial predictors (zero, and each unit's true mean colour), which the
        first losses are to be read against."""
        target, mask = self.target(imgs), self.mask(noise[:, : self.num_units])
        flat = F.avg_pool2d(target, self.cfg.mask_unit).repeat_interleave(self.cfg.mask_unit, 2)  # (B, C, H, w)
        flat = flat.repeat_interleave(self.cfg.mask_unit, 3)  # (B, C, H, W)
        guesses = {"zero": torch.zeros_like(target), "unit mean": flat}
        return {name: round(self.loss(guess, target, mask).item(), 4) for name, guess in guesses.items()}


def window_normalise(imgs, window=47):
    """Every value minus the mean and over the std of its channel in the window x window pixels around it, as far as
    they lie in the image (B, C, H, W). Unbiased variance (Swin Transformer's released SimMIM, for the Dark Secrets)."""
    def average(x):  # of rows, then of columns: 94 terms for every pixel instead of 2209
        for size, padding in ((window, 1), (window // 2, 0)), ((1, window), (0, window // 2)):
            x = F.avg_pool2d(x, size, stride=1, padding=padding, count_include_pad=False)
        return x

    mean = average(imgs)
    count = F.avg_pool2d(torch.ones_like(imgs[:1, :1]), window, 1, window // 2, divisor_override=1)  # (1, 1, H, W)
    var = (average(imgs * imgs) - mean * mean) * count / (count - 1).clamp(min=1)
    return (imgs - mean) / (var.clamp(min=0) + 1e-6).sqrt()


@torch.no_grad()
def reconstruct(model, imgs, noise):
    """{row title: images (B, C, H, W) in [0, 1]}: original, masked, prediction, and prediction pasted between what was
    visible. imgs normalised. A window_pixels target is shown as it is, beside the original."""
    mask = model.mask(noise[:, : model.num_units])
    pred, target = model.decode(model.encode(model.embed(imgs), mask)).float(), model.target(imgs)
    hidden = model.spread(mask, model.cfg.mask_unit)[:, None]  # (B, 1, H, W)
    note = "\n(47 x 47 normalised)" if model.cfg.target == "window_pixels" else ""
    rows = {"original": imgs, "masked": imgs.masked_fill(hidden, 0.0), **({"target" + note: target} if note else {}),
            "prediction" + note: pred, "prediction\nand visible" + note: torch.where(hidden, pred, target)}
    return {title: data.denormalize(row) for title, row in rows.items()}


# ---------------------------------------- Training

@engine.record
def main(argv=None):
    # Set-up: the same text in every method file, but for the name of the model.
    cfg = engine.configure(Config, __doc__, argv)
    run = engine.start(cfg)
    with engine.user_errors():
        if cfg.plan:
            return engine.plan(cfg, SimMIM)
        model = SimMIM(cfg).to(run.device)
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
