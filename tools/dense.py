"""Dense prediction: what a pre-trained encoder knows about every pixel; semantic segmentation, or depth from one image.

    encoder.pt --> encoder --maps--> norm, 1x1, enlarge, add --> 3x3 --> enlarge --> 1x1 --> (B, K, H, W)
                                     (four maps of a pyramid, one of a ViT)

The head is light on purpose, so that it is the encoder that counts, frozen (`--freeze`) or fine-tuned. Set-up and step
are those of finetune.py; what differs is the head, labels that are maps (dense_data.py says how they lie in a folder),
and the evaluation: mean intersection over union, or root mean squared and relative error.

Papers: Li et al., Uniform Masking, arXiv 2205.10063, 4 (segmentation); Xie et al., Revealing the Dark Secrets of Masked
Image Modeling (SECRETS), arXiv 2205.13543, 4.2 (depth, where it beats supervised pre-training).

    CPU     python -m tools.dense --config configs/dense_tiny.yaml --init runs/mae/encoder.pt --out runs/dense
    1 GPU   python -m tools.dense --config configs/dense_segment_vit_b.yaml --init ... --data /data/ade20k
    8 GPUs  torchrun --nproc-per-node 8 -m tools.dense --config configs/dense_segment_vit_b.yaml --init ... --data ...
    check   python -m tools.dense --eval --task segment --init runs/dense/encoder.pt --out runs/eval
"""

import json
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

import data
from common import checkpoint, engine, figures, weights
from tools.dense_data import dense_set
from tools.tasks import TASKS, accuracy, pictures


@dataclass
class Config(engine.RunConfig):
    """Segmentation with ViT-B as UM-MAE fine-tunes it on ADE20K, but for the head and the schedule."""

    # DIFF: a light head and a cosine schedule; UM-MAE and MAE have UperNet, UM-MAE and SECRETS a polynomial schedule.
    task: str = "segment"  # segment: a class for every pixel; depth: metres
    init: str = "none"  # encoder.pt of any run, or published weights; none for random weights
    init_size: engine.Size = (0, 0)  # of the images that published weights were made for, where they do not tell
    freeze: bool = False  # train the head alone
    model: str = "auto"  # vit_tiny, vit_b, swin_t, ..., see models.py; auto takes it from --init
    patch_size: int = 0  # pixels; 0 takes it from --init, or is 16 for a ViT and 4 for a pyramid
    in_chans: int = 0  # image channels; 0 takes it from --init, or 3
    img_size: engine.Size = (0, 0)  # height x width in pixels; 0 takes it from --init, or is 224
    window: int = 0  # side of Swin's windows in tokens; 0 as in --init, or 7
    head_width: int = 256  # channels of the head
    max_depth: float = 10.0  # metres; what is farther is taken as unknown
    depth_scale: float = 1000.0  # steps of a 16-bit label in a metre
    split: str = "val"  # evaluate on val or test
    labels: int = 0  # train on so many labelled images; 0 for all
    layer_decay: float = 0.65  # lr of a layer relative to the next one; 1 for pyramids (UM-MAE)
    drop_path: float = 0.1  # stochastic depth of the last block; grows linearly from 0 at the first
    color_jitter: float = 0.0  # strength; 0 for none
    crop_scale: tuple[float, float] = (0.25, 1.0)  # share of the image's area that a random crop covers; 1,1 for none
    flip: float = 0.5  # probability of a horizontal flip
    shift: int = 0  # largest random shift in pixels
    epochs: float = 127.0  # passes over the labelled images; 160,000 steps of ADE20K's 20,210 images
    warmup_epochs: float = 1.2  # linear warm-up of the learning rate
    batch_size: int = 16  # images of one optimizer step, over all processes
    micro_batch: int = 16  # images that one process holds at once
    base_lr: float = 1e-4  # per lr_batch images: lr = base_lr * batch_size / lr_batch
    lr_batch: int = 16  # images that base_lr is stated for
    min_lr: float = 0.0  # end of the cosine
    weight_decay: float = 0.05  # AdamW
    betas: tuple[float, float] = (0.9, 0.999)  # AdamW
    clip_grad: float = 0.0  # largest gradient norm; 0 for no clipping
    eval_epochs: float = 10.0  # epochs between evaluations
    eval: bool = False  # evaluate the encoder and head in --init and stop


