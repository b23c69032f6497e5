"""Steps of tools/gpu.py that measure: the machine, memory of every recipe, speed of training steps, CIFAR-10. See
tools/gpu_checks.py for what a step is."""

import contextlib
import fcntl
import json
import time
import zipfile

import torch

import finetune
import mae
from common import config, plan
from tools import bench, runner
from tools.gpu_checks import BUILD, OF_VIT, SCRIPTS, options

# ---------------------------------------- The machine

def machine(args):
    """What runs here, and the rates of one large product."""
    yield "torch", {"ok": True, "version": torch.__version__, "cuda": torch.version.cuda}
    if args.device == "cuda":
        about = torch.cuda.get_device_properties(0)
        yield "GPU", {"ok": True, "name": about.name, "GB": about.total_memory / 1e9,
                      "capability": ".".join(map(str, torch.cuda.get_device_capability()))}
    device = torch.device(args.device)
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        rate = bench.product_rate(device, dtype, 8192 if args.device == "cuda" else 256)
        yield f"product in {name}", {"ok": True, "TFLOP/s": rate / 1e12}


# ---------------------------------------- Memory and speed

def recipe_script(name):
    """The script of a recipe, which is called like it, or like a protocol, or like UM-MAE's SimMIM."""
    others = {"linear": "finetune", "partial": "finetune", "scratch": "finetune", "tiny": "mae", "um_simmim": "simmim"}
    known = {**{script: script for script in SCRIPTS}, **others}
    return known[max((start for start in known if name.startswith(start)), key=len)]


def memory(args, part, parts):
    """Of every parts-th recipe, the allocator's peak in two steps of its micro_batch, beside what --plan says. It has
    24 GB less CUDA's context."""
    stems = sorted(path.stem for path in (config.ROOT / "configs").glob("*.yaml"))
    small = {stem for stem in stems if "tiny" in stem}
    names = sorted(small) if args.dry else [stem for stem in stems if stem not in small and "cifar10" not in stem]
    on_gpu = args.device == "cuda"
    if on_gpu:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((plan.CARD - plan.CUDA_CONTEXT) / total)
    for name in names[part::parts]:
        script = recipe_script(name)
        given = OF_VIT if name in ("finetune_tiny", "dense_tiny") else []
        cfg = options(script, ["--config", f"configs/{name}.yaml", *given])
        n = min(cfg.micro_batch, 4) if args.dry else cfg.micro_batch
        planned = plan.estimate(cfg, BUILD[script]).bytes(n) - plan.CUDA_CONTEXT
        fits = two_steps(script, cfg, n, args.device)
        peak = None
        if on_gpu:
            peak = torch.cuda.max_memory_allocated() / 1e9
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        yield name, {"ok": fits, "micro_batch": n, "planned GB": planned / 1e9, "peak GB": peak}


def two_steps(script, cfg, n, device):
    """Train the model of a recipe for two steps on n images. Is there enough memory?"""
    try:
        with torch.device(device):
            model = BUILD[script](cfg).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
        for _ in range(2):
            plan.forward(model, cfg, torch.bfloat16, n).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    except torch.OutOfMemoryError:
        return False
    return True


TINY_YARDSTICKS = {"vit_b_16 224": "resnet18 64", "timm:vit_base_patch16_224 224": "timm:vit_tiny_patch16_224 224"}


def tiny_case(name):
    """The case of tools/bench.py with a tiny network of the same family and 128 px, under a name of its own."""
    script, own, method = bench.CASES[name]
    family = own["model"].split("_")[0]
    bench.CASES["tiny"] = script, {**own, "model": f"{family}_tiny", "img_size": (128, 128), "patch_size": 0}, method
    return "tiny"


