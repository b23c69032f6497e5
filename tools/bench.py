"""Time, arithmetic and memory of training steps, side by side in one run.

    python -m tools.bench           our scripts against torchvision's model of the same family (= yardstick)
    python -m tools.bench ratios    our settings against each other, beside what the papers say
    python -m tools.bench droppath  fine-tuning with stochastic depth, which leaves out what it drops, against timm's
    python -m tools.bench compile   our scripts with --compile against the same without

A pair (A, B) runs A B, B A, A B, ...: every round gives one ratio time(B) / time(A), and a load on the machine falls on
both. Time is processor time of one CPU thread, or time on a GPU's clock. What is timed is the step block of a script's
main() on random uint8 images in memory; of torchvision's model forward, cross-entropy, backward and torch's AdamW.
"""

import argparse
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import fastmim
import finetune
import lut
import mae
import simmim
import um_mae
from common import config, engine, optim, randomness, transforms
from tools import runner


def case(script, method, model, px, **more):
    return script.Config, {"model": model, "img_size": (px, px), "in_chans": 3, **more}, method


AS_UM = {"mask_unit": 16, "mask_ratio": 0.75}  # the SimMIM that UM-MAE is compared with, configs/um_simmim_*.yaml
CASES = {  # name: (Config, its options, class of the model)
    "MAE ViT-B": case(mae, mae.MAE, "vit_b", 224),
    "MAE ViT-L": case(mae, mae.MAE, "vit_l", 224),
    "MAE ViT-H": case(mae, mae.MAE, "vit_h", 224, patch_size=14),
    "MAE ViT-L, mask tokens in encoder": case(mae, mae.MAE, "vit_l", 224, mask_tokens_in_encoder=True),
    "MAE ViT-B, 1-block decoder": case(mae, mae.MAE, "vit_b", 224, decoder_depth=1),
    "MAE ViT-B, mask tokens in encoder": case(mae, mae.MAE, "vit_b", 224, mask_tokens_in_encoder=True),
    "SimMIM ViT-B": case(simmim, simmim.SimMIM, "vit_b", 224),
    "SimMIM Swin-T": case(simmim, simmim.SimMIM, "swin_t", 256, window=8),
    "SimMIM Swin-B": case(simmim, simmim.SimMIM, "swin_b", 192, window=6),
    "SimMIM PVT-S": case(simmim, simmim.SimMIM, "pvt_s", 256),
    "UM-MAE Swin-T": case(um_mae, um_mae.UMMAE, "swin_t", 256),
    "UM-MAE PVT-S": case(um_mae, um_mae.UMMAE, "pvt_s", 256),
    "SimMIM Swin-T as in UM-MAE": case(simmim, simmim.SimMIM, "swin_t", 256, bias="continuous", window=16, **AS_UM),
    "SimMIM PVT-S as in UM-MAE": case(simmim, simmim.SimMIM, "pvt_s", 256, **AS_UM),
    "FastMIM ViT-B": case(fastmim, fastmim.FastMIM, "vit_b", 128),
    "FastMIM Swin-B": case(fastmim, fastmim.FastMIM, "swin_b", 128),
    "LUT ViT-B": case(lut, lut.LUT, "vit_b", 224),
    "LUT ViT-B, one direction": case(lut, lut.LUT, "vit_b", 224, one_directional=True),
    "fine-tuning ViT-B": case(finetune, finetune.Classifier, "vit_b", 224, mixup=0.0, cutmix=0.0),
    "fine-tuning ViT-L": case(finetune, finetune.Classifier, "vit_l", 224, mixup=0.0, cutmix=0.0, drop_path=0.2)}
YARDSTICKS = {  # a model of another library with its px: what is measured against it
    "vit_b_16 224": ["MAE ViT-B", "MAE ViT-B, 1-block decoder", "fine-tuning ViT-B", "SimMIM ViT-B", "LUT ViT-B"],
    "swin_t 256": ["SimMIM Swin-T", "SimMIM PVT-S", "UM-MAE Swin-T", "UM-MAE PVT-S"],
    "swin_b 192": ["SimMIM Swin-B"], "vit_b_16 128": ["FastMIM ViT-B"], "swin_b 128": ["FastMIM Swin-B"]}
