"""What the protocols of fine-tuning do to a classifier: which blocks train, which are cut off or shuffled, how a head
learns alone.

    linear    LARS, start_head     the encoder is frozen (MAE, A.1)
    partial   freeze               the last blocks train (MAE, Fig. 9)
    probes    drop_layers, ...     what depth and order of pre-trained blocks are worth (Xie et al., arXiv 2205.13543)
    scratch   models.blend         the moving average of the weights is what counts (MAE, A.2)
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

import models
from common.engine import seed_of

# ---------------------------------------- Linear


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


def start_head(model, features, labels):
    """Put the solution of L2-regularised logistic regression on normalised features (n, D), labels (n,), into the head,
    so that fine-tuning does not begin by bending the encoder to a random head (Kumar et al., 2022)."""
    if isinstance(model.fc_norm, nn.BatchNorm1d):
        model.fc_norm.running_mean.copy_(features.mean(dim=0))
        model.fc_norm.running_var.copy_(features.var(dim=0, unbiased=False))
    with torch.no_grad():
        inputs = model.fc_norm.eval()(features)
    solver = torch.optim.LBFGS(model.head.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        solver.zero_grad()
        loss = F.cross_entropy(model.head(inputs), labels) + 1e-2 * model.head.weight.square().sum()  # 1e-2: ours
        loss.backward()
        return loss

    solver.step(closure)
    model.head.zero_grad(set_to_none=True)


# ---------------------------------------- Partial


def freeze(encoder, train_blocks):
    """Leave the last `train_blocks` blocks of an encoder to train, and what comes after them; of half a block, as in
    0.5, 1.5, ..., its MLP with the norm before it (MAE, Fig. 9), and a merging behind it. ValueError if there are no
    such blocks."""
    if train_blocks % 0.5 or not 0 < train_blocks <= encoder.num_layers:
        raise ValueError(f"--train_blocks takes 0.5, 1, 1.5, ... {encoder.num_layers}, not {train_blocks:g}")
    last = encoder.num_layers - int(train_blocks)  # of the frozen blocks, or the one of which the MLP trains
    halves = 0
    for name, parameter in encoder.named_parameters():
        depth = encoder.layer_id(name)
        behind = "blocks." not in name or any(part in name for part in (".norm2.", ".mlp.", ".gamma_2"))
        half = train_blocks % 1 > 0 and depth == last and behind
        parameter.requires_grad_(depth > last or half)
        halves += half and "blocks." in name
    if train_blocks % 1 and not halves:
        raise ValueError(f"--train_blocks {train_blocks:g}: the blocks of {encoder.arch['model']} have no MLP half")


# ---------------------------------------- Dropped and shuffled layers


def blocks_of(encoder):
    """(the blocks of a ViT, or of a pyramid's third stage, the prefix of their names). ValueError for others."""
    if isinstance(encoder, models.ViT):
        return encoder.blocks, "blocks."
    if isinstance(encoder, models.Pyramid):
        return encoder.get_submodule(f"{encoder.list_name}.2.blocks"), f"{encoder.list_name}.2.blocks."
    raise ValueError(f"--drop_layers and --shuffle_layers know ViT, Swin and PVT, not {encoder.arch['model']}")


def rebuild(arch, **changes):
    """The encoder that the "arch" of an encoder.pt describes, cut as that one was, with random weights. `changes` are
    other sizes or options. ValueError, as of models.build, if they do not fit together."""
    own = {name: arch[name] for name in ("model", "img_size", "patch_size", "in_chans")}
    encoder = models.build(**{**own, **arch["options"], **changes})
    if arch.get("drop_layers"):
        drop_layers(encoder, arch["drop_layers"])
    return encoder


def drop_layers(encoder, count):
    """Cut off the last `count` blocks of a ViT; of a pyramid, the last blocks of the third stage and, for they build on
    them, the fourth stage. What was left remembers it in `arch`. ValueError if that leaves none."""
    blocks, _ = blocks_of(encoder)
    if not isinstance(count, int) or not 0 < count < len(blocks):
        raise ValueError(f"--drop_layers {count}: {encoder.arch['model']} has {len(blocks)} blocks to drop from, and "
                         "keeps at least one")
    del blocks[-count:]
    encoder.num_layers = len(blocks)
    if isinstance(encoder, models.Pyramid) and "drop_layers" not in encoder.arch:
        stages = encoder.get_submodule(encoder.list_name)
        del stages[3]
        if not encoder.merging_in:  # the one behind the third stage is a part of that
            del stages[2]["downsample"]
        encoder.width, encoder.out_stride = encoder.arch["width"][2], 16
        encoder.norm = nn.LayerNorm(encoder.width, eps=encoder.norm.eps)
    if isinstance(encoder, models.Pyramid):
        encoder.depths = (*encoder.depths[:2], len(blocks))
        encoder.num_layers = sum(encoder.depths)
    encoder.arch["drop_layers"] = encoder.arch.get("drop_layers", 0) + count


def kept_tensors(encoder, tensors, seed=None):
    """(the tensors, a state dict, of a whole encoder that fit one that `drop_layers` has cut; what became of its
    blocks, as lines). With a seed, every block gets the tensors of one drawn at random from all, none twice (Dark
    Secrets: the first 9 of 18 blocks)."""
    blocks, prefix = blocks_of(encoder)
    total = len({name.removeprefix(prefix).split(".")[0] for name in tensors if name.startswith(prefix)})
    order = range(len(blocks))
    if seed is not None:
        draw = torch.Generator().manual_seed(seed_of(seed, "shuffled layers"))
        order = torch.randperm(total, generator=draw)[: len(blocks)].tolist()
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}
    left, notes = sorted(set(range(total)) - set(order)), []
    if left:
        notes.append(f"left over: {prefix}{', '.join(map(str, left))}")
    if seed is not None:
        notes.append(f"{prefix}0 to {len(blocks) - 1} are those that were {', '.join(map(str, order))}")
    if isinstance(encoder, models.Pyramid) and "drop_layers" in encoder.arch:
        own, stages = encoder.state_dict(), encoder.list_name
        cut_off = [name for name in kept if name.startswith((f"{stages}.2.", f"{stages}.3.")) and name not in own]
        kept = {name: tensor for name, tensor in kept.items() if name not in cut_off}
        if cut_off:  # the last norm went with the fourth stage, and starts anew
            kept = {name: tensor for name, tensor in kept.items() if not name.startswith("norm.")}
            kept |= {name: tensor for name, tensor in own.items() if name.startswith("norm.")}
            notes.append("left over: the fourth stage; its norm starts anew behind the third")
    for new, old in enumerate(order):
        start = f"{prefix}{old}."
        kept |= {f"{prefix}{new}.{name.removeprefix(start)}": tensor
                 for name, tensor in tensors.items() if name.startswith(start)}
    return kept, notes
