"""Fine-tuning: what a pre-trained encoder is worth once there are labels.

    encoder.pt --> encoder --> mean of patch tokens (or class token) --> norm --> linear head --> cross-entropy

One script for the protocols of the paper: everything trains, with smaller learning rates for earlier layers
(`--mode finetune`); only a linear head trains (`--mode linear`); the same from random weights (`--init none`). Set-up
and step are those of mae.py; what differs is the model, labels instead of masks, and the evaluation.

Paper: He et al., Masked Autoencoders Are Scalable Vision Learners, arXiv 2111.06377, A.1 and A.2.

    CPU     python finetune.py --config configs/finetune_tiny.yaml --init runs/mae/encoder.pt --out runs/finetune
    1 GPU   python finetune.py --config configs/finetune_vit_b.yaml --init runs/mae_b/encoder.pt --data /data/imagenet
    8 GPUs  torchrun --nproc-per-node 8 finetune.py --config configs/finetune_vit_b.yaml --init ... --data ...
    check   python finetune.py --eval --init runs/finetune/encoder.pt --out runs/eval
"""

import dataclasses

import torch
import torch.nn as nn
import torch.nn.functional as F

import checkpoint
import data
import engine
import evaluate
import models
import weights
from transforms import mix


@dataclasses.dataclass
class Config(engine.RunConfig):
    """Fine-tuning of ViT-B as MAE's released recipe has it; the paper's table differs in lr and layer decay."""

    init: str = "none"  # encoder.pt of a run, or published weights (.pth, .safetensors); none for random weights
    init_size: engine.Size = (0, 0)  # of the images that published weights were made for, where they do not tell
    mode: str = "finetune"  # finetune: everything trains; linear: the head alone, with LARS (configs/linear_vit_b.yaml)
    model: str = "auto"  # vit_b, swin_t, pvtv2_b2, torchvision:resnet18, ... (see models.py); auto as in --init
    patch_size: int = 0  # pixels; 0 takes it from --init, or is 16 for a ViT and 4 for a pyramid
    in_chans: int = 0  # image channels; 0 takes it from --init, or 3
    img_size: engine.Size = (0, 0)  # height x width in pixels; 0 takes it from --init, or is 224
    window: int = 0  # side of Swin's windows in tokens; 0 as in --init, or 7
    pool: str = "mean"  # mean of patch tokens, or cls: the class token
    head_norm: str = "auto"  # layer, batch (no affine), none; auto: layer for mean, none for cls, batch for linear
    head_start: str = "random"  # random, or probe: logistic regression on the frozen features of the training set
    split: str = "val"  # evaluate on val or test
    labels: int = 0  # train on so many labelled images, the same number of every class; 0 for all
    layer_decay: float = 0.65  # lr of a layer relative to the next one
    drop_path: float = 0.1  # stochastic depth of the last block; grows linearly from 0 at the first
    mixup: float = 0.8  # alpha of mixup; 0 for none
    cutmix: float = 1.0  # alpha of cutmix; 0 for none; with both, every batch takes one of them
    smoothing: float = 0.1  # label smoothing
    rand_augment: bool = True  # two random operations of magnitude 9
    color_jitter: float = 0.0  # strength; 0 for none
    random_erasing: float = 0.25  # probability
    crop_scale: tuple[float, float] = (0.08, 1.0)  # share of the image's area that a random crop covers; 1,1 for none
    flip: float = 0.5  # probability of a horizontal flip
    shift: int = 0  # largest random shift in pixels
    epochs: float = 100.0  # passes over the labelled images
    warmup_epochs: float = 5.0  # linear warm-up of the learning rate
    batch_size: int = 1024  # images of one optimizer step, over all processes
    micro_batch: int = 128  # images that one process holds at once
    base_lr: float = 5e-4  # per lr_batch images: lr = base_lr * batch_size / lr_batch
    lr_batch: int = 256  # images that base_lr is stated for
    min_lr: float = 1e-6  # end of the cosine
    weight_decay: float = 0.05  # AdamW
    betas: tuple[float, float] = (0.9, 0.999)  # AdamW
    clip_grad: float = 0.0  # largest gradient norm; 0 for no clipping
    eval_epochs: float = 5.0  # epochs between evaluations
    eval: bool = False  # evaluate the classifier in --init and stop
    confusion: bool = False  # draw OUT/pictures/confusion.png


# ---------------------------------------- Model