PAIRS = {  # what: [(A, B, what is published of B / A)]; ": target" is what a step does to make its target
    "yardstick": [(ours, theirs, "") for theirs, cases in YARDSTICKS.items() for ours in cases],
    "compile": [(name, f"{name}: compiled", "") for name in (
        "MAE ViT-B", "SimMIM ViT-B", "UM-MAE Swin-T", "FastMIM ViT-B", "LUT ViT-B", "fine-tuning ViT-B")],
    "droppath": [("fine-tuning ViT-L", "timm:vit_large_patch16_224 224 0.2", "")],
    "ratios": [
        ("MAE ViT-B", "MAE ViT-B, mask tokens in encoder", "ViT-L: time 2.8, FLOPs 3.3 (MAE, Tables 1c, 2)"),
        ("UM-MAE Swin-T", "SimMIM Swin-T as in UM-MAE", "time 1.97, memory 2.8 (UM-MAE, Table 3)"),
        ("UM-MAE PVT-S", "SimMIM PVT-S as in UM-MAE", "time 1.78, memory 1.8 (UM-MAE, Table 3)"),
        ("MAE ViT-B", "SimMIM ViT-B", "hours 3.2 (FastMIM, Table 3)"),
        ("FastMIM ViT-B", "SimMIM ViT-B", "hours 5.1 (FastMIM, Table 3)"),
        ("FastMIM ViT-B", "MAE ViT-B", "hours 1.6 (FastMIM, Table 3)"),
        ("FastMIM Swin-B", "SimMIM Swin-B", "hours 2.5 (FastMIM, Table 3)"),
        ("FastMIM ViT-B", "FastMIM ViT-B: target", ""), ("FastMIM Swin-B", "FastMIM Swin-B: target", ""),
        ("MAE ViT-B", "LUT ViT-B", "time 1.18 by its seconds, 2.1 by its hours (LUT, 1 and 5.1.4)"),
        ("MAE ViT-B", "LUT ViT-B, one direction", "")]}


class Script:
    """One of our scripts. `step` is its step block, line by line, with one micro-batch."""
    def __init__(self, name, shared):
        config, own, method = CASES[name]
        self.cfg = cfg = config(**own, **shared)
        self.run = engine.Run(cfg)
        self.device, self.dtype = self.run.device, self.run.dtype
        self.tunes = method is finetune.Classifier
        model = finetune.build_classifier(cfg, None, range(1000)) if self.tunes else method(cfg)
        self.model = self.run.distribute(model.to(self.device).train())
        if self.tunes:
            self.optimizer = finetune.build_optimizer(cfg, self.model)
        else:
            groups = optim.parameter_groups(self.model, cfg.weight_decay)
            self.optimizer = torch.optim.AdamW(groups, betas=cfg.betas, fused=True)
        shape = getattr(self.model, "input_shape", (cfg.in_chans, *cfg.img_size))  # LUT takes pairs of views
        self.imgs = torch.randint(256, (cfg.batch_size, *shape), dtype=torch.uint8)  # (B, C, H, W)
        self.labels = torch.randint(1000, (cfg.batch_size,), device=self.device)  # (B,)

    def loss(self, imgs, noise):
        if not self.tunes:
            return self.model(imgs, noise)
        labels = F.one_hot(self.labels, 1000).float()  # (B, K)
        imgs, targets = finetune.mix(imgs, labels, self.cfg, self.cfg.seed)
        return F.cross_entropy(self.model(imgs, noise).float(), targets, label_smoothing=self.cfg.smoothing)

    def step(self, step, lr=1e-4):
        cfg, run, model, optimizer = self.cfg, self.run, self.model, self.optimizer
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        noise = randomness.noise(cfg.seed, step, cfg.batch_size, model.num_noise)
        loss_sum = torch.zeros((), device=run.device)
        imgs = transforms.normalize(self.imgs.to(run.device, non_blocking=True), cfg)
        with run.autocast():
            own_noise = noise if self.tunes else noise.to(run.device, non_blocking=True)
            loss = self.loss(imgs, own_noise) * (len(imgs) / cfg.batch_size)
        run.scaler.scale(loss * run.world_size).backward()  # DDP averages: this makes it a sum
        loss_sum += loss.detach()

        # Update
        run.scaler.unscale_(optimizer)
        grad_norm = optim.clip(model, cfg.clip_grad)
        loss, grad_norm = run.all_reduce_stats(step, lr, loss_sum, grad_norm)  # stops at a NaN
        run.scaler.step(optimizer)
        run.scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if hasattr(model, "update_ema"):  # LUT's teacher
            model.update_ema(cfg.ema_decay)


