"""What a CPU can prove about a GPU. Fake tensors (torch's FakeTensorMode) have a device and a shape and no numbers: an
operation on tensors of two devices fails, and so does whatever needs a number on the host or has a shape that depends
on one. Copies that make the host wait for the GPU, which would not fail, are noted by `Watch`.

What it cannot: backward, whose gradients are put in by hand here, and whether numbers are right.
"""

import contextlib
import importlib
import inspect
import re
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastmim
import finetune
import lut
import mae
import models
import simmim
import um_mae
from common import engine, evaluate, neighbours, optim, transforms
from tools import bench, dense

GPU = torch.device("cuda", 0)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DECODER = {"decoder_depth": 1, "decoder_width": 32, "decoder_heads": 2}
VIT = {"model": "vit_tiny", "patch_size": 8, "px": 32}
PLAIN = {"mixup": 0.0, "cutmix": 0.0}


def of_mae(**options):
    return bench.case(mae, mae.MAE, **{**VIT, **DECODER, **options})


def of_simmim(**options):
    return bench.case(simmim, simmim.SimMIM, **{"px": 64, **options})


def of_um_mae(**options):
    return bench.case(um_mae, um_mae.UMMAE, **{"px": 128, **DECODER, **options})


def of_fastmim(**options):
    return bench.case(fastmim, fastmim.FastMIM, **{"px": 64, **DECODER, **options})


def of_lut(**options):
    return bench.case(lut, lut.LUT, **{**VIT, **DECODER, "head_width": 32, **options})


def of_finetune(**options):
    return bench.case(finetune, finetune.Classifier, **{**VIT, "mixup": 0.8, "cutmix": 1.0, **options})


CASES = {  # every mask, target and family of backbones
    "MAE": of_mae(),
    "MAE, block mask": of_mae(mask="block", activation_checkpointing=True),
    "MAE, grid mask, pca": of_mae(mask="grid", target="pca", pca_dim=8),
    "MAE, mask tokens, pixels": of_mae(mask_tokens_in_encoder=True, target="pixels"),
    "SimMIM ViT": of_simmim(**{**VIT, "mask_unit": 16}),
    "SimMIM Swin, window": of_simmim(model="swin_tiny", window=4, drop_path=0.1, target="window_pixels"),
    "SimMIM PVT": of_simmim(model="pvt_tiny", drop_path=0.1),
    "SimMIM Swin V2": of_simmim(model="torchvision:swin_v2_t"),
    "UM-MAE ViT, random": of_um_mae(**{**VIT, "unit": 8, "sampling": "random", "target": "pixels"}),
    "UM-MAE Swin": of_um_mae(model="swin_tiny", window=16),
    "UM-MAE PVT, grid": of_um_mae(model="pvt_tiny", sampling="grid", published_order=True),
    "FastMIM ViT": of_fastmim(**VIT),
    "FastMIM Swin, pixels": of_fastmim(model="swin_tiny", window=4, target="pixels"),
    "FastMIM PVTv2, norm_pixels": of_fastmim(model="pvtv2_tiny", target="norm_pixels"),
    "FastMIM ResNet, distilled": of_fastmim(model="torchvision:resnet18", teacher="torchvision:resnet18"),
    "LUT": of_lut(),
    "LUT, all tokens, infonce": of_lut(context="pooled+tokens", steering="both", context_loss="infonce"),
    "LUT, one direction, cls": of_lut(context="cls", context_loss="smooth_l1", one_directional=True),
    "LUT, the teacher masked": of_lut(target_mask_ratio=0.5),
    "fine-tuning": of_finetune(clip_grad=1.0, ema=0.9),
    "fine-tuning Swin": of_finetune(model="swin_tiny", patch_size=0, px=64),
    "linear, LARS": of_finetune(mode="linear", **PLAIN),
    "linear, SGD": of_finetune(mode="linear", optimizer="sgd", pool="cls", **PLAIN),
}
METHODS = ["MAE", "SimMIM ViT", "UM-MAE Swin", "FastMIM ViT", "LUT"]
RUNS = [(name, "bf16") for name in CASES]
RUNS += [(name, precision) for name in [*METHODS, "fine-tuning"] for precision in ("fp16", "fp32")]
SHARED = {"batch_size": 4, "micro_batch": 4, "data": "none"}