class Classifier(nn.Module):
    """An encoder with a linear head on pooled, normalised features. The norm between them is a fresh LayerNorm in place
    of the encoder's last one (`layer`, as MAE's code for mean pooling), a BatchNorm without affine behind it (`batch`,
    as in MAE, A.1), or nothing (`none`)."""

    def __init__(self, encoder, num_classes, pool="mean", head_norm="layer"):
        super().__init__()
        if pool not in ("mean", "cls")[: 1 + encoder.num_prefix] or head_norm not in ("layer", "batch", "none"):
            raise ValueError(f"--pool is mean or (ViT) cls, --head_norm layer, batch or none, not {pool}, {head_norm}")
        self.encoder, self.pool, self.head_norm = encoder, pool, head_norm
        norms = {"layer": lambda: nn.LayerNorm(encoder.width, eps=1e-6), "none": nn.Identity,
                 "batch": lambda: nn.BatchNorm1d(encoder.width, affine=False, eps=1e-6)}
        self.fc_norm = norms[head_norm]()
        if head_norm == "layer":
            encoder.norm = nn.Identity()
        self.head = nn.Linear(encoder.width, num_classes)
        self.num_noise = 2 * encoder.num_layers
        nn.init.normal_(self.head.weight, std=0.01 if head_norm == "batch" else 2e-5)  # MAE's released code
        nn.init.zeros_(self.head.bias)

    def features(self, imgs, noise=None):
        """(B, C, H, W) -> pooled features (B, D), before the head's norm."""
        return evaluate.pooled(self.encoder, imgs, self.pool, noise)  # (B, D)

    def forward(self, imgs, noise=None):
        """(B, C, H, W) -> logits (B, K); `noise` (B, 2 * layers) as the encoder takes it."""
        return self.head(self.fc_norm(self.features(imgs, noise)))  # (B, K)

    def export(self, classes):
        """What encoder.pt needs beside the encoder to classify again: plain data and the tensors of norm and head."""
        tensors = {k: v for k, v in self.state_dict().items() if not k.startswith("encoder.")}
        return {"pool": self.pool, "head_norm": self.head_norm, "classes": list(classes), "tensors": tensors}

    def depth_below(self, name):
        """How many layers a parameter lies below the head, for layer decay: 0 for norm and head themselves."""
        inside = name.startswith("encoder.")
        return self.encoder.num_layers + 1 - self.encoder.layer_id(name.removeprefix("encoder.")) if inside else 0


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose step is, for a weight matrix, proportional to the norm of the matrix (You et al., 2017);
    biases and other one-dimensional parameters take plain steps without weight decay (MAE, A.1)."""

    def __init__(self, params, lr=0.0, weight_decay=0.0, momentum=0.9, trust=0.001):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "trust": trust})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                update = parameter.grad
                if parameter.dim() > 1:
                    update = update.add(parameter, alpha=group["weight_decay"])
                    size, length = parameter.norm(), update.norm()
                    ratio = torch.where((size > 0) & (length > 0), group["trust"] * size / length, 1.0)
                    update = update * ratio
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                state["momentum_buffer"].mul_(group["momentum"]).add_(update)
                parameter.add_(state["momentum_buffer"], alpha=-group["lr"])


def resolve(cfg):
    """(cfg with model, sizes and channels as --init has them, content of --init). ValueError or FileNotFoundError,
    in one line, if it is no encoder or another one than the options ask for."""
    if cfg.mode not in ("finetune", "linear") or cfg.head_start not in ("random", "probe"):
        raise ValueError(f"--mode is finetune or linear, --head_start random or probe; not {cfg.mode} {cfg.head_start}")
    if cfg.split not in ("val", "test"):
        raise ValueError(f"--split is val or test, not {cfg.split}")
    if cfg.micro_batch % 2 and (cfg.mixup or cfg.cutmix) and cfg.mode != "linear":
        raise ValueError(f"mixup and cutmix mix pairs: --micro_batch {cfg.micro_batch} must be even")
    if cfg.init == "none":
        if cfg.eval or cfg.model == "auto":
            raise ValueError("--eval needs a classifier in --init" if cfg.eval else "--init none needs a --model")
        arch, saved = {"in_chans": cfg.in_chans or 3, "img_size": (224, 224)}, None
    else:
        saved = weights.read_encoder(cfg.init, cfg.init_size)
        arch = {name: saved["arch"][name] for name in ("model", "patch_size", "in_chans", "img_size")}
    for name in arch.keys() - {"img_size", "in_chans"}:
        if getattr(cfg, name) not in ("auto", 0, arch[name]):
            raise ValueError(f"--{name} {getattr(cfg, name)}, but the encoder in {cfg.init} has {name} {arch[name]}")
    size = cfg.img_size if any(cfg.img_size) else tuple(arch["img_size"])
    return dataclasses.replace(cfg, **{**arch, "img_size": size, "in_chans": cfg.in_chans or arch["in_chans"]}), saved


def build_classifier(cfg, saved, classes):
    """The classifier to train or, with --eval, to evaluate; its encoder is the one in `saved`, or has random weights.
    ValueError, in one line, if `saved` does not fit, or holds no classifier of these classes to evaluate."""
    linear = cfg.mode == "linear"
    auto = "batch" if linear or cfg.head_start == "probe" else "layer" if cfg.pool == "mean" else "none"
    pool, head_norm = cfg.pool, auto if cfg.head_norm == "auto" else cfg.head_norm
    head = saved.get("classifier") if cfg.eval else None
    if cfg.eval:
        if not head or not (head.get("unnamed") or head["classes"] == classes):
            raise ValueError(f"{cfg.init} holds no classifier of the {len(classes)} classes {', '.join(classes)[:80]}")
        pool, head_norm = head["pool"], head["head_norm"]
    options = (saved["arch"]["options"] if saved else {}) | ({"window": cfg.window} if cfg.window else {})
    if options.get("positions") == "shared_bias" and not linear:
        options["positions"] = "block_bias"  # as SimMIM fine-tunes: every block gets a table of its own
    encoder = models.build(cfg.model, cfg.img_size, cfg.patch_size, cfg.in_chans, learn_positions=not linear,
                           drop_path=0.0 if linear else cfg.drop_path, **options)
    encoder.checkpointing = cfg.activation_checkpointing
    model = Classifier(encoder, len(classes), pool, head_norm)
    if saved:
        weights.load_encoder(encoder, saved, cfg.init, () if cfg.eval else model.export(classes)["tensors"])
    if cfg.eval:
        tensors = {**{f"encoder.{k}": v for k, v in encoder.state_dict().items()}, **head["tensors"]}
        checkpoint.load_exactly(model, tensors, cfg.init)
    encoder.requires_grad_(not linear)
    return model


# ---------------------------------------- Training

@engine.record
def main(argv=None):
    # Set-up: as in mae.py, with a labelled training and validation set, and layers that learn at their own rates.
    cfg = engine.configure(Config, __doc__, argv)
    run = engine.start(cfg)
    with engine.user_errors():
        cfg, saved = resolve(cfg)
        if cfg.plan and not cfg.eval:
            return engine.plan(cfg, lambda cfg: build_classifier(cfg, None, [str(i) for i in range(1000)]))
        val = data.labelled_set(cfg, cfg.split)
        classes = val.source.classes
        model = build_classifier(cfg, saved, classes).to(run.device)
        if cfg.eval:
            if run.main:
                engine.claim(cfg, run, None, {})
            evaluate.report(cfg, run, evaluate.accuracy(cfg, run, model, val), init=cfg.init)
            return engine.leave_group()
        dataset = data.labelled_set(cfg, "train")
        sampler = data.global_batches(len(dataset), cfg, run)
    if cfg.mode == "linear":
        optimizer = LARS(engine.parameter_groups(model, cfg.weight_decay))
    else:
        scale = lambda name: cfg.layer_decay ** model.depth_below(name)  # noqa: E731
        groups = engine.parameter_groups(model, cfg.weight_decay, scale)
        optimizer = torch.optim.AdamW(groups, betas=cfg.betas, fused=True)
    steps, warmup = engine.lengths(cfg, sampler.steps_per_epoch)
    peak = cfg.base_lr * cfg.batch_size / cfg.lr_batch  # linear scaling rule (MAE, A.1)
    first = engine.open_run(cfg, run, model, optimizer, sampler, steps, warmup=warmup, lr=peak, images=len(dataset))
    if cfg.head_start == "probe" and not first:
        plain = data.labelled_set(cfg, "train", augment=False)
        evaluate.start_head(model, *evaluate.extract(cfg, run, model.encoder, plain, model.pool))
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
            imgs, labels, where = next(batches)
            imgs = data.normalize(imgs.to(run.device, non_blocking=True))  # (B, C, H, W)
            targets = F.one_hot(labels.to(run.device), len(classes)).float()  # (B, K)
            if cfg.mode == "finetune":
                imgs, targets = mix(imgs, targets, cfg, engine.seed_of(cfg.seed, "mix", step))
            with engine.sync_on(left == 0, net), engine.autocast(run):
                logits = net(imgs, noise[where].to(run.device))  # (B, K)
                part = F.cross_entropy(logits.float(), targets, label_smoothing=cfg.smoothing) * (len(imgs) / size)
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
            engine.save(cfg, run, step + 1, model, optimizer, classifier=model.export(classes))
        if told:
            break
        if engine.due(run, step, cfg.eval_epochs * sampler.steps_per_epoch) and step + 1 < run.last:
            result = evaluate.accuracy(cfg, run, model, val)
            engine.note(run, step=step + 1, top1=result["top1"], top5=result["top5"])
            model.train()
    if (done := step + 1 if run.last > first else first) == run.last:
        evaluate.report(cfg, run, evaluate.accuracy(cfg, run, model, val), step=done)
    engine.finish(run, done)


if __name__ == "__main__":
    main()
