"""Fine-tuning: what a pre-trained encoder is worth once there are labels.

    encoder.pt --> encoder --> mean of patch tokens (or class token) --> norm --> linear head --> cross-entropy

One script for every protocol: all of it trains, with smaller learning rates for earlier layers; or the last blocks
(`--train_blocks 4`), or the head alone (`--mode linear`), or nothing (`--mode knn`); from pre-trained or from random
weights (`--init none`); from an encoder that lost its last blocks or has them shuffled (`--drop_layers 2`,
`--shuffle_layers`). Set-up and step are those of mae.py; what differs is the model, and labels instead of masks.
protocols.py holds what a protocol does to a model, evaluate.py how it is judged.

Paper: He et al., Masked Autoencoders Are Scalable Vision Learners, arXiv 2111.06377, 4.3, A.1 and A.2.

    CPU     python finetune.py --config configs/finetune_tiny.yaml --init runs/mae/encoder.pt --out runs/finetune
    1 GPU   python finetune.py --config configs/finetune_vit_b.yaml --init runs/mae_b/encoder.pt --data /data/imagenet
    8 GPUs  torchrun --nproc-per-node 8 finetune.py --config configs/finetune_vit_b.yaml --init ... --data ...
    check   python finetune.py --eval --init runs/finetune/encoder.pt --out runs/eval
    use     python finetune.py --predict a.png b.png --init runs/finetune/encoder.pt
"""

import dataclasses

import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import models
from common import checkpoint, engine, evaluate, protocols, weights
from common.options import judges, one_of
from common.transforms import always_alike, mix


@dataclasses.dataclass
class Config(engine.RunConfig):
    """Fine-tuning of ViT-B as MAE's released recipe has it; the paper's table differs in lr and layer decay."""

    init: str = "none"  # encoder.pt of a run, or published weights (.pth, .safetensors); none for random weights
    init_size: engine.Size = (0, 0)  # of the images that published weights were made for, where they do not tell
    mode: str = "finetune"  # finetune; linear: the head alone, other defaults (see LINEAR); knn: nothing is trained
    train_blocks: float = 0.0  # train only the last blocks and the head; 0.5 is the MLP of the last block; 0 trains all
    drop_layers: int = 0  # cut off so many blocks of --init, from the end; of a pyramid from stage 3, with stage 4
    shuffle_layers: bool = False  # blocks get the weights of other blocks of --init, at random
    model: str = "auto"  # vit_b, swin_t, pvtv2_b2, torchvision:resnet18, ... (see models.py); auto as in --init
    patch_size: int = 0  # pixels; 0 takes it from --init, or is 16 for a ViT and 4 for a pyramid
    in_chans: int = 0  # image channels; 0 takes it from --init, or 3
    img_size: engine.Size = (0, 0)  # height x width in pixels; 0 takes it from --init, or is 224
    window: int = 0  # side of Swin's windows in tokens; 0 as in --init, or 7
    pool: str = "auto"  # mean of patch tokens, or cls: the class token; auto as a classifier in --init, or mean
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
    optimizer: str = "auto"  # adamw, lars, sgd; auto is lars for linear, or else adamw
    weight_decay: float = 0.05  # of matrices
    betas: tuple[float, float] = (0.9, 0.999)  # AdamW
    clip_grad: float = 0.0  # largest gradient norm; 0 for no clipping
    ema: float = 0.0  # decay of a moving average of the weights, which is then evaluated and exported; 0 for none
    eval_epochs: float = 5.0  # epochs between evaluations
    eval: bool = False  # evaluate the classifier in --init and stop
    predict: tuple[str, ...] = ()  # image files: print what the classifier in --init takes each for, and stop
    checkpoint: str = ""  # another name for --init
    neighbours: int = 20  # of an image, which vote in knn
    corruptions: bool = False  # judge on noisy, blurred, faded and coarse images, too, at five strengths each
    confusion: bool = False  # draw OUT/pictures/confusion.png


