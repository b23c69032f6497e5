"""MAE: hide three quarters of an image's patches, encode the rest, and let a small decoder paint the hidden ones.

The encoder never sees a mask token and works on a quarter of the tokens: that is what makes it cheap, and the
representation good. Everything else is a plain ViT and a mean squared error.

    imgs (B,C,H,W) --embed--> tokens (B,N,D) --gather--> (B,N_keep,D) --encode--> latent (B,1+N_keep,D)
      |                                                                     | + mask tokens, in raster order
      +--target--> (B,N,p*p*C) <-- squared error on hidden patches --> pred (B,N,p*p*C) <--decode--+

Paper: He et al., Masked Autoencoders Are Scalable Vision Learners, arXiv 2111.06377.

    CPU     python mae.py --config configs/tiny.yaml --out runs/mae                             (3 minutes; loss 0.32)
    1 GPU   python mae.py --config configs/mae_vit_b.yaml --data /data/imagenet --out runs/mae_b      (not measured)
    8 GPUs  torchrun --nproc-per-node 8 mae.py --config configs/mae_vit_b.yaml --data /data/imagenet --out runs/mae_b
"""

from dataclasses import dataclass

import torch
import torch.nn as nn

import data
import models
from common import engine, evaluate, figures


@dataclass
class Config(engine.RunConfig):
    """Pre-training of ViT-B as in the paper's main results (MAE, Table 8 and A.1)."""
    model: str = "vit_b"  # vit_tiny, vit_ti, vit_s, vit_b, vit_l, vit_h
    patch_size: int = 16  # pixels; must divide the image; 0 is 16
    mask: str = "random"  # random, block, grid (MAE, Fig. 6)
    mask_ratio: float = 0.75  # share of patches that is hidden, in [0, 1)
    target: str = "norm_pixels"  # pixels, norm_pixels (each patch to mean 0, std 1), pca
    pca_dim: int = 96  # coefficients of the pca target
    decoder_depth: int = 8  # blocks
    decoder_width: int = 512  # channels
    decoder_heads: int = 16  # attention heads
    mask_tokens_in_encoder: bool = False  # the slow ablation: the encoder, too, gets a token for every hidden patch
    img_size: engine.Size = (224, 224)  # height x width in pixels
    in_chans: int = 3  # image channels
    crop_scale: tuple[float, float] = (0.2, 1.0)  # share of the image's area that a random crop covers; 1,1 for none
    flip: float = 0.5  # probability of a horizontal flip
    epochs: float = 1600.0  # passes over the images; ablations in the paper take 800
    warmup_epochs: float = 40.0  # linear warm-up of the learning rate
    batch_size: int = 4096  # images of one optimizer step, over all processes
    micro_batch: int = 128  # images that one process holds at once
    base_lr: float = 1.5e-4  # per lr_batch images: lr = base_lr * batch_size / lr_batch
    lr_batch: int = 256  # images that base_lr is stated for
    min_lr: float = 0.0  # end of the cosine
    weight_decay: float = 0.05  # AdamW
    betas: tuple[float, float] = (0.9, 0.95)  # AdamW
    clip_grad: float = 0.0  # largest gradient norm; 0 for no clipping


# ---------------------------------------- Masks

def grid_scores(noise, grid):
    """Kept first: the top-left patch of every 2x2 cell (MAE, Fig. 6 right)."""
    row, column = torch.arange(grid[0], device=noise.device)[:, None], torch.arange(grid[1], device=noise.device)
    return noise + (row % 2 + column % 2 > 0).view(1, -1)  # (B, N)


