r"""SimMIM: put a learned token in the place of hidden patches, encode everything, and predict the
hidden pixels with one linear layer.

Unlike MAE's encoder, this one sees the whole grid, mask tokens included. That is slower, but any
backbone that embeds patches will do, pyramids with windows among them, and the decoder shrinks to a
linear layer.

    imgs (B,C,H,W) --embed--> tokens (B,N,D) --token where hidden--> (B,N,D) --encode--> latent
      |                                                                                    |
      +--target--> (B,C,H,W) <---- absolute error on hidden pixels ----> pred <--linear----+

Paper: Xie et al., SimMIM: A Simple Framework for Masked Image Modeling, arXiv 2111.09886; the 47 x
47 target is that of Swin Transformer V2's released code.

    CPU     python simmim.py --config configs/simmim_tiny.yaml --out runs/simmim         (loss 0.35)
    1 GPU   python simmim.py --config configs/simmim_swin_b.yaml --data /data/imagenet \
                --out runs/simmim_swin_b
    8 GPUs  torchrun --nproc-per-node 8 simmim.py --config configs/simmim_swin_b.yaml \
                --data /data/imagenet --out runs/simmim_swin_b                        (not measured)
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
    """Pre-training of Swin-B for 800 epochs (SimMIM's released recipe)."""
    # The method
    model: str = "swin_b"  # a ViT, swin_{tiny,t,b,l}, pvt_{tiny,s}, torchvision:swin_v2_{t,s,b}
    patch_size: int = 0  # pixels; 0 is 16 for a ViT and 4 for a pyramid
    window: int = 6  # side of Swin's windows in tokens
    bias: str = "table"  # of Swin's positions: table, or continuous as UM-MAE's Swin has it
    positions: str = "shared_bias"  # of a ViT: shared_bias as in BEiT, or absolute as in MAE
    layer_scale: float = 0.1  # of a ViT with shared_bias: initial scale of every branch
    mask_unit: int = 32  # pixels; what is hidden are squares of this side, whatever the patch size
    mask_ratio: float = 0.6  # share of units that is hidden, rounded up, in [0, 1)
    target: str = "pixels"  # pixels, or window_pixels: normalised by the 47 x 47 pixels around each
    drop_path: float = 0.0  # stochastic depth of the last block; grows linearly from 0 at the first
    # The recipe
    img_size: config.Size = (192, 192)  # height x width in pixels
    in_chans: int = 3  # image channels
    crop_scale: tuple[float, float] = (0.67, 1.0)  # area that a crop covers; 1,1 for none
    interpolation: str = "bilinear"  # of crops
    shift: int = 0  # largest random shift in pixels; the border is mirrored
    flip: float = 0.5  # probability of a horizontal flip
    epochs: float = 800.0  # passes over the images
    warmup_epochs: float = 10.0  # linear warm-up of the learning rate
    batch_size: int = 2048  # images of one optimizer step, over all processes
    micro_batch: int = 128  # images that one process holds at once
    base_lr: float = 1e-4  # per lr_batch images: lr = base_lr * batch_size / lr_batch
    lr_batch: int = 512  # images that base_lr is stated for
    schedule: str = "step"  # of the lr: cosine, or step (to a tenth after 7/8 of the run)
    min_lr: float = 0.0  # end of the cosine
    weight_decay: float = 0.05  # AdamW
    betas: tuple[float, float] = (0.9, 0.999)  # AdamW
    clip_grad: float = 5.0  # largest norm of the accumulated gradient; 0 for no clipping

    def check(self):
        super().check()
        config.one_of(self, target="pixels window_pixels", interpolation="bilinear bicubic nearest")
        config.in_range(self, mask_ratio="[0, 1)", drop_path="[0, 1)", layer_scale="[0, inf)")
        config.in_range(self, mask_unit="[1, inf)", shift="[0, inf)")


# ---------------------------------------- Model

class SimMIM(nn.Module):
    """The model that `cfg` describes. ValueError if its sizes do not fit together."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        options = {"drop_path": cfg.drop_path}
        if cfg.model.startswith("swin"):
            options.update(window=cfg.window, bias=cfg.bias)
        elif cfg.model.startswith("vit") and cfg.positions != "absolute":
            options.update(positions=cfg.positions, layer_scale=cfg.layer_scale)
        self.encoder = models.build(
            cfg.model, cfg.img_size, cfg.patch_size, cfg.in_chans, **options)
        self.encoder.checkpointing = cfg.activation_checkpointing
        self.require_fit()

        h, w = cfg.img_size
        self.grid = (h // cfg.mask_unit, w // cfg.mask_unit)
        self.num_units = self.grid[0] * self.grid[1]  # U
        self.num_noise = self.num_units + 2 * self.encoder.num_layers  # mask, stochastic depth
        self.mask_token = nn.Parameter(torch.randn(1, 1, self.encoder.embed_width) * 0.02)
        if "positions" in options:
            layers.init_cut(self.mask_token)
        pixels = self.encoder.out_stride**2 * cfg.in_chans
        # DIFF: UM-MAE's SimMIM baselines shuffle the outputs of their head to a map of stride 16;
        # ours keep the last map's, 32: the same linear layer with its outputs in another order.
        self.head = nn.Linear(self.encoder.width, pixels)

    def require_fit(self):
        """ValueError, with the way out, unless units, patches and image fit together."""
        cfg, stride, out_stride = self.cfg, self.encoder.stride, self.encoder.out_stride
        if not self.encoder.patchwise:
            raise ValueError(f"--model {cfg.model} has no tokens that stand for one patch each, to "
                             "put mask tokens in their place; fastmim.py, which masks pixels, "
                             "takes it")
        if cfg.mask_unit % stride:
            raise ValueError(f"--mask_unit {cfg.mask_unit} must be divisible by {stride}, the "
                             f"patches of {cfg.model}")
        h, w = cfg.img_size
        step = math.lcm(cfg.mask_unit, out_stride)
        if h % step or w % step:
            raise ValueError(f"--img_size {h}x{w} must be divisible by --mask_unit {cfg.mask_unit} "
                             f"and by {out_stride}, the stride of {cfg.model}, as "
                             f"{layers.next_size(cfg.img_size, step)} is")

    def forward(self, imgs, noise):
        """imgs (B, C, H, W) normalised, noise (B, U + 2 * layers) uniform in [0, 1) -> loss."""
        mask = self.mask(noise[:, : self.num_units])
        latent = self.encode(imgs, mask, noise[:, self.num_units :])
        pred = self.decode(latent)
        return self.loss(pred, self.target(imgs), mask)

    def mask(self, noise):
        """noise (B, U) of the units -> mask (B, U) bool, True = hidden: those with the most noise,
        of equal ones the last, ceil(U * mask_ratio) of them in exact arithmetic."""
        num_hidden = math.ceil(self.num_units * self.cfg.mask_ratio - 1e-9)  # 10 * 0.3 is 3.000...4
        rank = noise.argsort(dim=1, stable=True).argsort(dim=1)  # (B, U)
        return rank >= self.num_units - num_hidden

    def encode(self, imgs, mask, noise=None):
        """The token takes the place of hidden patches before positions are added -> latent
        (B, N_out, D'), a token for each square of out_stride pixels and no class token. noise
        (B, 2 * layers): for stochastic depth, or none."""
        tokens = self.encoder.embed(imgs)  # (B, N, D)
        size = self.cfg.mask_unit // self.encoder.stride  # of a unit, in tokens
        hidden = layers.expand_mask(mask, self.grid, size).flatten(1)  # (B, N)
        mask_token = self.mask_token.to(tokens.dtype)
        tokens = torch.where(hidden[..., None], mask_token, tokens)  # (B, N, D)
        latent = self.encoder.encode(tokens, noise=noise)
        return latent[:, self.encoder.num_prefix :]  # (B, N_out, D')

    def decode(self, latent):
        """A linear layer predicts the square of pixels that a token of the latent (B, N_out, D')
        stands for: channels, then rows, then columns -> (B, C, H, W)."""
        stride = self.encoder.out_stride
        h, w = self.cfg.img_size[0] // stride, self.cfg.img_size[1] // stride
        squares = layers.as_map(self.head(latent), (h, w))  # (B, C*stride*stride, h, w)
        return F.pixel_shuffle(squares, stride)  # (B, C, H, W)

    def target(self, imgs):
        """What to predict, fp32 (B, C, H, W): pixels, or pixels normalised by those around."""
        if self.cfg.target == "window_pixels":
            return window_normalise(imgs.float())
        return imgs.float()

    def loss(self, pred, target, mask):
        """Mean absolute error over all hidden pixels of the batch and their channels, fp32; 0 if
        none is hidden (SimMIM, 3.4)."""
        hidden = layers.expand_mask(mask, self.grid, self.cfg.mask_unit)[:, None]  # (B, 1, H, W)
        error = (pred.float() - target).abs() * hidden  # (B, C, H, W)
        return error.sum() / (hidden.sum() + 1e-5) / pred.shape[1]


def local_mean(x, window):
    """Mean of the window x window values around each, as far as they lie in the image: down, then
    across, 94 terms for every pixel instead of 2209."""
    half = window // 2
    x = F.avg_pool2d(x, (window, 1), stride=1, padding=(half, 0), count_include_pad=False)
    return F.avg_pool2d(x, (1, window), stride=1, padding=(0, half), count_include_pad=False)


def window_normalise(imgs, window=47):
    """Every value of imgs (B, C, H, W) minus the mean and over the std of its channel in the window
    around it. Unbiased variance (Swin Transformer's released SimMIM, for the Dark Secrets)."""
    mean = local_mean(imgs, window)
    mean_of_squares = local_mean(imgs * imgs, window)
    ones = torch.ones_like(imgs[:1, :1])
    count = F.avg_pool2d(ones, window, 1, window // 2, divisor_override=1)  # (1, 1, H, W)
    var = (mean_of_squares - mean * mean) * count / (count - 1).clamp(min=1)
    return (imgs - mean) / (var.clamp(min=0) + 1e-6).sqrt()


@torch.no_grad()
def prepare(model, imgs, noise):
    """Before the first step: the loss of two trivial predictors (zero, and each unit's own mean
    colour), which first losses are read against."""
    target, mask = model.target(imgs), model.mask(noise[:, : model.num_units])
    colours = F.avg_pool2d(target, model.cfg.mask_unit)  # (B, C, h, w)
    flat = F.interpolate(colours, target.shape[2:], mode="nearest")  # (B, C, H, W)
    guesses = {"zero": torch.zeros_like(target), "unit mean": flat}
    return {name: round(model.loss(pred, target, mask).item(), 4) for name, pred in guesses.items()}


@torch.no_grad()
def reconstruct(model, imgs, noise):
    """{row title: images (B, C, H, W) in [0, 1]}; imgs normalised. A window_pixels target is shown
    as it is, beside the original."""
    mask = model.mask(noise[:, : model.num_units])
    pred, target = model.decode(model.encode(imgs, mask)).float(), model.target(imgs)
    hidden = layers.expand_mask(mask, model.grid, model.cfg.mask_unit)[:, None]  # (B, 1, H, W)

    rows = {"original": imgs, "masked": imgs.masked_fill(hidden, 0.0)}
    note = ""
    if model.cfg.target == "window_pixels":
        note = "\n(47 x 47 normalised)"
        rows["target" + note] = target
    rows["prediction" + note] = figures.dimmed(pred, hidden)
    rows["prediction\nand visible" + note] = torch.where(hidden, pred, target)
    return {title: transforms.denormalize(row, model.cfg) for title, row in rows.items()}


# ---------------------------------------- Training

@engine.record
def main(argv=None):
    cfg = config.parse(Config, __doc__, argv)
    run = engine.Run(cfg)  # processes, device, precision
    with config.user_errors():  # what is wrong with options, images or a checkpoint: one line
        if cfg.plan:
            return plan.show(cfg, SimMIM)
        model = SimMIM(cfg).to(run.device)
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
