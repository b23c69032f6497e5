"""Any classification model of torchvision behind the interface of models.py: `--model torchvision:NAME`.

torchvision's feature extraction says in which order a network calls its parts. Down to residual blocks, that is a line
of steps: each can be computed again, be given its noise, and count as a layer.
"""

import contextlib
import difflib
import functools

import torch
import torch.nn as nn
import torchvision
from torch.utils.checkpoint import checkpoint
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names
from torchvision.models.maxvit import MaxVitBlock, MaxVitLayer
from torchvision.ops import Permute, StochasticDepth
from torchvision.ops.misc import ConvNormActivation

from common.layers import as_map, check_sizes, drop_path, next_size, positions_at

LINES = (nn.Sequential, MaxVitBlock, MaxVitLayer)  # what only calls its children one after another
PROBE = (128, 192)  # pixels of the image that shows the strides of a network


class DropPath(nn.Module):
    """In the place of torchvision's StochasticDepth, which draws its own noise: every call takes a column (B,) from the
    iterator `columns`, or drops nothing if that is None."""

    rate, columns = 0.0, None

    def forward(self, branch):
        noise = None if self.columns is None else next(self.columns)
        return drop_path(branch, noise, self.rate)


def network(name, img_size, in_chans):
    """torchvision's model of that name, for images of `in_chans` channels, that draws no random numbers."""
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        near = ", ".join(difflib.get_close_matches(name, known, 4, 0.0))
        raise ValueError(f"torchvision has no classification model {name!r}; near names: {near}")
    if name == "maxvit_t" and (img_size[0] % 224 or img_size[0] != img_size[1]):
        raise ValueError(f"torchvision:maxvit_t takes squares of 224, 448, ... pixels, not {img_size[0]}x{img_size[1]}")
    no_aux = {"aux_logits": False, "init_weights": True}
    options = {"maxvit_t": {"input_size": img_size}, "googlenet": no_aux, "inception_v3": no_aux}.get(name, {})
    try:
        with torch.device("cpu") if name.startswith("regnet") else contextlib.nullcontext():  # its widths need numbers
            net = torchvision.models.get_model(name, weights=None, **options)
    except RuntimeError as error:
        raise ValueError(f"torchvision:{name} computes with numbers as it is built and cannot be planned") from error
    if torch.get_default_device().type == "meta":
        net.to("meta")
    for place, module in list(net.named_modules()):
        if isinstance(module, StochasticDepth):
            net.set_submodule(place, DropPath())
    if in_chans != 3:
        conv = next(module for module in net.modules() if isinstance(module, nn.Conv2d))
        weight = torch.randn(conv.out_channels, in_chans, *conv.kernel_size) * conv.weight.detach().std()
        conv.in_channels, conv.weight = in_chans, nn.Parameter(weight)
    return net


def stride_of(shape, img_size):
    """(stride, are channels last?) of a map, or (0, False) if it does not cover the image with squares of one size."""
    if len(shape) == 4:
        for channels_last, sides in (False, shape[2:]), (True, shape[1:3]):
            stride = img_size[0] // sides[0]
            if stride and tuple(stride * n for n in sides) == tuple(img_size):
                return stride, channels_last
    return 0, False


