"""LUT: MAE, beside which an encoder that sees everything tells the visible tokens what the whole picture looks like.

Every image comes as two views. The student encodes a quarter of each, no place twice, and repaints view 1 as MAE does.
The teacher, a moving average of the student, encodes both in full, and what the student makes of one view is to point
where the teacher's vector of the other view points.

    imgs (B,2,C,H,W) -- view 1 --MAE--> squared error on hidden patches, and latent (B,1+N_keep,D)
      |                                                                     | mean, projector, predictor
      +-- view 2 in full --teacher's encoder, mean, projector--> (B,D) <--cosine--> (B,D), and the other way round

Paper: Kim et al., Learning with Unmasked Tokens Drives Stronger Vision Learners, arXiv 2310.13593. What main() calls
imgs or sample (B, C, H, W) are pairs of views here, (B, 2, C, H, W), and its noise (B, N) is (B, N + 2).

    CPU     python lut.py --config configs/lut_tiny.yaml --out runs/lut                             (8 epochs: 0.44)
    1 GPU   python lut.py --config configs/lut_vit_b.yaml --data /data/imagenet --out runs/lut_b    (not measured)
    8 GPUs  torchrun --nproc-per-node 8 lut.py --config configs/lut_vit_b.yaml --data /data/imagenet --out runs/lut_b
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import models
from common import engine, evaluate, figures, options


@dataclass
class Config(engine.RunConfig):
    """Pre-training of ViT-B as in LUT's main results (LUT, 5.1, and its released code)."""
    model: str = "vit_b"  # vit_tiny, vit_ti, vit_s, vit_b, vit_l, vit_h
    patch_size: int = 16  # pixels; must divide the image; 0 is 16
    mask_ratio: float = 0.75  # share of a view's patches that the student does not see, in [0.5, 1)
    target: str = "norm_pixels"  # pixels, norm_pixels (each patch to mean 0, std 1)
    decoder_depth: int = 8  # blocks
    decoder_width: int = 512  # channels
    decoder_heads: int = 16  # attention heads
    context_weight: float = 0.25  # of the context loss; with 0 and --one_directional it is MAE on LUT's crops
    pixel_weight: float = 1.0  # of MAE's loss beside it; 0 for the context loss alone
    one_directional: bool = False  # the student sees view 1 alone and the teacher view 2 alone: cheaper
    steering: str = "unmasked"  # what the context loss acts on: unmasked tokens, masked (the decoder's: ours), both
    context: str = "pooled"  # cls, pooled (mean of tokens), tokens (place by place), pooled+tokens (their sum: ours)
    context_loss: str = "cosine"  # cosine, infonce (temperature 0.2: ours), smooth_l1 (of unnormalised vectors: ours)
    head_width: int = 4096  # hidden channels of projector and predictor
    target_mask_ratio: float = 0.0  # share of patches that the teacher does not see, in [0, 1)
    ema_decay: float = 0.996  # of the teacher at the first step; a cosine takes it to 1 at the last
    img_size: engine.Size = (224, 224)  # height x width in pixels
    in_chans: int = 3  # image channels
    crop: str = "simple"  # simple (resized to cover img_size, then cut out anywhere), random_resized (with --shift 0)
    shift: int = 4  # pixels of mirrored border that a crop may reach into
    crop_scale: tuple[float, float] = (0.2, 1.0)  # share of the image's area that a random_resized crop covers
    flip: float = 0.5  # probability of a horizontal flip, for each view
    view_jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)  # view 2: brightness to hue, with p 0.8
    three_augment: bool = True  # view 2 is then made grey, solarized or blurred
    epochs: float = 1600.0  # passes over the images; ablations in the paper take 400
    warmup_epochs: float = 40.0  # linear warm-up of the learning rate
    batch_size: int = 4096  # images of one optimizer step, over all processes
    micro_batch: int = 128  # images that one process holds at once
    base_lr: float = 1.5e-4  # per lr_batch images: lr = base_lr * batch_size / lr_batch
    lr_batch: float = 256.0  # images that base_lr is stated for; 4 sqrt(batch_size) is the released code's rule
    min_lr: float = 0.0  # end of the cosine
    weight_decay: float = 0.05  # AdamW
    # DIFF: LUT's text has betas of 0.9, 0.999 and a layer decay of 0.65; as in its code, 0.9, 0.95 and none.
    betas: tuple[float, float] = (0.9, 0.95)  # AdamW
    clip_grad: float = 0.0  # largest gradient norm; 0 for no clipping


# ---------------------------------------- Model