def block_scores(noise, grid):
    """Kept last: what large random rectangles cover (MAE, Fig. 6 middle, after BEiT, Algorithm 1). An image's noise is
    read as a list of them (area, aspect, top, left). What an earlier one covers is hidden first, what the last one
    covers in part, so that the count is exact."""
    N, (h, w) = noise.shape[1], grid
    draws = noise[:, torch.arange(max(4, N // 4 * 4)) % N].unflatten(1, (-1, 4, 1))  # (B, R, 4, 1)
    area, aspect = N * (0.08 + 0.32 * draws[:, :, 0]), 0.3 ** (2 * draws[:, :, 1] - 1)  # (B, R, 1), BEiT's ranges
    height, width = (area * aspect).sqrt().round().clamp(1, h), (area / aspect).sqrt().round().clamp(1, w)
    top, left = (draws[:, :, 2] * (h - height + 1)).floor(), (draws[:, :, 3] * (w - width + 1)).floor()
    row, column = torch.arange(N, device=noise.device) // w, torch.arange(N, device=noise.device) % w
    covered = (row >= top) & (row < top + height) & (column >= left) & (column < left + width)  # (B, R, N)
    order = torch.arange(covered.shape[1], device=noise.device)[:, None]
    return noise - torch.where(covered, order, len(order)).amin(dim=1)  # (B, N)


# noise (B, N) in [0, 1) -> scores (B, N): the patches with the lowest scores stay visible
SCORES = {"random": lambda noise, grid: noise, "grid": grid_scores, "block": block_scores}


# ---------------------------------------- Model

class MAE(nn.Module):
    """The masked autoencoder that `cfg` describes. ValueError if its options do not fit together."""

    def __init__(self, cfg):
        super().__init__()
        self.encoder = models.build(cfg.model, cfg.img_size, cfg.patch_size, cfg.in_chans)
        pixels = self.encoder.stride**2 * cfg.in_chans
        values = cfg.pca_dim if cfg.target == "pca" else pixels  # what is predicted for a patch
        if self.encoder.num_prefix == 0:
            raise ValueError(f"{cfg.model} cannot encode a set of patches, as a ViT can; um_mae.py is for pyramids")
        if not 0 <= cfg.mask_ratio < 1 or not 0 < values <= pixels:
            raise ValueError(f"--mask_ratio takes [0, 1), --pca_dim 1..{pixels}, not {cfg.mask_ratio}, {cfg.pca_dim}")
        if cfg.mask not in SCORES or cfg.target not in ("pixels", "norm_pixels", "pca"):
            raise ValueError(f"--mask {cfg.mask}: random, grid, block; --target {cfg.target}: pixels, norm_pixels, pca")
        self.cfg = cfg
        self.decoder = models.Decoder(
            self.encoder.width, values, self.encoder.grid, cfg.decoder_width, cfg.decoder_depth, cfg.decoder_heads)
        self.encoder.checkpointing = self.decoder.checkpointing = cfg.activation_checkpointing
        self.num_noise = self.encoder.grid[0] * self.encoder.grid[1]  # N
        token_width = self.encoder.width if cfg.mask_tokens_in_encoder else cfg.decoder_width
        self.mask_token = nn.Parameter(torch.randn(1, 1, token_width) * 0.02)
        if cfg.target == "pca":
            self.register_buffer("pca_mean", torch.zeros(pixels))
            self.register_buffer("pca_basis", torch.zeros(pixels, values))

    def embed(self, imgs):
        return self.encoder.embed(imgs)  # (B, N, D)

    def mask(self, noise):
        """Uniform noise (B, N) -> ids_keep (B, N_keep), ids_restore (B, N), mask (B, N) bool, True = hidden."""
        scores = SCORES[self.cfg.mask](noise, self.encoder.grid)  # (B, N)
        ids = scores.argsort(dim=1, stable=True)  # (B, N), what is kept comes first; stable: the same on CPU and GPU
        ids_restore = ids.argsort(dim=1)  # (B, N), where in `ids` each patch of the grid stands
        N_keep = max(1, int(noise.shape[1] * (1 - self.cfg.mask_ratio) + 1e-9))  # 100 * (1 - 0.9) is 9.999...
        return ids[:, :N_keep], ids_restore, ids_restore >= N_keep

    def encode(self, tokens, ids_keep, mask):
        """Only visible tokens go through the encoder: (B, N, D) -> latent (B, 1 + N_keep, D)."""
        if self.cfg.mask_tokens_in_encoder:
            return self.encoder.encode(torch.where(mask[..., None], self.mask_token, tokens))  # (B, 1 + N, D)
        tokens = models.gather(tokens, ids_keep)  # (B, N_keep, D)
        coords = torch.stack(torch.unravel_index(ids_keep, self.encoder.grid), dim=2)  # (B, N_keep, 2)
        return self.encoder.encode(tokens, coords)

    def decode(self, latent, ids_restore):
        """Mask tokens are appended, the list is put back in raster order, every patch is predicted: (B, N, p*p*C)."""
        x = self.decoder.embed(latent)  # (B, 1 + N_keep, decoder_width)
        if not self.cfg.mask_tokens_in_encoder:
            hidden = self.mask_token.to(x.dtype).expand(len(x), ids_restore.shape[1] + 1 - x.shape[1], -1)
            patches = models.gather(torch.cat([x[:, 1:], hidden], dim=1), ids_restore)  # (B, N, decoder_width), raster
            x = torch.cat([x[:, :1], patches], dim=1)  # (B, 1 + N, decoder_width)
        return self.decoder(x)

    def target(self, imgs, flat=False):
        """What to paint on each patch, fp32: (B, N, p*p*C), or (B, N, pca_dim). `flat`: as if it had one colour."""
        patches = painted = models.patchify(imgs.float(), self.encoder.stride)  # (B, N, p*p*C)
        if flat:
            pixels = patches.unflatten(2, (-1, self.cfg.in_chans))  # (B, N, p*p, C)
            painted = pixels.mean(dim=2, keepdim=True).expand_as(pixels).flatten(2)  # (B, N, p*p*C)
        if self.cfg.target == "norm_pixels":
            mean, std = models.patch_statistics(patches)
            return (painted - mean) / std
        if self.cfg.target == "pca":  # the largest coefficients of PCA in patch space (MAE, 4.1)
            with torch.autocast(imgs.device.type, enabled=False):
                return (painted - self.pca_mean) @ self.pca_basis  # (B, N, pca_dim)
        return painted

    def loss(self, pred, target, mask):
        """Mean squared error over hidden patches, fp32 (MAE, 3); 0 if none is hidden."""
        error = (pred.float() - target).square().mean(dim=2)  # (B, N)
        return (error * mask).sum() / mask.sum().clamp(min=1)

    def forward(self, imgs, noise):
        """imgs (B, C, H, W) normalised, noise (B, N) uniform in [0, 1) -> loss, a scalar."""
        ids_keep, ids_restore, mask = self.mask(noise)
        latent = self.encode(self.embed(imgs), ids_keep, mask)
        pred = self.decode(latent, ids_restore)
        return self.loss(pred, self.target(imgs), mask)

    def prepare(self, imgs, noise):
        """Before training: find the basis of the PCA target; return the loss of two trivial predictors, to compare."""
        if self.cfg.target == "pca":
            patches = models.patchify(imgs, self.encoder.stride).flatten(0, 1)  # (B*N, p*p*C)
            self.pca_mean.copy_(patches.mean(dim=0))
            vectors = torch.linalg.eigh(torch.cov(patches.T)).eigenvectors  # (p*p*C, p*p*C), ascending variance
            self.pca_basis.copy_(vectors.flip(1)[:, : self.cfg.pca_dim])
        target, mask = self.target(imgs), self.mask(noise)[2]
        guesses = {"zero": torch.zeros_like(target), "patch mean": self.target(imgs, flat=True)}
        return {name: round(self.loss(guess, target, mask).item(), 4) for name, guess in guesses.items()}


@torch.no_grad()
def reconstruct(model, imgs, noise):
    """{row title: images (B, C, H, W) in [0, 1]}; imgs normalised. A normalised target says nothing about a patch's own
    mean and contrast: these are taken from the original, and the title says so."""
    grid, p = model.encoder.grid, model.encoder.stride
    ids_keep, ids_restore, mask = model.mask(noise)
    pred = model.decode(model.encode(model.embed(imgs), ids_keep, mask), ids_restore).float()
    patches, note = models.patchify(imgs, p), ""
    if model.cfg.target == "norm_pixels":
        mean, std = models.patch_statistics(patches)
        pred, note = pred * std + mean, "\n(true mean and std\nof each patch)"
    elif model.cfg.target == "pca":
        pred = pred @ model.pca_basis.T + model.pca_mean  # (B, N, p*p*C)
    rows = {"original": patches, "masked": patches.masked_fill(mask[..., None], 0.0), "prediction" + note: pred,
            "prediction\nand visible": torch.where(mask[..., None], pred, patches)}
    return {title: data.denormalize(models.unpatchify(row, p, grid)) for title, row in rows.items()}


# ---------------------------------------- Training

@engine.record
def main(argv=None):
    # Set-up: the same text in every method file, but for the name of the model.
    cfg = engine.configure(Config, __doc__, argv)
    run = engine.start(cfg)
    with engine.user_errors():
        if cfg.plan:
            return engine.plan(cfg, MAE)
        model = MAE(cfg).to(run.device)
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
