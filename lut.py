r"""LUT: MAE, beside which an encoder that sees everything tells the visible tokens what the whole
picture looks like.

Every image comes as two views. The student encodes a quarter of each, no place twice, and predicts
the hidden patches of view 1 as MAE does. The teacher, a moving average of the student, encodes both
in full. What the student makes of one view is to point where the teacher's vector of the other view
points.

    imgs (B,2,C,H,W) -- view 1 --MAE--> squared error on hidden patches, and latent (B,1+N_keep,D)
      |                                                                 | mean, projector, predictor
      +-- view 2 in full --teacher, mean, projector--> (B,D) <--cosine--> (B,D), and the other way

Paper: Kim et al., Learning with Unmasked Tokens Drives Stronger Vision Learners, arXiv 2310.13593.
What main() calls imgs (B, C, H, W) are pairs of views here, (B, 2, C, H, W), and its noise (B, N)
is (B, N + 2).

    CPU     python lut.py --config configs/lut_tiny.yaml --out runs/lut
            (loss 0.53)
    1 GPU   python lut.py --config configs/lut_vit_b.yaml --data /data/imagenet --out runs/lut_vit_b
    8 GPUs  torchrun --nproc-per-node 8 lut.py --config configs/lut_vit_b.yaml \
                --data /data/imagenet --out runs/lut_vit_b                            (not measured)
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torchvision.transforms import v2

import data
import models
from common import config, engine, figures, layers, neighbours, optim, plan, randomness, transforms


@dataclass
class Config(config.RunConfig):
    """Pre-training of ViT-B as in LUT's main results (LUT, 5.1, and its released code)."""
    # The method
    model: str = "vit_b"  # vit_tiny, vit_ti, vit_s, vit_b, vit_l, vit_h
    patch_size: int = 16  # pixels; must divide the image; 0 is 16
    mask_ratio: float = 0.75  # share of a view that the student does not see, in [0.5, 1)
    target: str = "norm_pixels"  # pixels, norm_pixels (each patch to mean 0, std 1)
    decoder_depth: int = 8  # blocks
    decoder_width: int = 512  # channels
    decoder_heads: int = 16  # attention heads
    context_weight: float = 0.25  # of the context loss; 0: MAE on LUT's crops, without a teacher
    pixel_weight: float = 1.0  # of MAE's loss beside it; 0 for the context loss alone
    one_directional: bool = False  # the student sees view 1 alone and the teacher view 2: cheaper
    steering: str = "unmasked"  # what the context loss acts on: unmasked, masked (ours), both
    context: str = "pooled"  # cls, pooled (mean of tokens), tokens, pooled+tokens (sum: ours)
    context_loss: str = "cosine"  # cosine, infonce (temperature 0.2: ours), smooth_l1 (ours)
    head_width: int = 4096  # hidden channels of projector and predictor
    target_mask_ratio: float = 0.0  # share of patches that the teacher does not see, in [0, 1)
    ema_decay: float = 0.996  # of the teacher at the first step; a cosine takes it to 1
    # The recipe
    img_size: config.Size = (224, 224)  # height x width in pixels
    in_chans: int = 3  # image channels
    crop: str = "simple"  # simple (resized to cover img_size, cut out anywhere), random_resized
    shift: int = 4  # pixels of mirrored border that a simple crop may reach into
    crop_scale: tuple[float, float] = (0.2, 1.0)  # area that a random_resized crop covers
    flip: float = 0.5  # probability of a horizontal flip, for each view
    view_jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)  # of view 2, up to hue
    three_augment: bool = True  # view 2 is then made grey, solarized or blurred
    epochs: float = 1600.0  # passes over the images; ablations in the paper take 400
    warmup_epochs: float = 40.0  # linear warm-up of the learning rate
    batch_size: int = 4096  # images of one optimizer step, over all processes
    micro_batch: int = 256  # images that one process holds at once
    base_lr: float = 1.5e-4  # per lr_batch images: lr = base_lr * batch_size / lr_batch
    lr_batch: float = 256.0  # images of base_lr; the released code's rule is 4 sqrt(batch_size)
    min_lr: float = 0.0  # end of the cosine
    weight_decay: float = 0.05  # AdamW
    # DIFF: LUT's text has betas of 0.9, 0.999 and a layer decay of 0.65; as in its code, 0.9, 0.95
    # and none.
    betas: tuple[float, float] = (0.9, 0.95)  # AdamW
    clip_grad: float = 0.0  # largest gradient norm; 0 for no clipping

    def check(self):
        super().check()
        config.one_of(self, target="pixels norm_pixels", steering="unmasked masked both")
        config.one_of(self, context="pooled cls tokens pooled+tokens", crop="simple random_resized")
        config.one_of(self, context_loss="cosine infonce smooth_l1")
        config.in_range(self, mask_ratio="[0.5, 1)", target_mask_ratio="[0, 1)", shift="[0, inf)")
        config.in_range(self, context_weight="[0, inf)", pixel_weight="[0, inf)")
        config.in_range(self, ema_decay="[0, 1]", head_width="[1, inf)")
        if "tokens" in self.context and self.target_mask_ratio:
            raise ValueError(f"--context {self.context} needs all of the teacher's tokens: "
                             "--target_mask_ratio 0")
        if self.context == "cls" and self.steering != "unmasked":
            raise ValueError("--context cls is no token that --steering "
                             f"{self.steering} could act on")
        too_few = min(self.micro_batch, self.batch_size) < 2 or not self.drop_last
        if self.context_weight and too_few:
            raise ValueError("BatchNorm needs two images at once, and as many on every process: "
                             "--micro_batch 2 or more, and no --drop_last false")
        if min(self.view_jitter) < 0 or max(self.view_jitter) > 1 or self.view_jitter[3] > 0.5:
            raise ValueError("--view_jitter takes four numbers in [0, 1], the last in [0, 0.5], "
                             f"not {self.view_jitter}")

    def views(self, augmentation):
        """What data.pretrain_set makes of an image: two draws of its augmentation."""
        return TwoViews(augmentation, self.crop == "simple", self.view_jitter, self.in_chans)