class LUT(nn.Module):
    """Student and teacher that `cfg` describes; ValueError if its options do not fit together. Of V*B rows the first B
    belong to view 1 and the others, which there are not if it is `one_directional`, to view 2."""

    def __init__(self, cfg):
        super().__init__()
        self.encoder, encoder = (models.build(cfg.model, cfg.img_size, cfg.patch_size, cfg.in_chans) for _ in range(2))
        check(cfg, encoder)
        self.cfg, D = cfg, encoder.width
        self.decoder = models.Decoder(D, encoder.stride**2 * cfg.in_chans, encoder.grid, cfg.decoder_width,
                                      cfg.decoder_depth, cfg.decoder_heads)
        self.encoder.checkpointing = self.decoder.checkpointing = cfg.activation_checkpointing
        self.mask_token = nn.Parameter(torch.randn(1, 1, cfg.decoder_width) * 0.02)
        self.lift = nn.Linear(cfg.decoder_width, D) if cfg.steering != "unmasked" else None
        self.projector, self.predictor, projector = (models.mlp_head(D, cfg.head_width) for _ in range(3))
        self.teacher = nn.ModuleDict({"encoder": encoder, "projector": projector}).requires_grad_(False).eval()
        self.update_ema(0.0)  # makes it a copy of the student
        # DIFF: LUT's text has one masked view and the other in full, as --one_directional; here as in its code, both.
        self.views = 1 if cfg.one_directional else 2  # V
        self.N = encoder.grid[0] * encoder.grid[1]
        self.N_keep, self.N_taught = (max(1, math.floor(self.N * (1 - ratio) + 1e-9))  # 100 * (1 - 0.9) is 9.999...
                                      for ratio in (cfg.mask_ratio, cfg.target_mask_ratio))
        self.num_noise = self.N + 2  # for the masks, and for what becomes of view 2
        self.input_shape = (2, cfg.in_chans, *cfg.img_size)

    def train(self, mode=True):
        """The teacher stays in eval mode: its BatchNorm has averages, which lag by some 1 / (1 - ema_decay) steps."""
        super().train(mode)
        self.teacher.eval()
        return self

    def augment(self, imgs, noise):
        """Pairs (B, 2, C, H, W) and noise (B, 2) -> both views, view 2 as the networks see it: (2, B, C, H, W)."""
        one, two = imgs.unbind(dim=1)  # each (B, C, H, W)
        return torch.stack([one, data.three_augment(two, noise) if self.cfg.three_augment else two])  # (2, B, C, H, W)

    def embed(self, imgs):
        return self.encoder.embed(imgs)  # (V*B, N, D)

    def mask(self, noise):
        """Uniform noise (B, N) -> ids_keep (V*B, N_keep), ids_restore (V*B, N), mask (V*B, N) bool, True = hidden.
        View 1 keeps what comes first in the sorted noise, view 2 what comes next: disjoint places of the grid, though
        not of the picture, out of which the two views are cut independently."""
        ids = noise.argsort(dim=1, stable=True)  # (B, N); stable: the same on CPU and GPU
        ids = torch.cat([ids, ids.roll(-self.N_keep, dims=1)][: self.views])  # (V*B, N), what is kept comes first
        ids_restore = ids.argsort(dim=1)  # (V*B, N), where in `ids` each patch of the grid stands
        return ids[:, : self.N_keep], ids_restore, ids_restore >= self.N_keep

    def encode(self, tokens, ids_keep, encoder=None):
        """Only the tokens at ids_keep go through the encoder (the student's): (V*B, N, D) -> (V*B, 1 + N_keep, D)."""
        coords = torch.stack(torch.unravel_index(ids_keep, self.encoder.grid), dim=2)  # (V*B, N_keep, 2)
        return (encoder or self.encoder).encode(models.gather(tokens, ids_keep), coords)  # (V*B, 1 + N_keep, D)

    def decode(self, latent, ids_restore):
        """Mask tokens are appended, the list is put back in raster order and decoded: (V*B, N, decoder_width), out of
        which `decoder.pred` makes pixels."""
        x = self.decoder.embed(latent)  # (V*B, 1 + N_keep, decoder_width)
        cls, x = x[:, :1], x[:, 1:]
        hidden = self.mask_token.to(x.dtype).expand(len(x), ids_restore.shape[1] - x.shape[1], -1)
        x = models.gather(torch.cat([x, hidden], dim=1), ids_restore)  # (V*B, N, decoder_width), now in raster order
        return self.decoder.decode(torch.cat([cls, x], dim=1))  # (V*B, N, decoder_width)

    def target(self, imgs, flat=False):
        """What to paint on each patch, fp32: (B, N, p*p*C). `flat`: as if every patch had one colour."""
        patches = painted = models.patchify(imgs.float(), self.encoder.stride)  # (B, N, p*p*C)
        if flat:
            pixels = patches.unflatten(2, (-1, self.cfg.in_chans))  # (B, N, p*p, C)
            painted = pixels.mean(dim=2, keepdim=True).expand_as(pixels).flatten(2)  # (B, N, p*p*C)
        mean, std = models.patch_statistics(patches) if self.cfg.target == "norm_pixels" else (0.0, 1.0)
        return (painted - mean) / std

    def loss(self, pred, target, mask):
        """MAE's loss: mean squared error over hidden patches, fp32."""
        error = (pred.float() - target).square().mean(dim=2)  # (B, N)
        return (error * mask).sum() / mask.sum()

    @torch.no_grad()
    def teach(self, imgs, noise):
        """The teacher's latent of whole images, (V*B, 1 + N, D); or of what --target_mask_ratio leaves of them: patches
        that the student sees last, if at all (ours; the paper does not say)."""
        encoder = self.teacher["encoder"]
        if self.N_taught == self.N:
            return encoder(imgs)
        ids = noise.argsort(dim=1, stable=True)[:, -self.N_taught :]  # (B, N_taught)
        return self.encode(encoder.embed(imgs), ids.repeat(self.views, 1), encoder)

    def context(self, latent, decoded, ids_restore, taught):
        """LUT's loss: how far the student's vectors of a view are from the teacher's of the other one, fp32. Tokens are
        compared place by place on the grid, wherever crops and flips put these in the picture."""
        tokens, ids = latent[:, 1:], ids_restore.argsort(dim=1)  # (V*B, N_keep, D), (V*B, N)
        if self.lift:
            tokens = torch.cat([tokens, self.lift(models.gather(decoded, ids[:, self.N_keep :]))], dim=1)  # (V*B, N, D)
        steered = {"unmasked": slice(self.N_keep), "masked": slice(self.N_keep, None), "both": slice(None)}
        tokens, ids = (x[:, steered[self.cfg.steering]] for x in (tokens, ids))  # (V*B, T, D), (V*B, T)
        pairs = {"cls": (latent[:, :1], taught[:, :1]),  # the student's and the teacher's, both (V*B, T or 1, D)
                 "pooled": (tokens.mean(dim=1, keepdim=True), taught[:, 1:].mean(dim=1, keepdim=True))}
        if "tokens" in self.cfg.context:
            pairs["tokens"] = (tokens, models.gather(taught[:, 1:], ids))  # each (V*B, T, D)
        loss = 0.0
        for name in self.cfg.context.split("+"):
            for student, teacher in zip(*(x.chunk(self.views) for x in pairs[name]), strict=True):
                student = self.predictor(self.projector(student.flatten(0, 1)))  # (B*T, D); BatchNorm sees one view
                loss = loss + self.distance(student, self.teacher["projector"](teacher.flatten(0, 1)))  # (B*T, D)
        return loss / self.views

    def distance(self, student, teacher):
        """Of n vectors (n, D) from the teacher's, on average, fp32."""
        student, teacher = student.float(), teacher.float()
        if self.cfg.context_loss == "smooth_l1":
            return F.smooth_l1_loss(student, teacher)
        student, teacher = F.normalize(student, dim=1), F.normalize(teacher, dim=1)
        if self.cfg.context_loss == "cosine":
            return 2 - 2 * (student * teacher).sum(dim=1).mean()
        keys, own = models.everyones(teacher)  # (n of all processes, D): wrong answers but for one each
        with torch.autocast(keys.device.type, enabled=False):
            return F.cross_entropy(student @ keys.T / 0.2, torch.arange(len(keys), device=keys.device)[own])

    def forward(self, imgs, noise):
        """imgs (B, 2, C, H, W) normalised, noise (B, N + 2) uniform in [0, 1) -> loss, a scalar."""
        B, V = len(imgs), self.views
        views, noise = self.augment(imgs, noise[:, self.N :]), noise[:, : self.N]  # (2, B, C, H, W), (B, N)
        taught = self.teach(views.flip(0)[:V].flatten(0, 1), noise)  # (V*B, 1 + N, D), of the other view
        ids_keep, ids_restore, mask = self.mask(noise)
        latent = self.encode(self.embed(views[:V].flatten(0, 1)), ids_keep)  # (V*B, 1 + N_keep, D)
        n = B if self.cfg.steering == "unmasked" else V * B  # only view 1 is painted
        decoded = self.decode(latent[:n], ids_restore[:n])
        loss = self.cfg.pixel_weight * self.loss(self.decoder.pred(decoded[:B]), self.target(views[0]), mask[:B])
        return loss + self.cfg.context_weight * self.context(latent, decoded, ids_restore, taught)

    def update_ema(self, decay):
        """teacher = decay * teacher + (1 - decay) * student, BatchNorm's running averages included (released code)."""
        models.blend(self.teacher, self, decay)

    def prepare(self, imgs, noise):
        """Before training: MAE's loss of two trivial predictors of view 1 (zero, and each patch's own mean colour)."""
        target, mask = self.target(imgs[:, 0]), self.mask(noise[:, : self.N])[2][: len(imgs)]
        guesses = {"zero": torch.zeros_like(target), "patch mean": self.target(imgs[:, 0], flat=True)}
        return {name: round(self.loss(guess, target, mask).item(), 4) for name, guess in guesses.items()}