class Watch(TorchDispatchMode):
    """Notes in `waits` what makes the host wait, and in `mixed` what takes tensors from two devices. A copy to the GPU
    does not wait if it is non_blocking; a scalar on the CPU may be an argument of any operation."""

    def __init__(self):
        super().__init__()
        self.waits, self.mixed = [], []

    def __torch_dispatch__(self, func, kinds, args=(), kwargs=None):
        kwargs = kwargs or {}
        result, name = func(*args, **kwargs), func._schema.name
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if name in ("aten::_to_copy", "aten::copy_"):
            source = args[0] if name == "aten::_to_copy" else args[1]
            free = kwargs.get("non_blocking") or (name == "aten::copy_" and args[2:] == (True,))
            if source.device != result.device and (source.is_cuda or not free):
                self.waits.append(f"{name} of {tuple(source.shape)} from {source.device}")
        elif len({tensor.device for tensor in tensors if tensor.dim()}) > 1:
            self.mixed.append(name)
        return result

    def note_number(self, tensor, made_up):
        """In the place of what reads numbers: a fake tensor has none."""
        if tensor.is_cuda:
            self.waits.append("read")
        return made_up


class Doubles(TorchDispatchMode):
    """Notes in `found` what makes a float64 tensor: the GPU of a Mac has none."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, kinds, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        kinds = {leaf.dtype for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)}
        self.found += [func._schema.name] * (torch.float64 in kinds)
        return result


def moved(module, device):
    """In the place of nn.Module.to: parameters and buffers move to the GPU; a plain attribute stays, as it would."""
    for part in module.modules():
        for name, old in part._parameters.items():
            if old is not None:
                new = torch.empty(old.shape, dtype=old.dtype, device=device)
                part._parameters[name] = torch.nn.Parameter(new, requires_grad=old.requires_grad)
        for name, old in part._buffers.items():
            if old is not None:
                part._buffers[name] = torch.empty(old.shape, dtype=old.dtype, device=device)
    return module


@contextlib.contextmanager
def fake_gpu(precision="bf16", shapes=None):
    """Everything inside is fake, and a Run has a GPU. `shapes`: a ShapeEnv, where shapes may depend on numbers."""
    watch = Watch()
    stand_ins = {
        "common.engine.choose_device": lambda cfg: (GPU, DTYPES[precision]),
        "torch.nn.Module.to": moved,
        "common.weights.frozen_encoder": lambda path, cfg, *args: models.build(cfg.model, cfg.img_size),
        "torch.nn.init.trunc_normal_": lambda tensor, *args, **options: tensor,  # it looks at values
        "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
        "torch.cuda.is_bf16_supported": lambda *args, **options: True,
        f"{FakeTensor.__module__}.FakeTensor.tolist": lambda tensor: watch.note_number(tensor, [1.0] * len(tensor)),
        "torch.Tensor.__deepcopy__": lambda tensor, memo: tensor.detach().clone(),  # a fake one has no storage to copy
        # Mixup and cutmix draw on the CPU, where reading a number waits for nothing.
        "torch.Tensor.__bool__": lambda tensor: watch.note_number(tensor, True),
        "torch.Tensor.__int__": lambda tensor: watch.note_number(tensor, 1),
        "torch.Tensor.__float__": lambda tensor: watch.note_number(tensor, 0.3),
    }
    with contextlib.ExitStack() as stack:
        for place, stand_in in stand_ins.items():
            stack.enter_context(mock.patch(place, stand_in))
        stack.enter_context(FakeTensorMode(shape_env=shapes))
        yield watch


def script(monkeypatch, name, **shared):
    """The case of that name, as tools/bench.py steps it: as the script does, which another test holds."""
    monkeypatch.setitem(bench.CASES, name, CASES[name])
    return bench.Script(name, {**SHARED, **shared})


def give_gradients(model):
    """In the place of backward, which no fake tensor can do."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)


# ---------------------------------------- The training step

@pytest.mark.parametrize("name,precision", RUNS)
def test_a_step_waits_for_the_gpu_once(name, precision, monkeypatch):
    """For the numbers of the log; and nothing in it mixes devices, or has a shape that depends on a number."""
    with fake_gpu(precision) as watch:
        side = script(monkeypatch, name)
        monkeypatch.setattr(torch.Tensor, "backward", lambda loss: give_gradients(side.model))
        with watch:
            side.step(1)
            if getattr(side.cfg, "ema", 0):
                optim.update_ema(side.model.average, side.model, side.cfg.ema)
        assert all(parameter.device == GPU for parameter in side.model.parameters())
        assert side.run.scaler.is_enabled() == (precision == "fp16")
    assert watch.waits == ["read"] and not watch.mixed


@pytest.mark.parametrize("name", METHODS)
def test_log_of_a_step_reads_nothing_from_the_gpu(name, monkeypatch):
    """Between two lines of the log: the parts of a loss are added up where they are."""
    with fake_gpu() as watch:
        side = script(monkeypatch, name)
        run = side.run
        run.model, run.last_step, run.bar = side.model, 100, mock.Mock()
        side.model(torch.zeros(4, *shape_of(side), device=GPU), torch.zeros(4, side.model.num_noise, device=GPU))
        with watch:
            run.log(0, 4, 1.0, 1e-4, 1.0)
    assert not watch.waits and not watch.mixed


