"""Time, arithmetic and memory of training steps, side by side in one run.

    python -m tools.bench           our scripts against torchvision's model of the same family (= yardstick)
    python -m tools.bench ratios    our settings against each other, beside what the papers say
    python -m tools.bench --table results/bench_yardstick_cpu.json      print the table of an earlier run again

A pair (A, B) runs A B, B A, A B, ...: every round gives one ratio time(B) / time(A), and a load on the machine falls on
both. Time is processor time of one CPU thread, or time on a GPU's clock. What is timed is the step block of a script's
main() on random uint8 images in memory; of torchvision's model forward, cross-entropy, backward and torch's AdamW.
"""

import argparse
import inspect
import json
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

import data
import fastmim
import finetune
import lut
import mae
import simmim
import um_mae
from common import engine, options


def labelled(cfg, net, imgs, labels, noise):
    imgs, targets = finetune.mix(imgs, F.one_hot(labels, 1000).float(), cfg, cfg.seed)  # targets (B, K)
    return F.cross_entropy(net(imgs, noise).float(), targets, label_smoothing=cfg.smoothing)


def case(build, model, px, **more):
    """What Script takes: the Config of the file in which `build` stands, its options, and `build` itself."""
    return inspect.getmodule(build).Config, {"model": model, "img_size": (px, px), "in_chans": 3, **more}, build


LIKE_UM_MAE = {"mask_unit": 16, "mask_ratio": 0.75}  # the SimMIM that UM-MAE is compared with, configs/um_simmim_*.yaml
CASES = {  # name: (Config, its options, model, and the loss, unless it is the model's own)
    "MAE ViT-B": case(mae.MAE, "vit_b", 224),
    "MAE ViT-B, 1-block decoder": case(mae.MAE, "vit_b", 224, decoder_depth=1),
    "MAE ViT-B, mask tokens in encoder": case(mae.MAE, "vit_b", 224, mask_tokens_in_encoder=True),
    "SimMIM ViT-B": case(simmim.SimMIM, "vit_b", 224),
    "SimMIM Swin-T": case(simmim.SimMIM, "swin_t", 256, window=8),
    "SimMIM Swin-B": case(simmim.SimMIM, "swin_b", 192, window=6),
    "SimMIM PVT-S": case(simmim.SimMIM, "pvt_s", 256),
    "UM-MAE Swin-T": case(um_mae.UMMAE, "swin_t", 256),
    "UM-MAE PVT-S": case(um_mae.UMMAE, "pvt_s", 256),
    "SimMIM Swin-T as in UM-MAE": case(simmim.SimMIM, "swin_t", 256, bias="continuous", window=16, **LIKE_UM_MAE),
    "SimMIM PVT-S as in UM-MAE": case(simmim.SimMIM, "pvt_s", 256, **LIKE_UM_MAE),
    "FastMIM ViT-B": case(fastmim.FastMIM, "vit_b", 128),
    "FastMIM Swin-B": case(fastmim.FastMIM, "swin_b", 128),
    "LUT ViT-B": case(lut.LUT, "vit_b", 224),
    "LUT ViT-B, one direction": case(lut.LUT, "vit_b", 224, one_directional=True),
    "fine-tuning ViT-B": (*case(finetune.Classifier, "vit_b", 224, mixup=0.0, cutmix=0.0)[:2],
                          lambda cfg: finetune.build_classifier(cfg, None, range(1000)), labelled),
}
YARDSTICKS = {  # what is measured against a model of torchvision, with its px
    "vit_b_16 224": ["MAE ViT-B", "MAE ViT-B, 1-block decoder", "fine-tuning ViT-B", "SimMIM ViT-B", "LUT ViT-B"],
    "swin_t 256": ["SimMIM Swin-T", "SimMIM PVT-S", "UM-MAE Swin-T", "UM-MAE PVT-S"],
    "swin_b 192": ["SimMIM Swin-B"], "vit_b_16 128": ["FastMIM ViT-B"], "swin_b 128": ["FastMIM Swin-B"],
}
PAIRS = {  # what: [(A, B, what is published of B / A)]
    "yardstick": [(ours, theirs, "") for theirs, cases in YARDSTICKS.items() for ours in cases],
    "ratios": [("MAE ViT-B", "MAE ViT-B, mask tokens in encoder", "ViT-L: time 2.8, FLOPs 3.3 (MAE, Tables 1c, 2)"),
               ("MAE ViT-B", "SimMIM ViT-B", ""),
               ("UM-MAE Swin-T", "SimMIM Swin-T as in UM-MAE", "time 1.97, memory 2.8 (UM-MAE, Table 3)"),
               ("UM-MAE PVT-S", "SimMIM PVT-S as in UM-MAE", "time 1.78, memory 1.8 (UM-MAE, Table 3)"),
               ("FastMIM ViT-B", "SimMIM ViT-B", ""), ("FastMIM ViT-B", "MAE ViT-B", ""),
               ("FastMIM Swin-B", "SimMIM Swin-B", ""), ("FastMIM ViT-B", "FastMIM ViT-B: target", ""),
               ("FastMIM Swin-B", "FastMIM Swin-B: target", ""),
               ("MAE ViT-B", "LUT ViT-B", "time 1.18 by its seconds, 2.1 by its hours (LUT, 1 and 5.1.4)"),
               ("MAE ViT-B", "LUT ViT-B, one direction", "")],
}
SQUARE = {"cpu": 1024, "cuda": 8192}  # side of the matrices whose product is the yardstick of all matrix products