# ---------------------------------------- Views

class TwoViews:
    """Two independent draws of one image, uint8 (C, h, w) -> (2, C, *img_size).

    The colours of the second one are jittered, brightness, contrast, saturation and hue by up to
    `jitter`, in four of five images (LUT's released code). Channels other than RGB have no hue:
    their brightness and contrast are jittered, every channel by the same factors. `share_first`:
    the first step of the augmentation draws nothing, and is done once for both.
    """

    def __init__(self, augmentation, share_first, jitter, in_chans):
        steps = augmentation.transforms
        self.shared = steps[:1] if share_first else []
        self.each = v2.Compose(steps[len(self.shared) :])
        self.rgb = in_chans == 3
        self.jitter = v2.RandomApply([v2.ColorJitter(*jitter if self.rgb else jitter[:2])], 0.8)

    def __call__(self, image):
        for step in self.shared:
            image = step(image)
        one = self.each(image)  # (C, H, W)
        two = self.each(image)  # (C, H, W)
        if self.rgb:
            two = self.jitter(two)
        else:
            two = self.jitter(two[:, None])[:, 0]  # (C, H, W), as C grey images
        return torch.stack([one, two])  # (2, C, H, W)


def blur(imgs, sigma):
    """Every image (B, C, H, W) with a Gaussian of its own standard deviation, sigma (B,): a product
    with a matrix for rows and one for columns, whose lines are the Gaussian around one pixel, as
    far as it lies in the image, with sum 1."""
    def weights(n):
        place = torch.arange(n, device=imgs.device)
        offset = place - place[:, None]  # (n, n)
        exponent = offset.square() / (-2 * sigma.square()[:, None, None, None])  # (B, 1, n, n)
        return exponent.softmax(dim=3)

    return weights(imgs.shape[2]) @ imgs @ weights(imgs.shape[3]).mT  # (B, C, H, W)


@torch.no_grad()
def three_augment(imgs, noise, cfg=None):
    """Each normalised image (B, C, H, W) in grey, solarized from half brightness up, or blurred by
    0.1 to 2 pixels (DeiT III, as LUT uses it), in fp32. noise (B, 2), uniform in [0, 1), picks one,
    and how far it is blurred. Channels other than RGB are solarized or blurred."""
    mean, std = transforms.mean_std(imgs.shape[1], imgs.device, cfg)
    with torch.autocast(imgs.device.type, enabled=False):
        pixels = imgs.float() * std + mean  # in [0, 1]
        # DIFF: LUT's second view is blurred by a Gaussian itself; Pillow, in its released code,
        # takes box filters.
        blurred = blur(pixels, 0.1 + 1.9 * noise[:, 1])
        kinds = [v2.functional.solarize(pixels, 0.5), blurred]
        if imgs.shape[1] == 3:
            kinds.append(v2.functional.rgb_to_grayscale(pixels, num_output_channels=3))
        kind = (noise[:, 0] * len(kinds)).long()  # (B,)
        row = torch.arange(len(imgs), device=imgs.device)
        pixels = torch.stack(kinds)[kind, row]  # (B, C, H, W)
        return (pixels - mean) / std