def shape_of(side):
    return side.imgs.shape[1:]


@pytest.mark.parametrize("module", [mae, simmim, um_mae, fastmim, lut, finetune, dense], ids=lambda m: m.__name__)
def test_a_micro_batch_is_copied_without_waiting(module):
    """What stands in `main` ahead of the update; the rest of a step is the one above."""
    source = inspect.getsource(module.main)
    text = source[source.index("for micro_step in") : source.index("# Update")]
    copies = re.findall(r"\.to\(run\.device(.*?)\)", text)
    assert len(copies) >= 2 and set(copies) == {", non_blocking=True"}
    assert not re.search(r"\.(item|tolist|cpu|numpy|nonzero)\(", text)


# ---------------------------------------- Before, beside and after the step

@pytest.mark.parametrize("name", [name for name in CASES if "fine-tuning" not in name and "linear" not in name])
def test_prepare_and_reconstruct_stay_on_the_gpu(name, monkeypatch):
    with fake_gpu() as watch:
        side = script(monkeypatch, name)
        method = importlib.import_module(type(side.cfg).__module__)
        imgs = torch.zeros(2, *shape_of(side), device=GPU)
        noise = torch.zeros(2, side.model.num_noise, device=GPU)
        with watch, mock.patch("torch.Tensor.item", lambda tensor: 1.0), mock.patch("torch.cov", lambda x: x @ x.T):
            losses = method.prepare(side.model, imgs, noise)
            rows = method.reconstruct(side.model, imgs, noise)
            target = side.model.target(imgs[:, 0] if isinstance(side.model, lut.LUT) else imgs)
    assert losses and target.device == GPU and target.dtype == torch.float32
    assert {row.device for row in rows.values()} == {GPU}
    assert not watch.mixed and not watch.waits


class Loader(list):
    """Batches as data.evaluation gives them: on the CPU."""

    def __init__(self, B, C, px, K, labels=None):
        imgs = torch.zeros(B, C, px, px, dtype=torch.uint8)
        labels = torch.zeros(B, dtype=torch.long) if labels is None else labels
        super().__init__([(imgs, labels, torch.arange(B))])
        self.num_images, self.classes = B, [str(k) for k in range(K)]


def test_neighbours_and_evaluation(monkeypatch):
    """They pick the whole images, and so have shapes that depend on numbers; the numbers are made up."""
    def bincount(labels, minlength):
        return torch.zeros(minlength, dtype=torch.int64, device=labels.device)

    monkeypatch.setattr(neighbours, "require_finite", lambda run, num_bad, what: None)
    monkeypatch.setattr(torch, "bincount", bincount)
    with fake_gpu(shapes=ShapeEnv()) as watch:
        side = script(monkeypatch, "fine-tuning")
        loader = Loader(4, 3, 32, 1000)
        with watch:
            features, labels = neighbours.extract(side.run, side.model.encoder, loader)
            scores = neighbours.neighbours(torch.zeros(8, 96, device=GPU), torch.zeros(8, dtype=torch.long, device=GPU),
                                           torch.zeros(4, 96, device=GPU), 10)
        assert features.device == labels.device == scores.device == GPU and scores.shape == (4, 10)
        with watch, mock.patch.object(evaluate, "summary", lambda counts, classes: counts):
            counts = evaluate.accuracy(side.run, side.model, loader)
        assert counts.device == GPU and counts.shape == (1000 * 1000 + 1,)
    assert not watch.mixed and not watch.waits


@pytest.mark.parametrize("task", ["segment", "depth", "keypoints"])
@pytest.mark.parametrize("model", ["vit_tiny", "swin_tiny"])
def test_dense(task, model):
    with fake_gpu(shapes=ShapeEnv()) as watch:
        cfg = dense.Config(task=task, model=model, img_size=(64, 64), in_chans=3, data="none", head_width=32)
        run = engine.Run(cfg)
        net = dense.build_dense(cfg, None, list("abc")).to(run.device)
        imgs = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
        shape = (2, 2, 64, 64) if task == "keypoints" else (2, 64, 64)
        labels = torch.zeros(shape, dtype=torch.uint8 if task == "segment" else torch.float32)
        with watch:
            on_gpu = transforms.normalize(imgs.to(GPU, non_blocking=True))
            with run.autocast():
                output = net(on_gpu, torch.zeros(2, net.num_noise, device=GPU)).float()
            loss = net.task.loss(output, labels.to(GPU, non_blocking=True)).sum()
        assert loss.device == GPU and not watch.waits
        with watch:
            tally = net.task.tally(net.task.predict(output), labels.to(GPU, non_blocking=True))
        assert tally.device == GPU
    assert not watch.mixed