class Script:
    """One of our scripts. `step` is its step block, line by line, with one micro-batch."""

    def __init__(self, name, shared):
        config, own, build, *loss = CASES[name]
        self.loss = loss[0] if loss else lambda cfg, net, imgs, labels, noise: net(imgs, noise)
        self.cfg = cfg = config(**own, **shared)
        self.run = engine.start(cfg)
        self.model = model = build(cfg).to(self.run.device).train()
        decay = [lambda name: cfg.layer_decay ** model.depth_below(name)] if config is finetune.Config else []
        groups = engine.parameter_groups(model, cfg.weight_decay, *decay)
        self.optimizer = torch.optim.AdamW(groups, betas=cfg.betas, fused=True)
        shape = getattr(model, "input_shape", (cfg.in_chans, *cfg.img_size))  # LUT takes pairs of views
        self.imgs = torch.randint(256, (cfg.batch_size, *shape), dtype=torch.uint8)  # (B, C, H, W)
        self.labels, self.where = torch.randint(1000, (cfg.batch_size,)), torch.arange(cfg.batch_size)  # (B,), (B,)

    def step(self, step, lr=1e-4):
        cfg, run, model, optimizer, size = self.cfg, self.run, self.model, self.optimizer, self.cfg.batch_size
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        noise = engine.noise(cfg.seed, step, size, model.num_noise)
        loss = torch.zeros((), device=run.device)
        imgs, labels = data.normalize(self.imgs.to(run.device, non_blocking=True)), self.labels.to(run.device)
        with engine.autocast(run):
            part = self.loss(cfg, model, imgs, labels, noise[self.where].to(run.device)) * (len(imgs) / size)
        run.scaler.scale(part * run.world).backward()
        loss += part.detach()
        run.scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        if cfg.clip_grad:
            torch.nn.utils.clip_grads_with_norm_(model.parameters(), cfg.clip_grad, grad_norm)
        loss, grad_norm, told = engine.agree(run, loss, grad_norm)
        engine.check_finite(run, step, lr, loss, grad_norm)
        run.scaler.step(optimizer)
        run.scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if hasattr(model, "update_ema"):  # LUT's teacher
            model.update_ema(cfg.ema_decay)
        return loss, grad_norm, told


class Target(Script):
    """Of one of our scripts, what a step does to make its target."""

    def step(self, step):
        self.model.target(data.normalize(self.imgs.to(self.run.device)))