# What --mode linear has for defaults: MAE's linear probing of ViT-B (A.1), but for the class token (--pool cls), which
# not every encoder has.
LINEAR = {"drop_path": 0.0, "mixup": 0.0, "cutmix": 0.0, "smoothing": 0.0, "rand_augment": False, "random_erasing": 0.0,
          "epochs": 90.0, "warmup_epochs": 10.0, "batch_size": 16384, "micro_batch": 512, "base_lr": 0.1, "min_lr": 0.0,
          "weight_decay": 0.0}


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
        """(B, C, H, W), or features (B, D) that were kept, -> logits (B, K); `noise` as the encoder takes it."""
        features = imgs if imgs.dim() == 2 else self.features(imgs, noise)  # (B, D)
        return self.head(self.fc_norm(features))  # (B, K)

    def train(self, mode=True):
        """As ever, but what is frozen stays as it is: BatchNorm in it keeps its statistics."""
        super().train(mode)
        for module in self.encoder.modules():
            if (own := list(module.parameters(recurse=False))) and not any(p.requires_grad for p in own):
                module.eval()
        return self

    def export(self, classes):
        """What encoder.pt needs beside the encoder to classify again: plain data and the tensors of norm and head."""
        tensors = {k: v for k, v in self.state_dict().items() if not k.startswith("encoder.")}
        return {"pool": self.pool, "head_norm": self.head_norm, "classes": list(classes), "tensors": tensors}

    def depth_below(self, name):
        """How many layers a parameter lies below the head, for layer decay: 0 for norm and head themselves."""
        inside = name.startswith("encoder.")
        return self.encoder.num_layers + 1 - self.encoder.layer_id(name.removeprefix("encoder.")) if inside else 0


def resolve(cfg):
    """(cfg with model, sizes and channels as --init has them, content of --init). ValueError or FileNotFoundError,
    in one line, if it is no encoder or another one than the options ask for."""
    one_of(cfg, mode="finetune linear knn", head_start="random probe", split="val test",
           optimizer="auto adamw lars sgd")
    if cfg.mode == "linear" and (cfg.mixup or cfg.cutmix):
        raise ValueError("--mixup and --cutmix are of --mode finetune, and must be 0 in linear")
    names = {cfg.init, cfg.checkpoint or cfg.init} - {"none"}
    if bool(cfg.eval) + bool(cfg.predict) + (cfg.mode == "knn") > 1 or len(names) > 1:
        raise ValueError("one of --eval, --predict and --mode knn at a time, and one of --init and --checkpoint")
    if not 0 <= cfg.ema < 1 or cfg.neighbours < 1 or cfg.drop_layers < 0:
        raise ValueError("--ema takes [0, 1), --neighbours 1 or more, --drop_layers 0 or more, not "
                         f"{cfg.ema}, {cfg.neighbours}, {cfg.drop_layers}")
    if cfg.train_blocks and cfg.mode != "finetune":
        raise ValueError(f"--train_blocks {cfg.train_blocks:g}: nothing of the encoder trains in --mode {cfg.mode}")
    judged = "--eval" if cfg.eval else "--predict" if cfg.predict else ""
    if judged and (cfg.drop_layers or cfg.shuffle_layers):
        raise ValueError(f"--drop_layers and --shuffle_layers come before training, not with {judged}")
    if cfg.corruptions and cfg.mode == "knn":
        raise ValueError("--corruptions needs a classifier, which --mode knn has not")
    cfg = dataclasses.replace(cfg, init=cfg.checkpoint or cfg.init)
    if cfg.init == "none" and (judged or cfg.shuffle_layers or cfg.model == "auto"):
        raise ValueError(f"{judged} needs a classifier in --init" if judged else "--shuffle_layers needs an --init"
                         if cfg.shuffle_layers else "--init none needs a --model")
    cfg, saved = weights.as_in_init(cfg)
    if judged and "classifier" not in saved:
        raise ValueError(f"{judged}: {cfg.init} holds an encoder and no classifier; fine-tune it first")
    if cfg.corruptions and cfg.in_chans not in (1, 3):
        raise ValueError(f"--corruptions know grey and RGB, not --in_chans {cfg.in_chans}")
    return cfg, saved