class Target(Script):  # what a step does to make its target
    def step(self, step):
        self.model.target(transforms.normalize(self.imgs.to(self.device), self.cfg))


def foreign(model, px, drop_path=0.0):
    """A classifier of torchvision, or of timm, as "timm:vit_base_patch16_224", with stochastic depth."""
    if model.startswith("timm:"):
        import timm
        return timm.create_model(model.removeprefix("timm:"), drop_path_rate=drop_path)
    sizes = {"image_size": px} if model.startswith("vit") else {}  # any other takes what it is given
    return torchvision.models.get_model(model, **sizes)


class Yardstick:  # a classifier of another library
    def __init__(self, name, shared):
        model, px, *drop_path = name.split()  # "swin_t 256", or with the rate of the last block
        B, px = shared["batch_size"], int(px)
        torch.manual_seed(0)
        self.device = torch.device(shared["device"])
        self.dtype = torch.bfloat16 if shared["precision"] == "bf16" else torch.float32
        self.model = foreign(model, px, *map(float, drop_path)).to(self.device).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.imgs = torch.randn(B, 3, px, px, device=self.device)  # (B, C, H, W)
        self.labels = torch.randint(1000, (B,), device=self.device)  # (B,)

    def step(self, step):
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            loss = F.cross_entropy(self.model(self.imgs).float(), self.labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def make(name, shared):
    name, _, part = name.partition(": ")
    if name not in CASES:
        return Yardstick(name, shared)
    return Target(name, shared) if part == "target" else Script(name, {**shared, "compile": part == "compiled"})


def seconds(device, work, *inputs):
    """Processor time; on a GPU the time until it has ended what it was given."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    begin = clock()
    work(*inputs)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - begin


def flops_of(side):
    """FLOPs of a step, in matrix products alone, whatever kernel attention will run in."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        side.step(0)
    return counter.get_total_flops()


def product_rate(device, dtype, n):
    """FLOPs a second of one large product, the yardstick of all others."""
    square = torch.randn(n, n, device=device, dtype=dtype)  # (n, n)
    return 2 * n**3 / statistics.median(seconds(device, torch.matmul, square, square) for _ in range(6))


def resident(key):
    """Bytes of this process: VmRSS now, VmHWM at most (getrusage's begins with the parent's); 0 where not known."""
    status = Path("/proc/self/status")
    return 1024 * int(re.search(rf"{key}:\s*(\d+)", status.read_text())[1]) if status.exists() else 0


def peak_bytes(name, shared):
    """Most memory of two steps: of the GPU's allocator, or the growth of resident memory."""
    before = resident("VmRSS")
    side = make(name, shared)
    for step in range(2):
        side.step(step)
    return torch.cuda.max_memory_allocated() if side.device.type == "cuda" else resident("VmHWM") - before


def measure(a, b, shared, args):
    """One line of the table as plain data; lists of two are [of A, of B], per step of `batch` images."""
    sides = [make(name, shared) for name in (a, b)]
    compiles = b.endswith(": compiled")  # there is no counting in a graph, and in a fresh process it is made again
    flops = [flops_of(side) for side in sides[: 1 if compiles else 2]]
    times, first_seconds = [[], []], None
    if compiles:
        flops *= 2
        begin = time.monotonic()
        sides[1].step(0)
        first_seconds = time.monotonic() - begin
    for i in range(args.rounds + 1):
        for side in (i % 2, 1 - i % 2):
            times[side].append(seconds(sides[side].device, sides[side].step, i))
    times = [own[1:] for own in times]  # the first round warms up
    rate = product_rate(sides[0].device, sides[0].dtype, 8192 if args.device == "cuda" else 1024)
    argv = f"-m tools.bench --memory_batch {args.memory_batch} --precision {shared['precision']} --device {args.device}"
    peaks = [int(subprocess.check_output([sys.executable, *argv.split(), "--peak", name]))
             for name in (a, b) if not compiles]
    return {"pair": [a, b], "precision": shared["precision"], "batch": shared["batch_size"],
            "seconds": times, "ratios": [tb / ta for ta, tb in zip(*times, strict=True)],
            "median": [statistics.median(own) for own in times], "flops": flops, "memory_batch": args.memory_batch,
            "peak_bytes": peaks or [0, 0], "matmul_flops_per_second": rate, "first_seconds": first_seconds}


def table(record):
    published = {(a, b): text for pairs in PAIRS.values() for a, b, text in pairs}
    rows = {}
    for row in record["results"]:
        a, b = row["pair"]
        ratios, median, flops, peaks = sorted(row["ratios"]), row["median"], row["flops"], row["peak_bytes"]
        shares = [flops[i] / median[i] / row["matmul_flops_per_second"] for i in (0, 1)]
        memory_batch = row.get("memory_batch", row["batch"])
        cells = {"time (range)": f"**{statistics.median(ratios):#.3g}** ({ratios[0]:#.3g} to {ratios[-1]:#.3g})",
                 "FLOPs": f"{flops[1] / flops[0]:.2f}",
                 "memory": f"{peaks[1] / peaks[0]:.2f} (at {memory_batch})" if peaks[0] else "",
                 "images/s": " / ".join(f"{row['batch'] / time:.2f}" for time in reversed(median)),
                 "share of matmul rate": " / ".join(f"{share:.0%}" for share in reversed(shares)),
                 "published": published.get((a, b), "")}
        if b.endswith(": compiled"):
            cells = {"time (range)": cells["time (range)"], "first step": f"{row['first_seconds']:.0f} s"}
        rows[f"{b} / {a}, {row['precision']}, batch {row['batch']}"] = cells
    machine = record["machine"]
    device = record.get("gpu") or machine["processor"]
    about = f"{device}, torch {machine['torch']}, commit {record['commit']}, {record['date']}"
    return f"{about}\n\n{runner.markdown('B / A', rows)}"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="yardstick", choices=PAIRS)
    parser.add_argument("--cases", default="", help="only pairs whose names contain one of these, as MAE,SimMIM")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, help="images; on a CPU 4, of ratios 16; on a GPU 64")
    parser.add_argument("--memory_batch", type=int, help="images where memory is measured; on a CPU 16, on a GPU 64")
    parser.add_argument("--precision", default="both", choices=["fp32", "bf16", "both"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", type=Path, help="file of the numbers; runs/bench_<what>_<device>.json")
    parser.add_argument("--peak", help="print the peak memory of this case in bytes and stop")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # its processor time is what a busy machine disturbs least

    many = 64 if args.device == "cuda" else 16  # so that images outweigh what the optimizer does and keeps
    args.memory_batch = args.memory_batch or many
    few = 4 if many == 16 and args.what == "yardstick" else many
    batch = args.memory_batch if args.peak else args.batch or few
    shared = {"batch_size": batch, "micro_batch": batch, "device": args.device, "data": "none"}
    if args.peak:
        return print(peak_bytes(args.peak, {**shared, "precision": args.precision}))
    pairs = [pair for pair in PAIRS[args.what] if any(name in " / ".join(pair[:2]) for name in args.cases.split(","))]
    if not pairs:
        config.fail(f"--cases {args.cases}: no pair of {args.what} is called so")

    path = args.json or Path("runs", f"bench_{args.what}_{args.device}.json")
    command = " ".join(["python -m tools.bench", *(sys.argv[1:] if argv is None else argv)])
    gpu = torch.cuda.get_device_name() if args.device == "cuda" else None
    record = runner.new_record(f"bench_{args.what}", [command], [0], gpu=gpu, results=[])
    for precision in ["fp32", "bf16"] if args.precision == "both" else [args.precision]:
        for pair in pairs:
            record["results"].append(measure(*pair[:2], {**shared, "precision": precision}, args))
            runner.write(path, record)
    print(table(record))


if __name__ == "__main__":
    main()