# ---------------------------------------- Model

class Dense(nn.Module):
    """An encoder with a head that predicts `task.channels` numbers for every pixel. Every map gets a norm of its own,
    which takes the place of the encoder's last one; the finest is doubled by 2x2 transposed convolutions until a cell
    is 4 px or less, the stride of a pyramid's first stage (SECRETS' depth head has three of them)."""

    def __init__(self, encoder, task, img_size, width, freeze=False):
        super().__init__()
        encoder.norm = nn.Identity()
        self.encoder, self.task, self.freeze = encoder, task, freeze
        self.num_noise = 2 * encoder.num_layers
        with torch.no_grad():
            maps = encoder.eval().maps(torch.zeros(1, encoder.arch["in_chans"], *img_size))
        self.norms = nn.ModuleList(nn.LayerNorm(m.shape[1], eps=1e-6) for m in maps)
        self.laterals = nn.ModuleList(nn.Linear(m.shape[1], width) for m in maps)
        layers = [nn.Conv2d(width, width, 3, padding=1), nn.GELU()]
        for _ in range(math.ceil(math.log2(img_size[0] / maps[0].shape[2] / 4))):
            layers += [nn.ConvTranspose2d(width, width, 2, stride=2), nn.GELU()]
        self.head = nn.Sequential(*layers, nn.Conv2d(width, task.channels, 1))
        encoder.requires_grad_(not freeze)
        self.train()

    def train(self, mode=True):
        """As usual; a frozen encoder stays in evaluation mode, or else a BatchNorm in it would go on to learn."""
        super().train(mode)
        self.encoder.train(mode and not self.freeze)
        return self

    def forward(self, imgs, noise=None):
        """(B, C, H, W) -> (B, K, H, W); `noise` (B, 2 * layers) as the encoder takes it."""
        maps = self.encoder.maps(imgs, noise=noise)  # [(B, D, h, w)], the finest first
        maps = [lateral(norm(m.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)  # (B, width, h, w)
                for m, norm, lateral in zip(maps, self.norms, self.laterals, strict=True)]
        x = sum(F.interpolate(m, maps[0].shape[2:], mode="bilinear") for m in maps)  # (B, width, h, w), the finest
        return F.interpolate(self.head(x), imgs.shape[2:], mode="bilinear")  # (B, K, H, W)

    def export(self):
        """What encoder.pt needs beside the encoder to predict again: plain data and the tensors of the head."""
        tensors = {k: v for k, v in self.state_dict().items() if not k.startswith("encoder.")}
        return {"task": self.task.about, "tensors": tensors}

    def depth_below(self, name):
        """How many layers a parameter lies below the head, for layer decay: 0 for the head itself."""
        inside = name.startswith("encoder.")
        return self.encoder.num_layers + 1 - self.encoder.layer_id(name.removeprefix("encoder.")) if inside else 0


def resolve(cfg):
    """(cfg with model, patch_size, in_chans and img_size as --init has them, content of --init). ValueError or
    FileNotFoundError, in one line, if it is no encoder or another one than the options ask for."""
    if cfg.task not in TASKS or cfg.split not in ("val", "test"):
        raise ValueError(f"--task is {' or '.join(TASKS)}, --split val or test; not {cfg.task}, {cfg.split}")
    if min(cfg.head_width, cfg.max_depth, cfg.depth_scale) <= 0:
        raise ValueError("--head_width, --max_depth and --depth_scale must be greater than 0")
    if cfg.init == "none" and (cfg.eval or cfg.model == "auto"):
        raise ValueError("--eval needs an encoder and its head in --init, and training without --init a --model")
    return weights.as_in_init(cfg)


def build_dense(cfg, saved, classes, load=True):
    """The model to train or, with --eval, to evaluate; its encoder is the one in `saved`, or has random weights (always
    without `load`). ValueError, in one line, if `saved` does not fit, or holds no head for this task and these classes
    to evaluate."""
    task, width = TASKS[cfg.task](classes, cfg.max_depth), cfg.head_width
    if cfg.eval:
        head = saved["dense"] if isinstance(saved.get("dense"), dict) else {"task": "none at all"}
        tensors = head["tensors"] if checkpoint.all_ordinary(head.get("tensors")) else {}
        first = tensors.get("head.0.weight", torch.empty(0))  # (width, width, 3, 3)
        if head.get("task") != task.about or first.dim() != 4:
            raise ValueError(f"{cfg.init} holds no head for {task.about[:80]}, but {str(head.get('task'))[:80]}")
        width = min(first.shape[:2])
    encoder = weights.encoder_for(cfg, saved, trains=not cfg.freeze)
    model = Dense(encoder, task, cfg.img_size, width, cfg.freeze)
    if saved and load:
        weights.load_encoder(encoder, saved, cfg.init, () if cfg.eval else model.export()["tensors"])
    if cfg.eval:
        tensors = {**tensors, **{f"encoder.{k}": v for k, v in encoder.state_dict().items()}}
        checkpoint.load_exactly(model, tensors, cfg.init)
    return model


def report(cfg, run, model, dataset, **about):
    """Evaluate, print the scores, write OUT/result.json, and draw the first images in OUT/pictures."""
    result = accuracy(cfg, run, model, dataset)
    if run.main:
        print(", ".join(f"{k} {v}" for k, v in result.items() if k != "per_class"), flush=True)
        (run.out / "result.json").write_text(json.dumps({**about, **result}, indent=1) + "\n")
        figures.grid(run.out / "pictures" / f"{cfg.task}.png", pictures(model, dataset, run), cfg.task)


# ---------------------------------------- Training

@engine.record
def main(argv=None):
    # Set-up: as in finetune.py, with labels that are maps.
    cfg = engine.configure(Config, __doc__, argv)
    run = engine.start(cfg)
    with engine.user_errors():
        cfg, saved = resolve(cfg)
        if cfg.plan and not cfg.eval:
            return engine.plan(cfg, lambda cfg: build_dense(cfg, saved, [str(i) for i in range(150)], load=False))
        val = dense_set(cfg, cfg.split)
        model = build_dense(cfg, saved, val.source.classes).to(run.device)
        if cfg.eval:
            if run.main:
                engine.claim(cfg, run, None, {})
            report(cfg, run, model, val, init=cfg.init)
            return engine.leave_group()
        dataset = dense_set(cfg, "train")
        sampler = data.global_batches(len(dataset), cfg, run)
    groups = engine.parameter_groups(model, cfg.weight_decay, lambda name: cfg.layer_decay ** model.depth_below(name))
    optimizer = torch.optim.AdamW(groups, betas=cfg.betas, fused=True)
    steps, warmup = engine.lengths(cfg, sampler.steps_per_epoch)
    peak = cfg.base_lr * cfg.batch_size / cfg.lr_batch  # linear scaling rule (MAE, A.1)
    first = engine.open_run(cfg, run, model, optimizer, sampler, steps, warmup=warmup, lr=peak, images=len(dataset))
    net = engine.distribute(cfg, run, model)
    batches = engine.timed(run, data.loader(dataset, sampler, cfg.workers, pin=run.device.type == "cuda"))

    # The loop. Every step is one optimizer step on one global batch, whatever holds it: processes x micro-batches.
    model.train()
    for step in range(first, run.last):
        lr = engine.schedule(cfg.schedule, step, steps, warmup, peak, cfg.min_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        size = sampler.size(step)
        noise = engine.noise(cfg.seed, step, size, model.num_noise, use="drop path")  # (B, 2 * layers)
        loss = torch.zeros((), device=run.device)
        for left in reversed(range(sampler.micro_batches(step))):
            (imgs, labels), _, where = next(batches)
            imgs = data.normalize(imgs.to(run.device, non_blocking=True))  # (B, C, H, W)
            with engine.sync_on(left == 0, net), engine.autocast(run):
                output = net(imgs, noise[where].to(run.device))  # (B, K, H, W)
                part = model.task.loss(output.float(), labels.to(run.device)).sum() / size
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
        if told or engine.save_due(cfg, run, step, sampler.steps_per_epoch):
            engine.save(cfg, run, step + 1, model, optimizer, dense=model.export())
        if told:
            break
        if engine.due(run, step, cfg.eval_epochs * sampler.steps_per_epoch) and step + 1 < run.last:
            engine.note(run, step=step + 1, **accuracy(cfg, run, model, val))
            model.train()
    if (done := step + 1 if run.last > first else first) == run.last:
        report(cfg, run, model, val, step=done)
    engine.finish(run, done)


if __name__ == "__main__":
    main()