@contextlib.contextmanager
def same_statistics(step):
    """BatchNorm must not count a batch again when a step is computed again, nor one that only makes a picture."""
    norms = [m for m in step.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, kept in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = kept


class Torchvision(nn.Module):
    """A network of torchvision, with random weights, up to its last map with a stride of `max_stride` or less. Its
    tokens are pixels, or a Swin's embedded patches. Parameters have torchvision's names behind "net.".

    A step with weights of two or more dimensions, such as a residual block, begins a layer; the stem is layer 0.
    `drop_path` grows linearly from 0 at layer 1, where a network has stochastic depth. `learn_positions` and
    `final_norm` change nothing. ValueError for an unknown name, sizes that do not fit, or no map that covers an image:
    AlexNet, Inception and SqueezeNet cut some pixels off."""

    num_prefix, default_patch, checkpointing = 0, 0, False

    def __init__(self, model, img_size, patch_size, in_chans, max_stride=32, learn_positions=False, drop_path=0.0,
                 final_norm=True):
        super().__init__()
        check_sizes(img_size, 1, in_chans)
        net = network(model.removeprefix("torchvision:"), img_size, in_chans)
        self.steps = self.dissect(net, img_size, in_chans, max_stride)
        if not self.steps:
            raise ValueError(f"{model} has no map that covers an image with squares of {max_stride} pixels or less")
        if patch_size not in (0, self.stride):
            raise ValueError(f"--patch_size of {model} must be {self.stride}, or 0 for its default, not {patch_size}")
        if any(n % self.out_stride for n in img_size):
            raise ValueError(f"--img_size {img_size[0]}x{img_size[1]} must be divisible by {self.out_stride}, the "
                             f"stride of {model}, as {next_size(img_size, self.out_stride)} is")
        self.grid = (img_size[0] // self.stride, img_size[1] // self.stride)
        self.number_layers(drop_path)
        heads = [module.num_heads for module in self.net.modules() if hasattr(module, "num_heads")]
        self.arch = {"model": model, "img_size": list(img_size), "patch_size": self.stride, "in_chans": in_chans,
                     "width": self.width, "depth": self.num_layers, "num_heads": heads,
                     "options": {"max_stride": max_stride}}
        self.train()

    def dissect(self, net, img_size, in_chans, max_stride):
        """Keep what is needed of `net` and note its sizes. Returns its steps, none if no map has such a stride."""
        # The steps: what its forward calls, down to modules that are more than a line of others.
        leaves = {type(m) for m in net.modules() if not isinstance(m, LINES) or isinstance(m, ConvNormActivation)}
        tracing = {"tracer_kwargs": {"leaf_modules": list(leaves - {type(net)})}, "suppress_diff_warning": True}
        names = get_graph_node_names(net.eval(), **tracing)[1][1:]  # without the image
        probe = img_size if isinstance(net, torchvision.models.MaxVit) else PROBE
        with torch.no_grad():
            outputs = create_feature_extractor(net, names, **tracing)(torch.zeros(1, in_chans, *probe))
        shapes = [outputs[name].shape for name in names]
        strides = [stride_of(shape, probe)[0] for shape in shapes]

        last = {stride: i for i, stride in enumerate(strides) if 0 < stride <= max_stride}  # step with this stride
        if not last:
            return []
        self.out_stride, end = max(last.items())
        maps = [i for stride, i in sorted(last.items()) if stride >= min(4, self.out_stride)]
        self.ends = {i: stride_of(shapes[i], probe)[1] for i in maps}  # {step that gives a map: channels last?}
        self.width = shapes[end][3 if self.ends[end] else 1]
        self.stride, self.embed_width, self.first = 1, in_chans, 0  # `first` steps embed
        self.patchwise = isinstance(net, torchvision.models.SwinTransformer)
        if self.patchwise:
            self.first = sum(name.startswith("features.0.") for name in names)
            self.stride, self.embed_width = strides[self.first - 1], shapes[self.first - 1][3]
        self.net = create_feature_extractor(net, [names[end]], **tracing)
        return [self.net.get_submodule(node.target) if node.op == "call_module" else
                functools.partial(node.target, **node.kwargs) for node in list(self.net.graph.nodes)[1:-1]]

    def number_layers(self, drop_path):
        """Say to which layer each step and each parameter belong, and give stochastic depth its rates."""
        modules = [step if isinstance(step, nn.Module) else nn.Identity() for step in self.steps]
        self.heavy = [any(p.dim() > 1 for p in module.parameters()) for module in modules]
        self.num_layers = sum(self.heavy) - 1
        self.drops = [[m for m in module.modules() if isinstance(m, DropPath)] for module in modules]
        self.layers, layer_of = [], {}
        for i, module in enumerate(modules):
            behind = not any(self.heavy[i:])  # a norm behind the last layer
            layer = sum(self.heavy[: i + 1]) - 1 + behind
            self.layers.append(layer)
            layer_of |= dict.fromkeys(module.parameters(), layer)
            for drop in self.drops[i]:
                drop.rate = drop_path * (layer - 1) / max(1, self.num_layers - 1)
        self.layer_of = {name: layer_of.get(p, 0) for name, p in self.named_parameters()}

    def embed(self, imgs):
        """(B, C, H, W) -> tokens (B, N, D), raster order. ValueError for other sizes or channels than was built for."""
        in_chans, size = self.arch["in_chans"], self.arch["img_size"]
        if list(imgs.shape[1:]) != [in_chans, *size]:
            raise ValueError(f"expected {in_chans} channels of {size} pixels, got images {list(imgs.shape[1:])}")
        if not self.first:
            return imgs.flatten(2).transpose(1, 2)  # (B, H*W, C)
        for step in self.steps[: self.first]:
            imgs = step(imgs)
        return imgs.flatten(1, 2)  # (B, N, D), of (B, h, w, D)

    def enter(self, tokens, coords, grid):
        """Arguments of `encode` -> what the step behind the embedding takes."""
        if coords is not None or grid not in (None, self.grid) or tokens.shape[1] != self.grid[0] * self.grid[1]:
            raise ValueError(f"{self.arch['model']} takes the whole map of {self.grid[0]}x{self.grid[1]} tokens")
        return tokens.unflatten(1, self.grid) if self.first else as_map(tokens, self.grid)  # (B, h, w, D), (B, D, h, w)

    def run(self, x, noise):
        """The outputs of the steps that `ends` names."""
        found, learning = [], torch.is_grad_enabled()
        if noise is not None:
            noise = noise.to(x.device, non_blocking=True)
        with contextlib.nullcontext() if learning else same_statistics(self.net):
            for i in range(self.first, len(self.steps)):
                if self.checkpointing and self.heavy[i] and learning:  # there are no draws whose state to keep
                    x = checkpoint(self.step, i, x, noise, use_reentrant=False, preserve_rng_state=False,
                                   context_fn=functools.partial(self.recomputing, i))
                else:
                    x = self.step(i, x, noise)
                if i in self.ends:
                    found.append(x)
        return found

    def step(self, i, x, noise):
        """Step i; its branches take the two columns of its layer in `noise`, or drop nothing if that is None."""
        last = 2 * self.layers[i]
        columns = None if noise is None else iter(noise[:, last - 2 : last].unbind(dim=1))  # 2 x (B,)
        for drop in self.drops[i]:
            drop.columns = columns
        return self.steps[i](x)

    def recomputing(self, i):
        """Contexts of a step and of its recomputation."""
        return contextlib.nullcontext(), same_statistics(self.steps[i])

    def encode(self, tokens, coords=None, grid=None, noise=None):
        """tokens (B, N, D) of the whole map, or a ViT's at `coords` (B, N, 2) -> latent (B, N', width), raster order.
        `noise` (B, 2 * num_layers) in [0, 1) for stochastic depth. ValueError if tokens and map do not match."""
        x = self.run(self.enter(tokens, coords, grid), noise)[-1]
        if x.dim() == 3:
            return x
        return x.flatten(1, 2) if list(self.ends.values())[-1] else x.flatten(2).transpose(1, 2)  # (B, N', width)

    def maps(self, imgs, noise=None):
        """(B, C, H, W) -> the last maps (B, D, h, w) of strides 4, 8, ..., finest first."""
        found = self.run(self.enter(self.embed(imgs), None, None), noise)
        return [x.permute(0, 3, 1, 2) if channels_last else x  # (B, D, h, w)
                for x, channels_last in zip(found, self.ends.values(), strict=True)]

    def forward(self, imgs):
        return self.encode(self.embed(imgs))

    def layer_id(self, name):
        """Depth of a parameter for layer-wise lr decay: its layer; num_layers + 1 for norms behind the last one."""
        return self.layer_of[name]


class TorchvisionViT(Torchvision):
    """A ViT of torchvision; its tokens are patches, and there is a class token. `cls_token` and `pos_embed` have this
    project's names and so fit any image size; positions are always learned (Dosovitskiy et al., 2021)."""

    num_prefix, patchwise, first = 1, True, 1

    def dissect(self, net, img_size, in_chans, max_stride):
        self.stride = self.out_stride = net.patch_size
        self.width = self.embed_width = net.hidden_dim
        num_patches = (img_size[0] // self.stride) * (img_size[1] // self.stride)
        self.cls_token, self.net = net.class_token, net
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + num_patches, self.width) * 0.02)  # as torchvision draws them
        del net.class_token, net.encoder.pos_embedding, net.heads
        steps = [nn.Sequential(net.conv_proj, Permute([0, 2, 3, 1])), *net.encoder.layers, net.encoder.ln]
        self.ends = {len(steps) - 1: True}
        return steps if self.stride <= max_stride else []

    def enter(self, tokens, coords, grid):
        if coords is None and tokens.shape[1] != self.grid[0] * self.grid[1]:
            raise ValueError(f"{tokens.shape[1]} tokens do not fill the grid {self.grid}, and there are no coords")
        tokens = tokens + positions_at(self.pos_embed[:, 1:], coords, self.grid)
        cls_token = self.cls_token + self.pos_embed[:, :1]  # (1, 1, D)
        return torch.cat([cls_token.expand(len(tokens), -1, -1), tokens], dim=1)  # (B, 1 + N, D)

    def maps(self, imgs, noise=None):
        return [as_map(self.encode(self.embed(imgs), noise=noise)[:, 1:], self.grid)]  # (B, D, h, w)
