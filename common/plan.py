"""What a recipe costs before it is paid: `--plan` of every script."""

from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

CARD = 24e9  # bytes of the card that recipes are sized for
CUDA_CONTEXT = 1.5e9  # bytes of CUDA's context and workspaces: an assumption


def show(cfg, build):
    """Print what the model `build(cfg)` costs, running only shapes (torch's FakeTensorMode): parameters, FLOPs, memory
    per micro_batch, and the largest micro_batch for a 24 GB card. Memory = 16 bytes a trained parameter (fp32 weight,
    gradient, two moments of Adam), 4 a frozen one + what autograd keeps for backward + CUDA_CONTEXT."""
    dtype = torch.float32 if cfg.precision == "fp32" else torch.bfloat16
    # torch's truncated normal, with which torchvision's models start, looks at values, of which there are none.
    no_draws = mock.patch("torch.nn.init.trunc_normal_", lambda tensor, *args, **kwargs: tensor)
    with FakeTensorMode(allow_non_fake_inputs=True), no_draws:
        model = build(cfg).train()
        kept_by_two, kept_by_four = bytes_kept(model, cfg, dtype, 2), bytes_kept(model, cfg, dtype, 4)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # it knows no CPU kernel
            loss = forward(model, cfg, dtype, 2)
            forward_flops = counter.get_total_flops() / 2e9
            loss.backward()
        step_flops = counter.get_total_flops() / 2e9

    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters()) - trained
    per_image = (kept_by_four - kept_by_two) / 2
    besides = 16 * trained + 4 * frozen + (kept_by_two - 2 * per_image) + CUDA_CONTEXT
    print(f"{trained / 1e6:.1f} M trained parameters\n"
          f"{forward_flops:.2f} GFLOPs an image forward (a multiply-add is two), {step_flops:.2f} in a step")
    print(f"{per_image / 1e6:.1f} MB an image kept for backward in {dtype}, {besides / 1e9:.2f} GB besides")
    for micro_batch in (1, 8, 32, 64, 128, 256):
        print(f"  --micro_batch {micro_batch:<4} {(besides + micro_batch * per_image) / 1e9:7.2f} GB")
    largest = min(cfg.batch_size, max(0, int((CARD - besides) // max(per_image, 1))))
    fits = max((n for n in range(1, largest + 1) if cfg.batch_size % n == 0), default=0)
    print(f"largest on a 24 GB card: --micro_batch {largest} (an estimate); "
          f"{fits} divides --batch_size {cfg.batch_size}")


def forward(model, cfg, dtype, micro_batch):
    """The forward pass of every script, up to a scalar: a loss, or the sum of the logits."""
    shape = getattr(model, "input_shape", (cfg.in_chans, *cfg.img_size))  # LUT takes pairs of views
    imgs, noise = torch.zeros(micro_batch, *shape), torch.rand(micro_batch, model.num_noise)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        return model(imgs, noise).sum()


def bytes_kept(model, cfg, dtype, micro_batch):
    """Bytes of what autograd keeps for backward: each storage once, the model's parameters and buffers not."""
    storages = {}  # id: a tensor on the storage, which keeps that alive, so that its id stays unique

    def pack(tensor):
        storages.setdefault(id(tensor.untyped_storage()), tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward(model, cfg, dtype, micro_batch)
    own = {id(tensor.untyped_storage()) for tensor in model.state_dict(keep_vars=True).values()}
    return sum(tensor.untyped_storage().nbytes() for key, tensor in storages.items() if key not in own)