def speed(args, name):
    """A training step, eager and compiled: images/s, memory, and what share of the rate of one large product it has."""
    n = 2 if args.dry else 128
    if args.dry:
        name = TINY_YARDSTICKS[name] if name in TINY_YARDSTICKS else tiny_case(name)
    shared = {"batch_size": n, "micro_batch": n, "device": args.device, "precision": "bf16", "data": "none"}
    side = bench.make(name, shared)
    flops = bench.flops_of(side)
    with alone(args):
        rate = bench.product_rate(side.device, side.dtype, 8192 if args.device == "cuda" else 256)
    for how in ("eager", "compiled"):
        if how == "compiled":
            side.model.compile(backend="eager" if args.dry else "inductor")
        for step in range(1 if args.dry else 4):
            side.step(step)
        with alone(args):
            if args.device == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            times = [bench.seconds(side.device, side.step, step) for step in range(1 if args.dry else 12)]
            peak = torch.cuda.max_memory_allocated() / 1e9 if args.device == "cuda" else None
        median = sorted(times)[len(times) // 2]
        yield how, {"ok": True, "images/s": n / median, "ms a step": 1000 * median, "peak GB": peak,
                    "share of matmul rate": flops / median / rate, "batch": n}


@contextlib.contextmanager
def alone(args):
    """No other process is timed meanwhile; others may well build and compile."""
    with open(args.out.parent / "timing.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# ---------------------------------------- CIFAR-10

RECIPE = "--patch_size 2 --batch_size 512 --micro_batch 512 --lr_batch 512 --save_epochs 1000"
PRETRAIN = f"--config configs/cifar10_mae.yaml --model vit_ti {RECIPE} --picture_epochs 0"
TUNE = f"--config configs/cifar10_finetune.yaml {RECIPE}"


def cifar(args):
    """MAE with ViT-Ti and patches of 2 px, then fine-tuning and, for as long, training from random weights."""
    end = time.monotonic() + args.seconds
    folder = args.out / "cifar10"
    with zipfile.ZipFile(args.cifar) as file:
        file.extractall(folder)
    num_images = sum(1 for path in (folder / "train").rglob("*") if path.is_file())
    workers = 0 if args.dry else max(1, runner.CORES - 2)
    more = ["--data", folder, "--device", args.device, "--workers", workers, "--log_every", 10]
    if args.dry:
        more += ["--model", "vit_tiny", "--patch_size", 8, "--batch_size", 8, "--micro_batch", 8]

    def run(script, given, name, *rest):
        """The lines of the log."""
        script.main([str(word) for word in [*given.split(), *more, *rest, "--out", args.out / name]])
        return runner.log_of(args.out / name)

    def epochs_in(share, rate):
        """How many passes take that share of the time that is left."""
        seconds = 1 if args.dry else end - time.monotonic()
        return max(1, int(share * seconds * rate / num_images))

    short = ["--max_steps", 2 if args.dry else 60, "--log_every", 1 if args.dry else 30]
    rate = run(mae, PRETRAIN, "short", *short)[-1]["images_per_s"]
    epochs = epochs_in(0.5, rate)
    log = run(mae, PRETRAIN, "mae", "--epochs", epochs, "--warmup_epochs", epochs / 20)
    yield "pre-training", {"ok": True, "epochs": epochs, "images/s": rate, "loss": log[-1]["loss"]}

    tuned = ["--head_start", "random", "--epochs"]
    rate = run(finetune, TUNE, "short_tuned", "--init", args.out / "mae" / "encoder.pt", *tuned, 100, *short)
    rate = next(line["images_per_s"] for line in reversed(rate) if "images_per_s" in line)
    epochs = epochs_in(0.4, rate)  # twice, and something for evaluation
    for name, init in {"fine-tuned": ["--init", args.out / "mae" / "encoder.pt"], "scratch": []}.items():
        run(finetune, TUNE, name, *(init or ["--model", "vit_tiny" if args.dry else "vit_ti"]), *tuned, epochs)
        top1 = json.loads((args.out / name / "result.json").read_text())["top1"]
        yield name, {"ok": True, "epochs": epochs, "top-1": top1}
