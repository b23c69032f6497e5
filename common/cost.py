"""What a recipe costs before it is paid: `--plan` of every script."""

from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def plan(cfg, build):
    """Print what the model `build(cfg)` costs without allocating any of it: parameters, FLOPs, memory per micro_batch,
    and the largest micro_batch for a 24 GB card. Only shapes are run (torch's FakeTensorMode), in seconds.

    Memory = 16 bytes a trained parameter (fp32 weight, gradient, two moments of Adam), 4 a frozen one + what autograd
    keeps for backward, weights cast by autocast included, + 1.5 GB for CUDA's context and workspaces (an assumption).
    """
    dtype = torch.float32 if cfg.precision == "fp32" else torch.bfloat16

    def run(micro_batch):  # the same for one step of every script: a loss, or logits
        shape = getattr(model, "input_shape", (cfg.in_chans, *cfg.img_size))  # LUT takes pairs of views
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            return model(torch.zeros(micro_batch, *shape), torch.rand(micro_batch, model.num_noise)).sum()

    def kept(micro_batch):  # bytes for backward
        found = {}  # a storage may be saved many times; it is counted once, and the tensor kept so that ids stay unique
        with torch.autograd.graph.saved_tensors_hooks(
                lambda t: found.setdefault(id(t.untyped_storage()), t.detach()) is None or t, lambda t: t):
            run(micro_batch)
        own = {id(t.untyped_storage()) for t in model.state_dict(keep_vars=True).values()}
        return sum(t.untyped_storage().nbytes() for i, t in found.items() if i not in own)

    # torch's truncated normal, with which torchvision's models start, looks at values, of which there are none.
    no_draws = mock.patch("torch.nn.init.trunc_normal_", lambda tensor, *args, **kwargs: tensor)
    with FakeTensorMode(allow_non_fake_inputs=True), no_draws:
        model = build(cfg).train()
        two, four = kept(2), kept(4)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # it knows no CPU kernel
            loss = run(2)
            forward = counter.get_total_flops() / 2e9
            loss.backward()
        step = counter.get_total_flops() / 2e9
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters()) - count
    each, besides = (four - two) / 2, 16 * count + 4 * frozen + (2 * two - four) + 1.5e9
    print(f"{count / 1e6:.1f} M trained parameters\n{forward:.2f} GFLOPs an image forward (a multiply-add is two), "
          f"{step:.2f} in a step\n{each / 1e6:.1f} MB an image kept for backward in {dtype}, {besides / 1e9:.2f} GB "
          "besides")
    for n in (1, 8, 32, 64, 128, 256):
        print(f"  --micro_batch {n:<4} {(besides + n * each) / 1e9:7.2f} GB")
    largest = min(cfg.batch_size, max(0, int((24e9 - besides) // max(each, 1))))
    fits = max((n for n in range(1, largest + 1) if cfg.batch_size % n == 0), default=0)
    print(f"largest on a 24 GB card: --micro_batch {largest} (an estimate); {fits} divides --batch_size "
          f"{cfg.batch_size}")
