r"""MAE: hide three quarters of an image's patches, encode the rest, and let a small decoder predict
the hidden ones.

The encoder never sees a mask token and works on a quarter of the tokens: that is what makes MAE
cheap. Everything else is a plain ViT and a mean squared error.

    imgs (B,C,H,W) --embed--> tokens (B,N,D) --gather--> (B,N_keep,D) --encode--> latent
      |                                                                             | mask tokens,
      |                                                                             | raster order
      +--target--> (B,N,p*p*C) <--squared error on hidden patches--> pred <--decode-+

Paper: He et al., Masked Autoencoders Are Scalable Vision Learners, arXiv 2111.06377.

    CPU     python mae.py --config configs/tiny.yaml --out runs/mae          (2 minutes; loss 0.37)
    1 GPU   python mae.py --config configs/mae_vit_b.yaml --data /data/imagenet --out runs/mae_vit_b
    8 GPUs  torchrun --nproc-per-node 8 mae.py --config configs/mae_vit_b.yaml \
                --data /data/imagenet --out runs/mae_vit_b                            (not measured)
"""

from dataclasses import dataclass

import torch
import torch.nn as nn

import data
import models
from common import config, engine, figures, layers, neighbours, optim, plan, randomness, transforms


@dataclass
class Config(config.RunConfig):
    """Pre-training of ViT-B as in the paper's main results (MAE, Table 8 and A.1)."""
    # The method
    model: str = "vit_b"  # vit_tiny, vit_ti, vit_s, vit_b, vit_l, vit_h
    patch_size: int = 16  # pixels; must divide the image; 0 is 16
    mask: str = "random"  # random, block, grid (MAE, Fig. 6)
    mask_ratio: float = 0.75  # share of patches that is hidden, in [0, 1)
    target: str = "norm_pixels"  # pixels, norm_pixels (each patch to mean 0, std 1), pca
    pca_dim: int = 96  # coefficients of the pca target
    decoder_depth: int = 8  # blocks
    decoder_width: int = 512  # channels
    decoder_heads: int = 16  # attention heads
    mask_tokens_in_encoder: bool = False  # ablation: hidden patches go in as tokens, too
    # The recipe
    img_size: config.Size = (224, 224)  # height x width in pixels
    in_chans: int = 3  # image channels
    crop_scale: tuple[float, float] = (0.2, 1.0)  # area that a crop covers; 1,1 for none
    shift: int = 0  # largest random shift in pixels; the border is mirrored
    flip: float = 0.5  # probability of a horizontal flip
    epochs: float = 1600.0  # passes over the images; ablations in the paper take 800
    warmup_epochs: float = 40.0  # linear warm-up of the learning rate
    batch_size: int = 4096  # images of one optimizer step, over all processes
    micro_batch: int = 256  # images that one process holds at once
    base_lr: float = 1.5e-4  # per lr_batch images: lr = base_lr * batch_size / lr_batch
    lr_batch: int = 256  # images that base_lr is stated for
    min_lr: float = 0.0  # end of the cosine
    weight_decay: float = 0.05  # AdamW
    betas: tuple[float, float] = (0.9, 0.95)  # AdamW
    clip_grad: float = 0.0  # largest gradient norm; 0 for no clipping

    def check(self):
        super().check()
        config.one_of(self, mask="random block grid", target="pixels norm_pixels pca")
        config.in_range(self, mask_ratio="[0, 1)", shift="[0, inf)")
        pixels = (self.patch_size or 16) ** 2 * self.in_chans
        if self.target == "pca" and not 0 < self.pca_dim <= pixels:
            raise ValueError(f"--pca_dim must lie in 1..{pixels}, not {self.pca_dim}")


# ---------------------------------------- Masks: noise (B, N) -> scores (B, N); the lowest stay

def random_scores(noise, grid):
    return noise


def grid_scores(noise, grid):
    """Kept first: the top-left patch of every 2x2 cell (MAE, Fig. 6 right)."""
    coords = layers.raster(grid, noise.device)  # (1, N, 2)
    is_top_left = (coords % 2 == 0).all(dim=2)  # (1, N)
    return noise + ~is_top_left


