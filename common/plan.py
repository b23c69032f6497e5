"""What a recipe costs before it is paid: `--plan` of every script."""

import dataclasses
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from common.config import print_once

CARD = 24e9  # bytes of the card that recipes are sized for
SPARE = 2e9  # bytes of it that stay free: the allocator's gaps, and what is alive for a moment (ours)
CUDA_CONTEXT = 1.5e9  # bytes of CUDA's context and workspaces: an assumption
LARGEST = 512  # images; more at once make no GPU faster (ours; MAE's probes have 512 a GPU, for their BatchNorm)


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of a model that trains: parameters, FLOPs of an image (a multiply-add is two), bytes."""
    trained: int
    forward_flops: float
    step_flops: float
    per_image: float  # bytes that autograd keeps for backward
    besides: float  # bytes whatever the batch

    def bytes(self, n):
        """Memory of a step with n images at once."""
        return self.besides + n * self.per_image

    def fits(self):
        """How many images a card of 24 GB takes at once."""
        return max(0, int((CARD - SPARE - self.besides) // max(self.per_image, 1)))


def estimate(cfg, build):
    """The Cost of the model `build(cfg)`, for which only shapes run (torch's FakeTensorMode). Memory = 16 bytes a
    trained parameter (fp32 weight, gradient, two moments of Adam), 4 a frozen one + what autograd keeps for backward +
    CUDA_CONTEXT."""
    dtype = torch.float32 if cfg.precision == "fp32" else torch.bfloat16
    # There are no values for torch's truncated normal, with which torchvision's models start, to look at, and no memory
    # for a copy to copy.
    no_draws = mock.patch("torch.nn.init.trunc_normal_", lambda tensor, *args, **kwargs: tensor)
    no_copies = mock.patch("torch.Tensor.__deepcopy__", lambda tensor, memo: tensor.detach().clone())
    with FakeTensorMode(allow_non_fake_inputs=True), no_draws, no_copies:
        model = build(cfg).train()
        kept_by_two, kept_by_four = bytes_kept(model, cfg, dtype, 2), bytes_kept(model, cfg, dtype, 4)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # it knows no CPU kernel
            loss = forward(model, cfg, dtype, 2)
            forward_flops = counter.get_total_flops() / 2
            loss.backward()
        step_flops = counter.get_total_flops() / 2

    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters()) - trained
    per_image = (kept_by_four - kept_by_two) / 2
    besides = 16 * trained + 4 * frozen + (kept_by_two - 2 * per_image) + CUDA_CONTEXT
    return Cost(trained, forward_flops, step_flops, per_image, besides)


def show(cfg, build):
    """Print what the model `build(cfg)` costs: parameters, FLOPs, memory per micro_batch, the micro_batch for 24 GB."""
    cost = estimate(cfg, build)
    dtype = "fp32" if cfg.precision == "fp32" else "bf16"
    print_once(f"{cost.trained / 1e6:.1f} M trained parameters\n"
               f"{cost.forward_flops / 1e9:.2f} GFLOPs an image forward (a multiply-add is two), "
               f"{cost.step_flops / 1e9:.2f} in a step")
    print_once(f"{cost.per_image / 1e6:.1f} MB an image kept for backward in {dtype}, "
               f"{cost.besides / 1e9:.2f} GB besides")
    asked = min(cfg.micro_batch, cfg.batch_size)
    for n in sorted({1, 8, 32, 64, 128, 256, 512, asked}):
        mark = "  <- as these options have it" * (n == asked)
        print_once(f"  --micro_batch {n:<4} {cost.bytes(n) / 1e9:7.2f} GB{mark}")
    fits = min(cfg.batch_size, cost.fits())
    print_once(f"largest on 24 GB, of which {SPARE / 1e9:g} stay free: --micro_batch {fits} (an estimate)")
    for gpus in (1, 8):
        print_once(f"  on {gpus} GPU(s): --micro_batch {micro_batch(cfg.batch_size, gpus, fits)}")


def micro_batch(batch_size, gpus, fits):
    """The rule of all recipes: of the images that one of `gpus` processes has in a step, the largest divisor that is at
    most `fits` and LARGEST; 0 if there is none."""
    share, rest = divmod(batch_size, gpus)
    sizes = [n for n in range(1, min(share, fits, LARGEST) + 1) if share % n == 0]
    return 0 if rest else max(sizes, default=0)


def forward(model, cfg, dtype, n):
    """The forward pass of every script for n images, up to a scalar: a loss, or the sum of the logits."""
    device = next(model.parameters()).device
    shape = getattr(model, "input_shape", (cfg.in_chans, *cfg.img_size))  # LUT takes pairs of views
    imgs, noise = torch.zeros(n, *shape, device=device), torch.rand(n, model.num_noise, device=device)
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        return model(imgs, noise).sum()


def bytes_kept(model, cfg, dtype, n):
    """Bytes of what autograd keeps for backward: each storage once, the model's parameters and buffers not."""
    storages = {}  # id: a tensor on the storage, which keeps that alive, so that its id stays unique

    def pack(tensor):
        storages.setdefault(id(tensor.untyped_storage()), tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward(model, cfg, dtype, n)
    own = {id(tensor.untyped_storage()) for tensor in model.state_dict(keep_vars=True).values()}
    return sum(tensor.untyped_storage().nbytes() for key, tensor in storages.items() if key not in own)
