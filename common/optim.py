"""Optimization beside torch.optim: schedule, parameter groups, clipping, LARS, moving averages."""

import math

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn


def cosine(step, steps, start, end):
    """Half a cosine from `start` at step 0 to `end` at `steps` (Loshchilov & Hutter, 2017); `start` if `steps` is 0."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * step / max(1, steps)))


class Schedule:
    """Learning rate of every step: linear from 0 over the warm-up, then half a cosine from the peak to --min_lr (MAE,
    Table 8), or, with --schedule step, the peak until 7/8 of the run and a tenth of it afterwards (SimMIM). A warm-up
    that is no shorter than the run becomes a twentieth of it. `steps` and `warmup_steps` are of the whole run, whatever
    --max_steps says."""

    def __init__(self, cfg, steps_per_epoch):
        self.kind, self.min_lr = cfg.schedule, cfg.min_lr
        self.peak_lr = cfg.base_lr * cfg.batch_size / cfg.lr_batch  # linear scaling rule (MAE, A.1)
        self.steps = round(cfg.epochs * steps_per_epoch)
        self.warmup_steps = round(cfg.warmup_epochs * steps_per_epoch)
        if self.warmup_steps >= self.steps:  # a short trial of a long recipe: MAE's 40 of 800 epochs
            self.warmup_steps = self.steps // 20

    def lr(self, step):
        """The learning rate of a step, counted from 0. Both schedules have the same warm-up."""
        # DIFF: SimMIM's warm-up starts at 1e-6 or 5e-7 per 512 images; every warm-up here starts at 0.
        if step < self.warmup_steps:
            return self.peak_lr * step / self.warmup_steps
        # DIFF: SimMIM's released cosine runs from step 0, warm-up included, and drops by a tenth where that ends.
        if self.kind == "cosine":
            return cosine(step - self.warmup_steps, self.steps - self.warmup_steps, self.peak_lr, self.min_lr)
        return self.peak_lr if step < 0.875 * self.steps else 0.1 * self.peak_lr


def parameter_groups(model, weight_decay, lr_scale=lambda name: 1.0):
    """Groups of a model's trainable parameters for an optimizer, with "names" and "lr_scale" (of a parameter's name).
    No weight decay for what has one dimension, nor for class and mask tokens, position and bias tables, scales."""
    # DIFF: class and mask tokens and bias tables are never decayed; the released pre-training codes decay some of them.
    groups = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        exempt = parameter.dim() <= 1 or name.endswith(("bias", "_token", "pos_embed", "bias_table", "_scale"))
        exempt = exempt or ".cpb_mlp." in name  # it makes the bias table of torchvision's Swin V2
        decay, scale = 0.0 if exempt else weight_decay, lr_scale(name)
        new = {"params": [], "names": [], "lr_scale": scale, "weight_decay": decay}
        group = groups.setdefault((scale, decay), new)
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def layer_decay(model, decay):
    """The `lr_scale` of parameter_groups for a model with an `encoder`: a function of a parameter's name, which gives
    decay^(num_layers + 1 - layer_id) in the encoder, and 1 elsewhere (BEiT)."""
    # DIFF: SimMIM's layer decay scales the peak alone, and all layers end at min_lr; here, as in MAE's and BEiT's
    # code, it scales the whole curve.
    def lr_scale(name):
        if not name.startswith("encoder."):
            return 1.0
        depth = model.encoder.layer_id(name.removeprefix("encoder."))
        return decay ** (model.encoder.num_layers + 1 - depth)

    return lr_scale


def clip(model, max_norm):
    """The norm of all gradients, a scalar tensor; a larger one is scaled down to `max_norm`, unless that is 0."""
    grad_norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    if max_norm:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, grad_norm)
    return grad_norm


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose step is, for a weight matrix, proportional to the norm of the matrix (You et al., 2017);
    biases and other one-dimensional parameters take plain steps without weight decay (MAE, A.1)."""

    def __init__(self, params, lr=0.0, weight_decay=0.0, momentum=0.9, trust=0.001):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "trust": trust})

    @torch.no_grad()
    def step(self):
        """A matrix w moves by u = gradient + weight_decay * w, times trust * |w| / |u| if neither norm is 0 (in MAE's
        code; the paper adds the norms of both terms). momentum_buffer, its state, becomes momentum * momentum_buffer
        + u, and w becomes w - lr * momentum_buffer."""
        for group in self.param_groups:
            for parameter in group["params"]:
                update = parameter.grad
                if parameter.dim() > 1:
                    update = update.add(parameter, alpha=group["weight_decay"])
                    weight_norm, update_norm = parameter.norm(), update.norm()
                    usable = (weight_norm > 0) & (update_norm > 0)
                    update = update * torch.where(usable, group["trust"] * weight_norm / update_norm, 1.0)

                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                state["momentum_buffer"].mul_(group["momentum"]).add_(update)
                parameter.add_(state["momentum_buffer"], alpha=-group["lr"])


@torch.no_grad()
def update_ema(average, model, decay):
    """average = decay * average + (1 - decay) * model, for the parameters and BatchNorm's statistics of `average`.
    (torch's AveragedModel would copy the model in its first update, and forget what it started from.)"""
    averaged = {name: value for name, value in average.state_dict().items() if value.is_floating_point()}
    current = model.state_dict()
    get_ema_multi_avg_fn(decay)(list(averaged.values()), [current[name] for name in averaged], None)
