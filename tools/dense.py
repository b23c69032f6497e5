r"""Dense prediction: what a pre-trained encoder knows about every pixel: its class, its depth, or if it is a keypoint.

    encoder.pt --> encoder --maps--> norm, 1x1, enlarge, add --> 3x3 --> enlarge --> 1x1 --> (B, K, H, W)
                                     (four maps of a pyramid, one of a ViT)

The head is light, so that the encoder is what counts, frozen (`--freeze`) or fine-tuned. Set-up and step are those of
finetune.py; labels are maps (dense_data.py says how they lie in a folder), and scores are mean intersection over union,
root mean squared and relative error, or the share of keypoints that are found.

Papers: Li et al., Uniform Masking, arXiv 2205.10063, 4 (segmentation); Xie et al., Revealing the Dark Secrets of Masked
Image Modeling (SECRETS), arXiv 2205.13543, 4.2 (depth and pose, where it beats supervised pre-training).

    CPU     python -m tools.dense --config configs/dense_tiny.yaml --init runs/mae/encoder.pt --out runs/segment
    1 GPU   python -m tools.dense --config configs/dense_segment_vit_b.yaml --init runs/um_mae_vit_b/encoder.pt \
                --data /data/ade20k --out runs/dense_segment_vit_b
    8 GPUs  torchrun --nproc-per-node 8 -m tools.dense --config configs/dense_segment_vit_b.yaml \
                --init runs/um_mae_vit_b/encoder.pt --data /data/ade20k --out runs/dense_segment_vit_b
    check   python -m tools.dense --eval --task segment --data shapes --init runs/segment/encoder.pt \
                --out runs/eval_dense
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import models
from common import checkpoint, config, engine, figures, layouts, optim, plan, randomness, transforms, weights
from tools.dense_data import dense_set
from tools.dense_tasks import TASKS, accuracy, pictures


@dataclass
class Config(config.RunConfig):
    """Segmentation with ViT-B as UM-MAE fine-tunes it on ADE20K, but for the head and the schedule."""
    # The method
    # DIFF: a light head and a cosine schedule; UM-MAE and MAE have UperNet, UM-MAE and SECRETS a polynomial schedule.
    task: str = "segment"  # segment: a class for every pixel; depth: metres; keypoints: heat maps of a shape's two
    init: str = "none"  # encoder.pt of any run, or published weights; none for random weights
    init_size: config.Size = (0, 0)  # of the images that published weights were made for, where they do not tell
    num_heads: int = 0  # of published weights of a ViT, where they do not tell; 0 as is usual for its size
    weights: str = ""  # which of several in a published file, as ema; empty for model or state_dict
    freeze: bool = False  # train the head alone
    model: str = "auto"  # vit_tiny, vit_b, swin_t, ..., see models.py; auto takes it from --init
    patch_size: int = 0  # pixels; 0 takes it from --init, or is 16 for a ViT and 4 for a pyramid
    window: int = 0  # side of Swin's windows in tokens; 0 as in --init, or 7
    head_width: int = 256  # channels of the head
    unknown: int = 255  # number in label files of a pixel that nobody labelled; -1 for none
    class_map: str = ""  # numbers in label files that stand for classes, as 255:1,7:2; others are classes themselves
    max_depth: float = 10.0  # metres; what is farther is taken as unknown
    depth_scale: float = 1000.0  # steps of a 16-bit label in a metre
    split: str = "val"  # evaluate on val or test
    labels: int = 0  # train on so many labelled images; 0 for all
    eval: bool = False  # evaluate the encoder and head in --init and stop
    eval_epochs: float = 10.0  # epochs between evaluations
    # The recipe
    img_size: config.Size = (0, 0)  # height x width in pixels; 0 takes it from --init, or is 224
    in_chans: int = 0  # image channels; 0 takes it from --init, or 3
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

    may_change = ("micro_batch", "eval_epochs")
    own_recipes = True

    def check(self):
        super().check()
        config.one_of(self, task=" ".join(TASKS), split="val test")
        config.in_range(self, head_width="(0, inf)", max_depth="(0, inf)", depth_scale="(0, inf)")
        config.in_range(self, layer_decay="[0, 1]", drop_path="[0, 1)", color_jitter="[0, inf)", labels="[0, inf)")
        config.in_range(self, shift="[0, inf)", eval_epochs="[0, inf)")
        if self.init == "none" and (self.eval or self.model == "auto"):
            raise ValueError("--init is missing: for --eval an encoder.pt of this tool; to train, one of any script, "
                             "or --model, which starts from random weights")

    def next_commands(self):
        return [["-m", "tools.dense", "--eval", "--task", self.task, "--init", f"{self.out}/encoder.pt", "--data",
                 self.data, "--out", f"{self.out}_eval"]]

    def evaluates_only(self):
        return self.eval


# ---------------------------------------- Model

class Dense(nn.Module):
    """An encoder, built without its last norm, and a head that predicts `task.channels` numbers for every pixel. Every
    map gets a norm of its own. The finest is doubled by 2x2 transposed convolutions until a cell is 4 px or less, the
    stride of a pyramid's first stage (SECRETS' depth head has three of them)."""

    def __init__(self, encoder, task, img_size, width, freeze=False):
        super().__init__()
        self.encoder, self.task, self.freeze = encoder, task, freeze
        self.num_noise = 2 * encoder.num_layers
        with torch.no_grad():
            maps = encoder.eval().maps(torch.zeros(1, encoder.arch["in_chans"], *img_size))
        self.norms = nn.ModuleList(nn.LayerNorm(m.shape[1], eps=1e-6) for m in maps)
        self.laterals = nn.ModuleList(nn.Linear(m.shape[1], width) for m in maps)
        layers = [nn.Conv2d(width, width, 3, padding=1), nn.GELU()]
        cell = img_size[0] / maps[0].shape[2]  # pixels
        for _ in range(math.ceil(math.log2(cell / 4))):
            layers += [nn.ConvTranspose2d(width, width, 2, stride=2), nn.GELU()]
        self.head = nn.Sequential(*layers, nn.Conv2d(width, task.channels, 1))
        encoder.requires_grad_(not freeze)
        self.train()

    def forward(self, imgs, noise=None):
        """(B, C, H, W) -> (B, K, H, W); `noise` (B, 2 * layers) as the encoder takes it."""
        maps = self.encoder.maps(imgs, noise=noise)  # [(B, D, h, w)], the finest first
        x = 0.0
        for norm, lateral, m in zip(self.norms, self.laterals, maps, strict=True):
            m = lateral(norm(m.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)  # (B, width, h, w)
            x = x + F.interpolate(m, maps[0].shape[2:], mode="bilinear")  # (B, width, h, w), of the finest map
        return F.interpolate(self.head(x), imgs.shape[2:], mode="bilinear")  # (B, K, H, W)

    def train(self, mode=True):
        """A frozen encoder stays in evaluation mode: a BatchNorm in it would go on to learn."""
        super().train(mode)
        self.encoder.train(mode and not self.freeze)
        return self

    def export(self):
        """What encoder.pt needs beside the encoder to predict again."""
        tensors = {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("encoder.")}
        return {"task": self.task.about, "tensors": tensors}


def resolve(cfg):
    """weights.as_in_init of options that make sense."""
    cfg.check()
    return weights.as_in_init(cfg, models.from_arch, models.SIZES)


def build_dense(cfg, saved, classes, load=True):
    """The model to train or, with --eval, to evaluate; its encoder is the one in `saved`, or has random weights (always
    without `load`). ValueError if `saved` does not fit, or holds no head for this task and these classes."""
    task, width, tensors = TASKS[cfg.task](classes, cfg.max_depth), cfg.head_width, {}
    if cfg.eval:
        head = saved["dense"] if isinstance(saved.get("dense"), dict) else {"task": "none at all"}
        if layouts.is_state_dict(head.get("tensors")):
            tensors = head["tensors"]
        first = tensors.get("head.0.weight", torch.empty(0))  # (width, width, 3, 3)
        if head.get("task") != task.about or first.dim() != 4:
            raise ValueError(f"{cfg.init} holds no head for {task.about[:80]}, but {str(head.get('task'))[:80]}")
        width = min(first.shape[:2])
    encoder = weights.encoder_for(cfg, saved, models.from_arch, not cfg.freeze, final_norm=False)
    model = Dense(encoder, task, cfg.img_size, width, cfg.freeze)
    if saved and load:
        weights.load_encoder(encoder, saved, cfg.init, () if cfg.eval else model.export()["tensors"], cfg)
    if cfg.eval:
        own = {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
        checkpoint.load_exactly(model, {**tensors, **own}, cfg.init)
    return model


def report(cfg, run, model, dataset, **about):
    """Evaluate, print the scores, write OUT/result.json, and draw the first images in OUT/pictures."""
    result = accuracy(run, model, data.evaluation(dataset, cfg, run))
    if run.is_main:
        scores = {name: value for name, value in result.items() if name != "per_class"}
        shown = [f"{name} {value if isinstance(value, int) else f'{value:.4g}'}" for name, value in scores.items()]
        print(", ".join(shown), flush=True)
        run.write_result(result, about, scores)
        rows, key = pictures(model, dataset, run)
        figures.grid(run.out / "pictures" / f"{cfg.task}.png", rows, cfg.task, **key)


# ---------------------------------------- Training

@engine.record
def main(argv=None):
    cfg = config.parse(Config, __doc__, argv)
    with config.user_errors():
        cfg, saved = resolve(cfg)
    run = engine.Run(cfg)  # processes, device, precision
    with config.user_errors():  # what is wrong with options, images or a checkpoint: one line
        if cfg.plan and not cfg.eval:
            classes = [str(i) for i in range(150)]
            return plan.show(cfg, lambda cfg: build_dense(cfg, saved, classes, load=False))
        val = dense_set(cfg, cfg.split)
        model = build_dense(cfg, saved, val.source.classes).to(run.device)
        if cfg.eval:
            if run.is_main:
                run.take_folder()
            report(cfg, run, model, val, init=cfg.init)
            return engine.leave_processes()
        dataset = dense_set(cfg, "train")
        sampler = data.global_batches(len(dataset), cfg, run)
        groups = optim.parameter_groups(model, cfg.weight_decay, optim.layer_decay(model, cfg.layer_decay))
        optimizer = torch.optim.AdamW(groups, betas=cfg.betas, fused=True)
        schedule = optim.Schedule(cfg, sampler.steps_per_epoch)
        start_step = run.begin(model, optimizer, schedule, sampler, dataset)
    net = run.distribute(model)
    batches = data.loader(dataset, sampler.batches(start_step, run.last_step), cfg.workers)
    batches = run.timed(batches)

    model.train()
    for step in range(start_step, run.last_step):
        # Learning rate of this step
        lr = schedule.lr(step)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]

        # Forward and backward: one global batch, shared by processes and cut into micro-batches
        batch_size, num_micro_batches = sampler.size(step), sampler.num_micro_batches(step)
        noise = randomness.noise(cfg.seed, step, batch_size, model.num_noise, use="drop path")
        loss_sum = torch.zeros((), device=run.device)
        for micro_step in range(num_micro_batches):
            (imgs, labels), _, positions = next(batches)  # positions of these images in the global batch
            imgs = transforms.normalize(imgs.to(run.device, non_blocking=True), cfg)  # (B, C, H, W)
            labels = labels.to(run.device, non_blocking=True)
            own_noise = noise[positions]  # (B, 2 * layers), on the CPU: see layers.add_branch
            is_last = micro_step == num_micro_batches - 1
            with run.sync_gradients(net, is_last), run.autocast():
                output = net(imgs, own_noise).float()  # (B, K, H, W)
                loss = model.task.loss(output, labels).sum() / batch_size
            run.scaler.scale(loss * run.world_size).backward()  # DDP averages: this makes it a sum
            loss_sum += loss.detach()

        # Update
        run.scaler.unscale_(optimizer)
        grad_norm = optim.clip(model, cfg.clip_grad)
        loss, grad_norm = run.all_reduce_stats(step, lr, loss_sum, grad_norm)  # stops at a NaN
        run.scaler.step(optimizer)
        run.scaler.update()
        optimizer.zero_grad(set_to_none=True)

        # Log, checkpoint, evaluation
        run.log(step, batch_size, loss, lr, grad_norm)
        if run.save_due(step):
            run.save(step, model, optimizer, dense=model.export())
        if run.stop_requested:
            break
        if run.due(step, cfg.eval_epochs) and step + 1 < run.last_step:
            run.note(step=step + 1, **accuracy(run, model, data.evaluation(val, cfg, run)))
            model.train()
    if run.steps_done == run.last_step:
        report(cfg, run, model, val, step=run.steps_done)
    run.finish()


if __name__ == "__main__":
    main()