def build_encoder(cfg, saved):
    """The encoder that the options and `saved` describe, with random weights."""
    encoder = weights.encoder_for(cfg, saved, trains=cfg.mode == "finetune")
    if cfg.drop_layers:
        protocols.drop_layers(encoder, cfg.drop_layers)
    return encoder


def build_classifier(cfg, saved, classes, load=True):
    """The classifier to train or, with --eval, to evaluate; its encoder is the one in `saved`, or has random weights
    (always without `load`). ValueError, in one line, if `saved` does not fit, or has no classifier of these classes."""
    judged, head = load and (cfg.eval or cfg.predict), saved.get("classifier") if saved else None
    if judged and not (head and (head.get("unnamed") or head["classes"] == classes)):
        raise ValueError(f"{cfg.init} holds no classifier of the {len(classes)} classes {', '.join(classes)[:80]}")
    if head and head.get("unnamed") and cfg.pool != "auto":  # from elsewhere: what it pools is told by no name
        head = {**head, "pool": cfg.pool}
        saved = {**saved, "classifier": head}
    pool = cfg.pool if cfg.pool != "auto" else head["pool"] if head else "mean"
    auto = "batch" if cfg.mode == "linear" or cfg.head_start == "probe" else "layer" if pool == "mean" else "none"
    bare = saved and ("dense" in saved or (head and head["head_norm"] == "layer"))  # without a last norm of its own
    if cfg.mode == "knn" or bare:
        auto = "layer" if bare else "none"
    head_norm = head["head_norm"] if judged else auto if cfg.head_norm == "auto" else cfg.head_norm
    if judged and (pool != head["pool"] or cfg.head_norm not in ("auto", head_norm)):
        raise ValueError(f"--pool {pool} --head_norm {cfg.head_norm}, but the classifier in {cfg.init} pools by "
                         f"{head['pool']} and has the norm {head_norm}")
    if bare and head_norm != "layer":
        raise ValueError(f"--head_norm {head_norm}, but the last norm of the encoder in {cfg.init} went into a head: "
                         "layer, or auto, starts another one")
    make = lambda: Classifier(build_encoder(cfg, saved), len(classes), pool, head_norm)  # noqa: E731
    model = make()
    if saved and load:
        load_weights(cfg, model, saved, classes)
    model.requires_grad_(cfg.mode == "finetune")
    model.head.requires_grad_(True)
    if cfg.train_blocks:
        protocols.freeze(model.encoder, cfg.train_blocks)
    if cfg.ema and not judges(cfg):
        average = make().requires_grad_(False)
        average.load_state_dict(model.state_dict())
        model.average = average
    return model


def load_weights(cfg, model, saved, classes):
    """Copy the encoder in `saved` and, if it was fine-tuned, what still fits of its head, and say what that is: all of
    it for the same classes, so that fine-tuning goes on; for others the norm, which was trained with the encoder."""
    head, parts = saved.get("classifier"), []
    if head and (head["pool"], head["head_norm"]) == (model.pool, model.head_norm) and not cfg.drop_layers:
        same = cfg.mode == "finetune" and cfg.head_start == "random" and head["classes"] == classes
        goes_on = cfg.eval or cfg.predict or same
        parts = ["fc_norm", "head"] if goes_on else ["fc_norm"]
        saved = {name: value for name, value in saved.items() if name != "classifier"}
        saved["notes"] = [*saved.get("notes", []), f"kept of its classifier: {', '.join(parts)}"]
    if cfg.drop_layers or cfg.shuffle_layers:
        seed = cfg.seed if cfg.shuffle_layers else None
        kept, notes = protocols.kept_tensors(model.encoder, saved["model"], seed)
        saved = {**saved, "model": kept, "notes": [*saved.get("notes", []), *notes]}
    fresh = [name for name in model.export(classes)["tensors"] if name.split(".")[0] not in parts]
    weights.load_encoder(model.encoder, saved, cfg.init, fresh)
    for part in parts:
        own = {k.removeprefix(part + "."): v for k, v in head["tensors"].items() if k.startswith(part + ".")}
        checkpoint.load_exactly(getattr(model, part), own, f"{cfg.init}, {part}")