# ---------------------------------------- The GPU of a Mac

@pytest.mark.parametrize("name", [*METHODS, "MAE, grid mask, pca", "FastMIM Swin, pixels", "fine-tuning"])
def test_a_step_makes_nothing_of_float64(name, monkeypatch):
    """Nor do `prepare` and `reconstruct`. A CPU shows it as well: the same lines run on a Mac's GPU."""
    side = script(monkeypatch, name, device="cpu", precision="fp32")
    with Doubles() as doubles:
        side.step(1)
        if not side.tunes:
            method, noise = importlib.import_module(type(side.cfg).__module__), torch.rand(2, side.model.num_noise)
            method.prepare(side.model, torch.rand(2, *shape_of(side)), noise)
            method.reconstruct(side.model, torch.rand(2, *shape_of(side)), noise)
        assert not doubles.found
        torch.zeros(2).double()
    assert doubles.found


# ---------------------------------------- What would be found

def wrong_in_a_case(monkeypatch, change):
    """What is noted when the class of MAE's `mask` does `change(model, noise)` first."""
    real = mae.MAE.mask

    def mask(model, noise):
        change(model, noise)
        return real(model, noise)

    monkeypatch.setattr(mae.MAE, "mask", mask)
    with fake_gpu() as watch:
        side = script(monkeypatch, "MAE")
        side.model.plain = torch.zeros(16)
        with watch, side.run.autocast():
            side.loss(torch.zeros(4, 3, 32, 32, device=GPU), torch.zeros(4, 16, device=GPU))
    return watch


@pytest.mark.parametrize("error,change", [
    (RuntimeError, lambda model, noise: noise + model.plain),  # a tensor that is no buffer stays on the CPU
    (DataDependentOutputException, lambda model, noise: noise.sum().item()),
    (DynamicOutputShapeException, lambda model, noise: noise[noise > 0]),
    (DynamicOutputShapeException, lambda model, noise: noise.nonzero()),
], ids=["mixes", "item", "boolean index", "nonzero"])
def test_what_fails(error, change, monkeypatch):
    with pytest.raises(error):
        wrong_in_a_case(monkeypatch, change)


@pytest.mark.parametrize("what,change", [
    ("waits", lambda model, noise: noise.cpu()),
    ("waits", lambda model, noise: noise.tolist()),
    ("waits", lambda model, noise: bool(noise.sum() > 0)),
    ("waits", lambda model, noise: model.plain.to(noise.device)),
    ("waits", lambda model, noise: torch.empty_like(noise[0]).copy_(model.plain)),
    ("waits", lambda model, noise: torch.unravel_index(noise.argsort(dim=1), (4, 4))),
    ("mixed", lambda model, noise: noise[:, torch.arange(3)]),
], ids=["cpu", "tolist", "bool", "to", "copy_", "unravel_index", "index on the CPU"])
def test_what_is_noted(what, change, monkeypatch):
    clean = wrong_in_a_case(monkeypatch, lambda model, noise: None)
    assert not clean.waits and not clean.mixed
    assert getattr(wrong_in_a_case(monkeypatch, change), what)


def test_nothing_fake_is_left_behind():
    """A cache that kept a fake tensor would give it to whatever comes next."""
    assert not isinstance(transforms.normalize(torch.zeros(3, 4, 4, dtype=torch.uint8)), FakeTensor)


# ---------------------------------------- torch.compile

@pytest.mark.parametrize("name", [*METHODS, "SimMIM Swin, window", "MAE, block mask", "fine-tuning"])
def test_forward_is_one_graph(name, monkeypatch):
    """With fullgraph a break raises. Other noise makes no other graph. Code is not generated (backend "eager"), which
    would take minutes."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    side = script(monkeypatch, name, device="cpu")
    side.model.compile(fullgraph=True, backend="eager")
    imgs = torch.randn(4, *shape_of(side))
    for seed in range(2):
        draw = torch.Generator().manual_seed(seed)
        side.model(imgs, torch.rand(4, side.model.num_noise, generator=draw)).sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


def test_a_graph_break_would_be_found(monkeypatch):
    side = script(monkeypatch, "MAE", device="cpu")
    side.model.compile(fullgraph=True, backend="eager")
    monkeypatch.setattr(mae.MAE, "target", lambda model, imgs: imgs if imgs.sum() > 0 else -imgs)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        side.model(torch.randn(4, 3, 32, 32), torch.rand(4, 16))
    torch._dynamo.reset()