def check(cfg, encoder):
    """ValueError unless the options fit together."""
    options.one_of(cfg, target="pixels norm_pixels", steering="unmasked masked both", crop="simple random_resized",
                   context="pooled cls tokens pooled+tokens", context_loss="cosine infonce smooth_l1")
    if encoder.num_prefix == 0:
        raise ValueError(f"{cfg.model} cannot encode a set of patches, as a ViT can; um_mae.py is for pyramids")
    if not 0.5 <= cfg.mask_ratio < 1 or encoder.grid == (1, 1):
        raise ValueError("views of at least two patches that show no place twice need --mask_ratio in [0.5, 1), not "
                         f"{cfg.mask_ratio} of {encoder.grid[0]}x{encoder.grid[1]} patches")
    if "tokens" in cfg.context and cfg.target_mask_ratio:
        raise ValueError(f"--context {cfg.context} needs all of the teacher's: --target_mask_ratio 0")
    if cfg.context == "cls" and cfg.steering != "unmasked":
        raise ValueError(f"--context cls is no token that --steering {cfg.steering} could speak of")
    if min(cfg.micro_batch, cfg.batch_size) < 2 or not cfg.drop_last:
        raise ValueError("BatchNorm needs two images at once, and as many on every process: --micro_batch 2 or more, "
                         "and no --drop_last false")