def build_optimizer(cfg, model):
    """AdamW, LARS or SGD with momentum (MAE, A.1), for layers that learn at rates of their own."""
    kind = cfg.optimizer if cfg.optimizer != "auto" else "lars" if cfg.mode == "linear" else "adamw"
    groups = engine.parameter_groups(model, cfg.weight_decay, lambda name: cfg.layer_decay ** model.depth_below(name))
    if kind == "adamw":
        return torch.optim.AdamW(groups, betas=cfg.betas, fused=True)
    return protocols.LARS(groups) if kind == "lars" else torch.optim.SGD(groups, momentum=0.9)


# ---------------------------------------- Training

@engine.record
def main(argv=None):
    # Set-up: as in mae.py, with a labelled training and validation set, and layers that learn at their own rates.
    cfg = engine.configure(Config, __doc__, argv, presets={"linear": LINEAR})
    run = engine.start(cfg)
    with engine.user_errors():
        cfg, saved = resolve(cfg)
        if cfg.plan:
            return engine.plan(cfg, lambda cfg: build_classifier(cfg, saved, range(1000), load=False))
        if cfg.predict:
            classes = saved["classifier"]["classes"]
            return evaluate.predict(cfg, run, build_classifier(cfg, saved, classes).to(run.device), classes)
        val = data.labelled_set(cfg, cfg.split)
        classes = val.source.classes
        model = build_classifier(cfg, saved, classes).to(run.device)
        if cfg.eval or cfg.mode == "knn":
            return evaluate.alone(cfg, run, model, val)
        dataset = data.labelled_set(cfg, "train")
        sampler = data.global_batches(len(dataset), cfg, run)
    optimizer = build_optimizer(cfg, model)
    steps, warmup = engine.lengths(cfg, sampler.steps_per_epoch)
    peak = cfg.base_lr * cfg.batch_size / cfg.lr_batch  # linear scaling rule (MAE, A.1)
    first = engine.open_run(cfg, run, model, optimizer, sampler, steps, warmup=warmup, lr=peak, images=len(dataset))
    if cfg.head_start == "probe" and not first:
        plain = data.labelled_set(cfg, "train", augment=False)
        protocols.start_head(model, *evaluate.extract(cfg, run, model.encoder, plain, model.pool))
        if cfg.ema:  # the average begins where the head does
            models.blend(model.average, model, 0.0)
    if cached := cfg.mode == "linear" and always_alike(cfg):
        dataset = evaluate.cached(cfg, run, model, dataset)
    judged = model.average if cfg.ema else model
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
            imgs = imgs.to(run.device, non_blocking=True)
            imgs = imgs if cached else data.normalize(imgs)  # (B, C, H, W), or (B, D)
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
        if cfg.ema:
            models.blend(model.average, model, cfg.ema)

        engine.log(cfg, run, step, (step + 1) / sampler.steps_per_epoch, size, loss, lr, grad_norm)
        if told or engine.save_due(cfg, run, step, sampler.steps_per_epoch):
            engine.save(cfg, run, step + 1, model, optimizer, judged.encoder, classifier=judged.export(classes))
        if told:
            break
        if engine.due(run, step, cfg.eval_epochs * sampler.steps_per_epoch) and step + 1 < run.last:
            result = evaluate.accuracy(cfg, run, judged, val)
            engine.note(run, step=step + 1, top1=result["top1"], top5=result["top5"])
            model.train()
    if (done := step + 1 if run.last > first else first) == run.last:
        evaluate.report(cfg, run, evaluate.judge(cfg, run, judged, val), step=done)
    engine.finish(run, done)


if __name__ == "__main__":
    main()