# ---------------------------------------- Heads

class AllGather(torch.autograd.Function):
    """Rows (B, ...) of all processes, by rank: (world_size * B, ...); gradients go back to where a
    row is from."""

    @staticmethod
    def forward(ctx, x):
        rows = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, x.contiguous())
        return torch.cat(rows)  # (world_size * B, ...)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]  # (B, ...)


def all_gather(x):
    """(rows of all processes as one batch, by rank; the slice of them that is this process's own).
    x (B, ...), of the same B everywhere."""
    if not dist.is_initialized():
        return x, slice(len(x))
    first = dist.get_rank() * len(x)
    return AllGather.apply(x), slice(first, first + len(x))  # (world_size * B, ...)


class BatchNorm(nn.BatchNorm1d):
    """BatchNorm of (B, D) over what all processes hold at once, as nn.SyncBatchNorm does on GPUs
    alone. Each of them normalises the whole batch and goes on with its part, so that the running
    averages are the same everywhere."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        x, own = all_gather(x)  # (world_size * B, D)
        return super().forward(x)[own]  # (B, D)


def mlp_head(width, hidden):
    """Projector or predictor, (B, D) -> (B, D): no biases, BatchNorm between the two layers only
    (LUT's released code)."""
    head = nn.Sequential(nn.Linear(width, hidden, bias=False), BatchNorm(hidden), nn.ReLU(),
                         nn.Linear(hidden, width, bias=False))
    return head.apply(layers.init_weights)


# ---------------------------------------- Model

class LUT(nn.Module):
    """Student and teacher that `cfg` describes. Of V*B rows the first B belong to view 1, the
    others to view 2; with --one_directional V is 1. ValueError if its sizes do not fit."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.encoder = models.build(cfg.model, cfg.img_size, cfg.patch_size, cfg.in_chans)
        if self.encoder.num_prefix == 0:
            raise ValueError(f"{cfg.model} cannot encode a set of patches, as a ViT can; "
                             "um_mae.py is for pyramids")
        if self.encoder.grid == (1, 1):
            raise ValueError("two views that show no place twice need two patches or more, not one")
        self.grid, self.patch_size = self.encoder.grid, self.encoder.stride
        self.num_patches = self.grid[0] * self.grid[1]  # N
        self.N_keep = self.count_kept(cfg.mask_ratio)
        self.N_taught = self.count_kept(cfg.target_mask_ratio)
        # DIFF: LUT's text has one masked view and the other in full, as --one_directional; here as
        # in its code, both.
        self.num_views = 1 if cfg.one_directional or not cfg.context_weight else 2  # V
        self.num_noise = self.num_patches + 2  # for the masks, and for what is done to view 2
        self.input_shape = (2, cfg.in_chans, *cfg.img_size)

        D, pixels = self.encoder.width, self.patch_size**2 * cfg.in_chans
        self.decoder = models.Decoder(D, pixels, self.grid, cfg.decoder_width, cfg.decoder_depth,
                                      cfg.decoder_heads)
        self.encoder.checkpointing = self.decoder.checkpointing = cfg.activation_checkpointing
        self.mask_token = nn.Parameter(torch.randn(1, 1, cfg.decoder_width) * 0.02)
        self.teacher = self.lift = None
        if cfg.context_weight:
            if cfg.steering != "unmasked":
                self.lift = nn.Linear(cfg.decoder_width, D)
            self.projector = mlp_head(D, cfg.head_width)
            self.predictor = mlp_head(D, cfg.head_width)
            teacher = models.build(cfg.model, cfg.img_size, cfg.patch_size, cfg.in_chans)
            self.teacher = nn.ModuleDict(
                {"encoder": teacher, "projector": mlp_head(D, cfg.head_width)})
            self.teacher.requires_grad_(False).eval()
            self.update_ema(0.0)  # makes it a copy of the student

    def count_kept(self, ratio):
        return max(1, math.floor(self.num_patches * (1 - ratio) + 1e-9))  # 100 * (1 - 0.9): 9.999

    def forward(self, imgs, noise):
        """imgs (B, 2, C, H, W) normalised, noise (B, N + 2) uniform in [0, 1) -> loss, a scalar."""
        B, V = len(imgs), self.num_views
        noise, view_noise = noise[:, : self.num_patches], noise[:, self.num_patches :]
        views = self.augment(imgs, view_noise)  # (2, B, C, H, W)
        student_imgs = views[:V].flatten(0, 1)  # (V*B, C, H, W)
        ids_keep, ids_restore, mask = self.mask(noise)
        latent = self.encode(student_imgs, ids_keep)  # (V*B, 1 + N_keep, D)
        # Only view 1 is predicted; the context loss may need the decoder's tokens of both.
        num_decoded = B if self.cfg.steering == "unmasked" else V * B
        decoded = self.decode(latent[:num_decoded], ids_restore[:num_decoded])
        pred = self.decoder.pred(decoded[:B])  # (B, N, p*p*C)

        pixel_loss = self.loss(pred, self.target(views[0]), mask[:B])
        loss = self.cfg.pixel_weight * pixel_loss
        self.terms = {"pixel_loss": pixel_loss.detach()}  # for the log
        if self.cfg.context_weight:
            teacher_imgs = views.flip(0)[:V].flatten(0, 1)  # (V*B, C, H, W), each one's other view
            taught = self.teach(teacher_imgs, noise)  # (V*B, 1 + N, D)
            context_loss = self.context(latent, decoded, ids_restore, taught)
            loss = loss + self.cfg.context_weight * context_loss
            self.terms["context_loss"] = context_loss.detach()
        return loss

    def augment(self, imgs, noise):
        """Pairs (B, 2, C, H, W) and noise (B, 2) -> both views, view 2 as the networks see it:
        (2, B, C, H, W)."""
        one, two = imgs.unbind(dim=1)  # each (B, C, H, W)
        if self.cfg.three_augment:
            two = three_augment(two, noise, self.cfg)
        return torch.stack([one, two])  # (2, B, C, H, W)

    def mask(self, noise):
        """noise (B, N) -> ids_keep (V*B, N_keep), ids_restore (V*B, N), mask (V*B, N) bool, True =
        hidden.

        View 1 keeps what comes first in the sorted noise, and view 2 what comes next: its list is
        that of view 1, rolled by N_keep. So places are disjoint on the grid, though not in the
        picture, out of which both views are cut independently.
        """
        one = noise.argsort(dim=1, stable=True)  # (B, N); stable: alike on CPU and GPU
        two = one.roll(-self.N_keep, dims=1)
        ids_shuffle = torch.cat([one, two][: self.num_views])  # (V*B, N)
        ids_restore = ids_shuffle.argsort(dim=1)  # (V*B, N)
        return ids_shuffle[:, : self.N_keep], ids_restore, ids_restore >= self.N_keep

    def encode(self, imgs, ids_keep, encoder=None):
        """Only the patches at ids_keep go through the encoder (the student's) -> latent (V*B, 1 +
        N_keep, D), class token first."""
        encoder = encoder or self.encoder
        visible = layers.gather(encoder.embed(imgs), ids_keep)  # (V*B, N_keep, D)
        coords = layers.places(ids_keep, self.grid)  # (V*B, N_keep, 2)
        return encoder.encode(visible, coords)

    def decode(self, latent, ids_restore):
        """Mask tokens stand for hidden patches: (V*B, N, decoder_width), out of which decoder.pred
        makes pixels."""
        x = self.decoder.embed(latent)  # (V*B, 1 + N_keep, decoder_width)
        cls, visible = x[:, :1], x[:, 1:]
        num_hidden = self.num_patches - visible.shape[1]
        hidden = self.mask_token.to(x.dtype).expand(len(x), num_hidden, -1)
        patches = torch.cat([visible, hidden], dim=1)  # (V*B, N, decoder_width), shuffled
        patches = layers.gather(patches, ids_restore)  # (V*B, N, decoder_width), raster order
        return self.decoder.decode(torch.cat([cls, patches], dim=1))  # (V*B, N, decoder_width)

    def target(self, imgs):
        """What to predict for each patch, fp32: (B, N, p*p*C)."""
        patches = layers.patchify(imgs.float(), self.patch_size)  # (B, N, p*p*C)
        return self.normalise(patches, imgs)

    def normalise(self, patches, imgs):
        """Patches (B, N, p*p*C) on the scale of the target of imgs, fp32."""
        if self.cfg.target == "norm_pixels":
            own = layers.patchify(imgs.float(), self.patch_size)  # (B, N, p*p*C)
            mean, std = layers.patch_statistics(own)
            return (patches - mean) / std
        return patches

    def loss(self, pred, target, mask):
        """MAE's loss: mean squared error over hidden patches, fp32."""
        error = (pred.float() - target).square().mean(dim=2)  # (B, N)
        return (error * mask).sum() / mask.sum()

    @torch.no_grad()
    def teach(self, imgs, noise):
        """The teacher's latent of whole images, (V*B, 1 + N, D); or of what --target_mask_ratio
        leaves of them: patches that the student sees last, if at all (ours), which are those at the
        end of the sorted noise (B, N), the same in both views."""
        encoder = self.teacher["encoder"]
        if self.N_taught == self.num_patches:
            return encoder(imgs)
        ids = noise.argsort(dim=1, stable=True)[:, -self.N_taught :]  # (B, N_taught)
        return self.encode(imgs, ids.repeat(self.num_views, 1), encoder)

    def context(self, latent, decoded, ids_restore, taught):
        """LUT's loss: how far the student's vectors of a view, projected and predicted, are from
        the teacher's of the other, projected; a mean over views, a sum over what else is compared,
        fp32."""
        loss = 0.0
        for student, teacher in self.pairs(latent, decoded, ids_restore, taught):
            student = self.predictor(self.projector(student))  # (n, D)
            teacher = self.teacher["projector"](teacher)  # (n, D)
            loss = loss + self.distance(student, teacher)
        return loss / self.num_views

    def pairs(self, latent, decoded, ids_restore, taught):
        """What is compared, view by view because BatchNorm is to see one at a time: [(the student's
        vectors (n, D), the teacher's (n, D))]. Tokens go by their place on the grid, wherever crops
        and flips put these in the picture. --steering says which of the student's: the encoder's of
        visible places, the decoder's of hidden ones, lifted, or both. The teacher's mean is of
        all."""
        # The student's tokens and their places, visible ones first
        tokens = latent[:, 1:]  # (V*B, N_keep, D)
        ids_shuffle = ids_restore.argsort(dim=1)  # (V*B, N)
        if self.lift:
            hidden = layers.gather(decoded, ids_shuffle[:, self.N_keep :])
            tokens = torch.cat([tokens, self.lift(hidden)], dim=1)  # (V*B, N, D)
        parts = {"unmasked": slice(self.N_keep), "masked": slice(self.N_keep, None),
                 "both": slice(None)}
        part = parts[self.cfg.steering]
        tokens, ids = tokens[:, part], ids_shuffle[:, part]  # (V*B, T, D), (V*B, T)

        pairs = []
        for name in self.cfg.context.split("+"):
            if name == "cls":
                student, teacher = latent[:, :1], taught[:, :1]  # each (V*B, 1, D)
            elif name == "pooled":
                student = tokens.mean(dim=1, keepdim=True)  # (V*B, 1, D)
                teacher = taught[:, 1:].mean(dim=1, keepdim=True)  # (V*B, 1, D)
            else:
                student, teacher = tokens, layers.gather(taught[:, 1:], ids)  # each (V*B, T, D)

            students, teachers = student.chunk(self.num_views), teacher.chunk(self.num_views)
            for student, teacher in zip(students, teachers, strict=True):  # each (B, T, D)
                pairs.append((student.flatten(0, 1), teacher.flatten(0, 1)))  # each (B*T, D)
        return pairs

    def distance(self, student, teacher):
        """Of n vectors (n, D) from the teacher's, on average, fp32: 2 - 2 cos; InfoNCE of cosines /
        0.2, of which the teacher's vectors are the answers; or smooth L1."""
        student, teacher = student.float(), teacher.float()
        if self.cfg.context_loss == "smooth_l1":  # of vectors that are not normalised
            return F.smooth_l1_loss(student, teacher)
        student, teacher = F.normalize(student, dim=1), F.normalize(teacher, dim=1)
        if self.cfg.context_loss == "cosine":
            return 2 - 2 * (student * teacher).sum(dim=1).mean()

        # InfoNCE: the teacher's vectors of all processes are wrong answers, but for one each.
        keys, own = all_gather(teacher)  # (n of all processes, D)
        with torch.autocast(keys.device.type, enabled=False):
            answers = torch.arange(len(keys), device=keys.device)[own]
            return F.cross_entropy(student @ keys.T / 0.2, answers)

    def update_ema(self, decay):
        """teacher = decay * teacher + (1 - decay) * student, BatchNorm's running averages included
        (released code). Nothing to do without a teacher."""
        if self.teacher:
            optim.update_ema(self.teacher, self, decay)

    def train(self, mode=True):
        """The teacher stays in eval mode: its BatchNorm has averages of its own, which lag by some
        1 / (1 - ema_decay) steps."""
        super().train(mode)
        if self.teacher:
            self.teacher.eval()
        return self


@torch.no_grad()
def prepare(model, imgs, noise):
    """Before the first step: the losses of trivial predictors, which first losses are read against:
    for the hidden pixels of view 1, zero, and each patch's own mean colour; for the context, one
    vector, the mean of the teacher's, whatever the image."""
    view, noise = imgs[:, 0], noise[:, : model.num_patches]  # (B, C, H, W), (B, N)
    mask = model.mask(noise)[2][: len(imgs)]  # (B, N), of view 1
    target = model.target(view)
    patches = layers.patchify(view, model.patch_size)  # (B, N, p*p*C)
    flat = model.normalise(layers.mean_colours(patches, model.cfg.in_chans), view)
    guesses = {"pixels: zero": torch.zeros_like(target), "pixels: patch mean": flat}
    losses = {name: model.loss(pred, target, mask) for name, pred in guesses.items()}

    if model.teacher:
        views = imgs.transpose(0, 1)[: model.num_views].flatten(0, 1)  # (V*B, C, H, W)
        pooled = model.teach(views, noise)[:, 1:].mean(dim=1)  # (V*B, D)
        vectors = model.teacher["projector"](pooled)  # (V*B, D)
        mean = F.normalize(vectors, dim=1).mean(dim=0)  # (D,)
        losses["context: one vector"] = model.distance(mean.expand_as(vectors), vectors)
    return {name: round(loss.item(), 4) for name, loss in losses.items()}


@torch.no_grad()
def reconstruct(model, imgs, noise):
    """{row title: images (B, C, H, W) in [0, 1]}: view 1 masked and predicted, view 2 as the
    student sees it. imgs normalised. Mean and contrast of a normalised target: the original's."""
    B = len(imgs)
    noise, view_noise = noise[:, : model.num_patches], noise[:, model.num_patches :]
    one, two = model.augment(imgs, view_noise)  # each (B, C, H, W)
    ids_keep, ids_restore, mask = model.mask(noise)
    latent = model.encode(one, ids_keep[:B])  # (B, 1 + N_keep, D)
    pred = model.decoder.pred(model.decode(latent, ids_restore[:B])).float()  # (B, N, p*p*C)
    one = layers.patchify(one, model.patch_size)  # (B, N, p*p*C)
    two = layers.patchify(two, model.patch_size)  # (B, N, p*p*C)

    note = ""
    if model.cfg.target == "norm_pixels":
        mean, std = layers.patch_statistics(one)
        pred = pred * std + mean
        note = "\n(true mean and std\nof each patch)"

    hidden = mask[:B, :, None]  # (B, N, 1)
    rows = {
        "view 1": one,
        "masked": one.masked_fill(hidden, 0.0),
        "prediction" + note: figures.dimmed(pred, hidden),
        "prediction\nand visible": torch.where(hidden, pred, one),
        "view 2": two,
    }
    if model.num_views == 2:
        rows["view 2\nmasked"] = two.masked_fill(mask[B:, :, None], 0.0)
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
            return plan.show(cfg, LUT)
        model = LUT(cfg).to(run.device)
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
        # DIFF: LUT's text has a constant decay of the teacher; as in its released code, ours goes
        # to 1 (--ema_decay).
        model.update_ema(1 - optim.cosine(step, schedule.steps, 1 - cfg.ema_decay, 0.0))

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