class Yardstick:
    """A classifier of torchvision: forward, cross-entropy, backward, AdamW."""

    def __init__(self, name, shared):
        self.run = engine.start(mae.Config(**shared))
        device, B, (name, _, px) = self.run.device, shared["batch_size"], name.partition(" ")
        sizes = {"image_size": int(px)} if name.startswith("vit") else {}  # any other takes what it is given
        self.model = torchvision.models.get_model(name, **sizes).to(device).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.imgs = torch.randn(B, 3, int(px), int(px), device=device)  # (B, C, H, W)
        self.labels = torch.randint(1000, (B,), device=device)  # (B,)

    def step(self, step):
        with engine.autocast(self.run):
            loss = F.cross_entropy(self.model(self.imgs).float(), self.labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def make(name, shared):
    case, _, target = name.partition(": ")
    return (Target if target else Script if case in CASES else Yardstick)(case, shared)


def seconds(device, work, *inputs):
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    wait = torch.cuda.synchronize if device.type == "cuda" else int  # int() does nothing
    wait()
    begin = clock()
    work(*inputs)
    wait()
    return clock() - begin


def peak_bytes(name, shared):
    """Most memory of two steps, weights to activations, in a fresh process: of the GPU's allocator, or the growth of
    resident memory. (Linux' VmHWM: getrusage's maximum would begin with that of the parent process.)"""
    def resident(key):
        return 1024 * int(re.search(rf"{key}:\s*(\d+)", Path("/proc/self/status").read_text())[1])
    before, side = resident("VmRSS"), make(name, shared)
    for step in range(2):
        side.step(step)
    return torch.cuda.max_memory_allocated() if side.run.device.type == "cuda" else resident("VmHWM") - before


def measure(a, b, published, shared, args):
    """One line of the table as plain data; lists of two are [of A, of B], per step of `batch` images."""
    sides, times, flops = [make(name, shared) for name in (a, b)], [[], []], []
    device = sides[0].run.device
    for side in sides:  # of a step, in matrix products alone, whatever kernel attention will run in
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            side.step(0)
        flops.append(counter.get_total_flops())
    for i in range(args.rounds + 1):
        for which in (i % 2, 1 - i % 2):
            times[which].append(seconds(device, sides[which].step, i))
    times = [one[1:] for one in times]  # the first round warms up
    n = SQUARE[device.type]
    square = torch.randn(n, n, device=device, dtype=sides[0].run.dtype)  # (n, n)
    rate = 2 * n**3 / statistics.median(seconds(device, torch.matmul, square, square) for _ in range(6))
    again = [sys.executable, "-m", "tools.bench", f"--memory_batch={args.memory_batch}",
             f"--precision={shared['precision']}", f"--device={args.device}", "--peak"]
    peaks = [int(subprocess.check_output([*again, name])) for name in (a, b)]
    return {"pair": [a, b], "published": published, "precision": shared["precision"], "batch": shared["batch_size"],
            "seconds": times, "ratios": [tb / ta for ta, tb in zip(*times, strict=True)],
            "median": [statistics.median(t) for t in times], "flops": flops, "memory_batch": args.memory_batch,
            "peak_bytes": peaks, "matmul_flops_per_second": rate}


def table(result):
    lines = ["{device} {bf16_instructions}, torch {torch}, commit {commit}, {date}\n".format(**result["machine"]),
             "| A | B | precision, batch | images/s of A, B | time B/A (range) | FLOPs B/A | memory B/A | "
             "share of matmul rate A, B | published B/A |", "|---" * 9 + "|"]
    for row in result["rows"]:
        ratios, median = sorted(row["ratios"]), row["median"]
        speeds = ", ".join(f"{row['batch'] / t:.2f}" for t in median)
        shares = ", ".join(f"{row['flops'][i] / median[i] / row['matmul_flops_per_second']:.0%}" for i in (0, 1))
        work, peak = (row[key][1] / row[key][0] for key in ("flops", "peak_bytes"))
        lines.append(f"| {' | '.join(row['pair'])} | {row['precision']}, {row['batch']} | {speeds} | "
                     f"**{statistics.median(ratios):#.3g}** ({ratios[0]:#.3g} to {ratios[-1]:#.3g}) | {work:.2f} | "
                     f"{peak:.2f} (at {row.get('memory_batch', row['batch'])}) | {shares} | {row['published']} |")
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="yardstick", choices=PAIRS)
    parser.add_argument("--cases", default="", help="only pairs whose names contain one of these, as MAE,SimMIM")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, help="images; on a CPU 4, of ratios 16; on a GPU 64")
    parser.add_argument("--memory_batch", type=int, help="images where memory is measured; on a CPU 16, on a GPU 64")
    parser.add_argument("--precision", default="both", choices=["fp32", "bf16", "both"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", type=Path, help="result file; results/bench_<what>_<device>.json")
    parser.add_argument("--table", type=Path, help="print the table of this result file and stop")
    parser.add_argument("--peak", help="print the peak memory of this case in bytes and stop")
    args = parser.parse_args(argv)
    if args.table:
        return print(table(json.loads(args.table.read_text())))
    torch.set_num_threads(1)  # its processor time is what a busy machine disturbs least
    many = 64 if args.device == "cuda" else 16  # so that images outweigh what the optimizer does and keeps
    args.memory_batch = args.memory_batch or many
    batch = args.memory_batch if args.peak else args.batch or (4 if many == 16 and args.what == "yardstick" else many)
    shared = {"batch_size": batch, "micro_batch": batch, "precision": args.precision, "device": args.device}
    if args.peak:
        return print(peak_bytes(args.peak, shared))
    pairs = [pair for pair in PAIRS[args.what] if any(c in " / ".join(pair[:2]) for c in args.cases.split(","))]
    if not pairs:
        options.fail(f"--cases {args.cases}: no pair of {args.what} is called so")
    path = args.json or Path("results") / f"bench_{args.what}_{args.device}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    info, gpu = Path("/proc/cpuinfo").read_text(), torch.cuda.get_device_name() if args.device == "cuda" else None
    machine = {"device": gpu or re.search("model name.*: (.*)", info)[1],
               "bf16_instructions": [flag for flag in ("amx_bf16", "avx512_bf16") if flag in info.split()],
               "torch": torch.__version__, "commit": options.commit(), "date": time.strftime("%Y-%m-%d %H:%M:%S %z")}
    result = {"what": args.what, "machine": machine, "rows": []}
    for precision in ["fp32", "bf16"] if args.precision == "both" else [args.precision]:
        for pair in pairs:
            result["rows"].append(measure(*pair, {**shared, "precision": precision}, args))
            path.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