def block_scores(noise, grid):
    """Hidden first: what large random rectangles cover (MAE, Fig. 6 middle; BEiT, Algorithm 1)."""
    N, (h, w) = noise.shape[1], grid
    num_blocks = max(1, N // 4)

    # Four random numbers a rectangle, taken from the image's own noise
    places = torch.arange(4 * num_blocks, device=noise.device) % N
    numbers = noise[:, places]
    numbers = numbers.view(-1, num_blocks, 4, 1)  # (B, num_blocks, 4, 1)
    area, aspect, top, left = numbers.unbind(dim=2)  # each (B, num_blocks, 1)
    area = N * (0.08 + 0.32 * area)  # 8 to 40 % of the image
    aspect = 0.3 ** (2 * aspect - 1)  # 0.3 to 1 / 0.3, uniform in the logarithm
    height = (area * aspect).sqrt().round().clamp(1, h)
    width = (area / aspect).sqrt().round().clamp(1, w)
    top = (top * (h - height + 1)).floor()
    left = (left * (w - width + 1)).floor()

    # Which rectangles cover which patch?
    row, column = layers.raster(grid, noise.device)[0].unbind(dim=1)  # each (N,)
    in_rows = (row >= top) & (row < top + height)
    in_columns = (column >= left) & (column < left + width)
    covered = in_rows & in_columns  # (B, num_blocks, N)

    # A patch belongs to the first rectangle that covers it; earlier ones are hidden first. So the
    # last one may be hidden in part, and the number of hidden patches is exact.
    number = torch.arange(num_blocks, device=noise.device)[:, None]  # (num_blocks, 1)
    first = torch.where(covered, number, num_blocks).amin(dim=1)  # (B, N)
    return noise - first


SCORES = {"random": random_scores, "block": block_scores, "grid": grid_scores}


# ---------------------------------------- Model

class MAE(nn.Module):
    """The masked autoencoder that `cfg` describes. ValueError if its sizes do not fit together."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.encoder = models.build(cfg.model, cfg.img_size, cfg.patch_size, cfg.in_chans)
        if self.encoder.num_prefix == 0:
            raise ValueError(f"{cfg.model} cannot encode a set of patches, as a ViT can; "
                             "um_mae.py is for pyramids")
        self.grid, self.patch_size = self.encoder.grid, self.encoder.stride
        self.num_patches = self.num_noise = self.grid[0] * self.grid[1]  # N

        pixels = self.patch_size**2 * cfg.in_chans
        out_width = cfg.pca_dim if cfg.target == "pca" else pixels  # numbers predicted for a patch
        self.decoder = models.Decoder(self.encoder.width, out_width, self.grid, cfg.decoder_width,
                                      cfg.decoder_depth, cfg.decoder_heads)
        self.encoder.checkpointing = self.decoder.checkpointing = cfg.activation_checkpointing

        token_width = self.encoder.width if cfg.mask_tokens_in_encoder else cfg.decoder_width
        self.mask_token = nn.Parameter(torch.randn(1, 1, token_width) * 0.02)
        if cfg.target == "pca":  # found by `prepare`
            self.register_buffer("pca_mean", torch.zeros(pixels))
            self.register_buffer("pca_basis", torch.zeros(pixels, cfg.pca_dim))

    def forward(self, imgs, noise):
        """imgs (B, C, H, W) normalised, noise (B, N) uniform in [0, 1) -> loss, a scalar."""
        ids_keep, ids_restore, mask = self.mask(noise)
        latent = self.encode(imgs, ids_keep, mask)
        pred = self.decode(latent, ids_restore)
        return self.loss(pred, self.target(imgs), mask)

    def mask(self, noise):
        """noise (B, N) -> ids_keep (B, N_keep), ids_restore (B, N), mask (B, N) bool, True =
        hidden. N_keep = floor(N * (1 - mask_ratio)) in exact arithmetic, and at least 1; the
        patches with the lowest SCORES stay, in the order of these."""
        kept = self.num_patches * (1 - self.cfg.mask_ratio)
        N_keep = max(1, int(kept + 1e-9))  # 100 * (1 - 0.9) is 9.999...
        scores = SCORES[self.cfg.mask](noise, self.grid)  # (B, N)

        # ids_shuffle[:, i] is the patch at place i of the shuffled list. Sorting that list again
        # tells where each patch went, which is how the decoder finds back to raster order.
        ids_shuffle = scores.argsort(dim=1, stable=True)  # (B, N); stable: alike on CPU and GPU
        ids_restore = ids_shuffle.argsort(dim=1)  # (B, N)
        ids_keep = ids_shuffle[:, :N_keep]
        mask = ids_restore >= N_keep
        return ids_keep, ids_restore, mask

    def encode(self, imgs, ids_keep, mask):
        """Only visible patches go through the encoder -> latent (B, 1 + N_keep, D), class token
        first. With mask_tokens_in_encoder all do, hidden ones as mask_token: (B, 1 + N, D)."""
        tokens = self.encoder.embed(imgs)  # (B, N, D)
        if self.cfg.mask_tokens_in_encoder:
            tokens = torch.where(mask[..., None], self.mask_token, tokens)
            return self.encoder.encode(tokens)  # (B, 1 + N, D)

        visible = layers.gather(tokens, ids_keep)  # (B, N_keep, D)
        coords = layers.places(ids_keep, self.grid)  # (B, N_keep, 2)
        return self.encoder.encode(visible, coords)

    def decode(self, latent, ids_restore):
        """Mask tokens stand for hidden patches; every patch is predicted: (B, N, p*p*C). With
        mask_tokens_in_encoder, the latent has all patches already, in raster order."""
        x = self.decoder.embed(latent)  # (B, 1 + N_keep, decoder_width)
        if not self.cfg.mask_tokens_in_encoder:
            cls, visible = x[:, :1], x[:, 1:]
            num_hidden = self.num_patches - visible.shape[1]
            hidden = self.mask_token.to(x.dtype).expand(len(x), num_hidden, -1)
            patches = torch.cat([visible, hidden], dim=1)  # (B, N, decoder_width), shuffled
            patches = layers.gather(patches, ids_restore)  # (B, N, decoder_width), raster order
            x = torch.cat([cls, patches], dim=1)  # (B, 1 + N, decoder_width)
        return self.decoder(x)

    def target(self, imgs):
        """What to predict for each patch, fp32: (B, N, p*p*C), or (B, N, pca_dim)."""
        patches = layers.patchify(imgs.float(), self.patch_size)  # (B, N, p*p*C)
        return self.normalise(patches, imgs)

    def normalise(self, patches, imgs):
        """Patches (B, N, p*p*C), which need not be those of imgs (see prepare), on the scale of
        the target, fp32: less mean and over std of the patches of imgs, or PCA's coefficients."""
        if self.cfg.target == "norm_pixels":
            own = layers.patchify(imgs.float(), self.patch_size)  # (B, N, p*p*C)
            mean, std = layers.patch_statistics(own)
            return (patches - mean) / std
        if self.cfg.target == "pca":  # the largest coefficients of PCA in patch space (MAE, 4.1)
            with torch.autocast(imgs.device.type, enabled=False):
                return (patches - self.pca_mean) @ self.pca_basis  # (B, N, pca_dim)
        return patches

    def loss(self, pred, target, mask):
        """Mean squared error over all hidden patches, fp32 (MAE, 3); 0 if none is hidden."""
        error = (pred.float() - target).square().mean(dim=2)  # (B, N)
        return (error * mask).sum() / mask.sum().clamp(min=1)


@torch.no_grad()
def prepare(model, imgs, noise):
    """Before the first step: find the basis of the PCA target; return the loss of two trivial
    predictors (zero, and each patch's own mean colour), which first losses are read against."""
    patches = layers.patchify(imgs, model.patch_size)  # (B, N, p*p*C)
    if model.cfg.target == "pca":
        pixels = patches.flatten(0, 1)  # (B*N, p*p*C)
        model.pca_mean.copy_(pixels.mean(dim=0))
        vectors = torch.linalg.eigh(torch.cov(pixels.T)).eigenvectors  # by ascending variance
        model.pca_basis.copy_(vectors.flip(1)[:, : model.cfg.pca_dim])

    target, mask = model.target(imgs), model.mask(noise)[2]
    flat = model.normalise(layers.mean_colours(patches, model.cfg.in_chans), imgs)
    guesses = {"zero": torch.zeros_like(target), "patch mean": flat}
    return {name: round(model.loss(pred, target, mask).item(), 4) for name, pred in guesses.items()}


@torch.no_grad()
def reconstruct(model, imgs, noise):
    """{row title: images (B, C, H, W) in [0, 1]}; imgs normalised. A normalised target says nothing
    about a patch's own mean and contrast: these are the original's, and the title says so."""
    ids_keep, ids_restore, mask = model.mask(noise)
    pred = model.decode(model.encode(imgs, ids_keep, mask), ids_restore).float()
    patches = layers.patchify(imgs, model.patch_size)  # (B, N, p*p*C)

    note = ""
    if model.cfg.target == "norm_pixels":
        mean, std = layers.patch_statistics(patches)
        pred = pred * std + mean
        note = "\n(true mean and std\nof each patch)"
    elif model.cfg.target == "pca":
        pred = pred @ model.pca_basis.T + model.pca_mean  # (B, N, p*p*C)

    hidden = mask[..., None]  # (B, N, 1)
    rows = {
        "original": patches,
        "masked": patches.masked_fill(hidden, 0.0),
        "prediction" + note: figures.dimmed(pred, hidden),
        "prediction\nand visible": torch.where(hidden, pred, patches),
    }
    rows = {title: layers.unpatchify(row, model.patch_size, model.grid)
            for title, row in rows.items()}
    return {title: transforms.denormalize(row, model.cfg) for title, row in rows.items()}


# ---------------------------------------- Training

@engine.record
def main(argv=None):
    cfg = config.parse(Config, __doc__, argv)
    run = engine.Run(cfg)  # processes, device, precision
    with config.user_errors():  # what is wrong with options, images or a checkpoint: one line
        if cfg.plan:
            return plan.show(cfg, MAE)
        model = MAE(cfg).to(run.device)
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