@torch.no_grad()
def reconstruct(model, imgs, noise):
    """{row title: images (B, C, H, W) in [0, 1]}: view 1 masked and predicted, view 2 as the student sees it. imgs
    normalised. With a normalised target, mean and contrast are the original's, and the title says so."""
    B, N, grid, p = len(imgs), model.N, model.encoder.grid, model.encoder.stride
    views = model.augment(imgs, noise[:, N:])  # (2, B, C, H, W)
    ids_keep, ids_restore, mask = model.mask(noise[:, :N])
    latent = model.encode(model.embed(views[0]), ids_keep[:B])  # (B, 1 + N_keep, D)
    pred, note = model.decoder.pred(model.decode(latent, ids_restore[:B])).float(), ""
    one, two = (models.patchify(view, p) for view in views)  # each (B, N, p*p*C)
    if model.cfg.target == "norm_pixels":
        mean, std = models.patch_statistics(one)
        pred, note = pred * std + mean, "\n(true mean and std\nof each patch)"
    hidden = mask[:B, :, None]  # (B, N, 1)
    rows = {"view 1": one, "masked": one.masked_fill(hidden, 0.0), "prediction" + note: pred,
            "prediction\nand visible": torch.where(hidden, pred, one), "view 2": two}
    if model.views == 2:
        rows["view 2\nmasked"] = two.masked_fill(mask[B:, :, None], 0.0)
    return {title: data.denormalize(models.unpatchify(row, p, grid)) for title, row in rows.items()}


# ---------------------------------------- Training

@engine.record
def main(argv=None):
    # Set-up: the same text in every method file, but for the name of the model.
    cfg = engine.configure(Config, __doc__, argv)
    run = engine.start(cfg)
    with engine.user_errors():
        if cfg.plan:
            return engine.plan(cfg, LUT)
        model = LUT(cfg).to(run.device)
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
        # DIFF: LUT's text has a constant decay of the teacher; as in its released code, ours goes to 1 (--ema_decay).
        model.update_ema(1 - engine.schedule("cosine", step, steps, 0, 1 - cfg.ema_decay))

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
