"""What every script does before, beside and after its training loop; functions only.

The dividing rule: a line that would change the loss, the gradient or the order of a step lives in the method file.
What lives here is a no-op on one GPU (process group, no_sync), runs once before or after the loop (set-up, saving),
or is a pure function (schedule, noise, parameter groups). Nothing here wraps backward or step.
"""

import contextlib
import datetime
import hashlib
import json
import math
import os
import signal
import time
import types
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record  # noqa: F401  names the failed worker to torchrun
from torch.distributed.rendezvous import rendezvous
from tqdm import tqdm

from common import checkpoint
from common.cost import plan  # noqa: F401
from common.options import RunConfig, Size, check, claim, configure, fail, fixed, plain, say, user_errors  # noqa: F401

# -------------------- Pure functions: randomness, schedule, parameter groups --------------------


def seed_of(*where):
    """A 63-bit seed that is a function of where it is used, such as (seed, "mask", step): never of how many numbers
    were drawn before, or by which process. Hashed, so that (seed 0, epoch 1) is not (seed 1, epoch 0)."""
    return int.from_bytes(hashlib.blake2b(repr(where).encode(), digest_size=8).digest(), "little") >> 1


def noise(seed, step, *shape, use="mask"):
    """Uniform noise in [0, 1) for the whole global batch of a step: float32 of `shape`, (B, N) for masks. Every process
    draws it on the CPU and picks what belongs to its images, and so gets what one process would have got."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed_of(seed, use, step)))


def schedule(kind, step, steps, warmup, peak, floor=0.0):
    """Learning rate of a step: linear from 0 over `warmup` steps, then half a `cosine` from `peak` to `floor` at
    `steps` (MAE, Table 8; Loshchilov & Hutter, 2017), or a `step` to a tenth after 7/8 of the run (SimMIM)."""
    if step < warmup:
        return peak * step / warmup
    # DIFF: SimMIM's released cosine runs from step 0, warm-up included, and drops by a tenth where the warm-up ends.
    if kind == "step":
        return peak if step < 0.875 * steps else 0.1 * peak
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def lengths(cfg, steps_per_epoch):
    """(steps of the run, of its warm-up). A warm-up as long as the run, as 40 epochs are in a short trial of a long
    recipe, is cut to a twentieth of it: MAE's 40 of 800 epochs."""
    steps, warmup = (round(epochs * steps_per_epoch) for epochs in (cfg.epochs, cfg.warmup_epochs))
    return steps, warmup if warmup < steps else steps // 20


def parameter_groups(model, weight_decay, layer_scale=lambda name: 1.0):
    """AdamW's groups: no weight decay for what has one dimension, nor for class and mask tokens, position and bias
    tables, scales; `lr_scale` from `layer_scale(parameter name)`. The groups are asserted to hold every parameter once.
    """
    # DIFF: class and mask tokens and bias tables are never decayed; the released pre-training codes decay some of them.
    groups = {}
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    for name, parameter in trainable:
        exempt = parameter.dim() <= 1 or name.endswith(("bias", "_token", "pos_embed", "bias_table", "_scale"))
        exempt = exempt or ".cpb_mlp." in name  # what makes the bias table of torchvision's Swin V2
        scale, decay = layer_scale(name), 0.0 if exempt else weight_decay
        new = {"params": [], "names": [], "lr_scale": scale, "weight_decay": decay}
        group = groups.setdefault((scale, decay), new)
        group["params"].append(parameter)
        group["names"].append(name)
    placed = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(placed) == sorted(id(p) for _, p in trainable) and len(set(placed)) == len(placed)
    return list(groups.values())


# -------------------- Before the loop: processes, device, precision, the run's folder --------------------


def start(cfg):
    """Choose device and precision and join the process group that torchrun's variables describe. Writes nothing.

    Returns a namespace: rank, world, main (is this rank 0?), device, dtype (of autocast), scaler, out (Path), and what
    `open_run` adds. Exits with code 2 on an option that this machine cannot honour.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    check(cfg, world)
    cuda = cfg.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 in what stays fp32; on a CPU this would mean bf16
    auto = "fp32" if not cuda else "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    precision = auto if cfg.precision == "auto" else cfg.precision
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    if world > 1 and not cfg.plan:
        timeout = datetime.timedelta(minutes=cfg.timeout_minutes)
        store, rank, world = next(rendezvous("env://", timeout=timeout))
        store = dist.PrefixStore(cfg.out, store)  # one command may make several runs; none must read another's keys
        dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=world, timeout=timeout)
    torch.manual_seed(cfg.seed)  # of the weights; whatever comes later draws from seed_of
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    return types.SimpleNamespace(rank=rank, world=world, main=rank == 0, device=device, dtype=dtype, scaler=scaler,
                                 out=Path(cfg.out), signal=0)


def require_two(model, sampler):
    """ValueError if BatchNorm, of a head or behind a map of one place, were to find the spread of a single number."""
    one_place = model.encoder.arch["img_size"] == [model.encoder.out_stride] * 2
    kinds = (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d) if one_place else (torch.nn.BatchNorm1d,)
    if sampler.smallest() < 2 and any(type(m) in kinds and m.training for m in model.train().modules()):
        raise ValueError("BatchNorm needs two images at once, and some process would hold one: a --micro_batch of 2 or "
                         "more, a larger --batch_size, or --drop_last true")


def open_run(cfg, run, model, optimizer, sampler, steps, **about):
    """Claim --out, load the checkpoint if --resume finds one, set up signals, log and progress bar.

    Returns the step to begin with. `about`, such as the resolved learning rate, is printed and kept in config.yaml.
    Exits with code 2 and leaves --out alone if it is used or not writable, or if the checkpoint does not fit.
    """
    with user_errors():
        require_two(model, sampler)
        saved = checkpoint.read_newest(run.out / "last.pt") if cfg.resume else None
        if saved is not None:
            checkpoint.require_run(saved, run.out / "last.pt")
            now, then = plain(fixed(cfg)), saved["config"]
            if changed := [f"--{k} was {then.get(k)} and is {now[k]}" for k in now if then.get(k) != now[k]]:
                raise ValueError(f"--resume with other options: {', '.join(changed)}; give those a new --out")
            checkpoint.load_exactly(model, saved["model"], run.out / "last.pt")
            checkpoint.load_optimizer(optimizer, saved["optimizer"], run.out / "last.pt")
            if saved["scaler"]:  # empty if what was saved ran in another precision, as auto may on another device
                run.scaler.load_state_dict(saved["scaler"])
        if steps < 1:
            raise ValueError(f"--epochs {cfg.epochs:g} of {sampler.steps_per_epoch} steps each make no step")
        if run.main:
            claim(cfg, run, saved, about)
    first = saved["step"] if saved else 0
    run.first = run.logged = first
    run.last = sampler.stop = min(cfg.max_steps or steps, steps)
    sampler.start = first
    run.images, run.loss, run.wait = 0, 0.0, 0.0  # since the last line of the log
    run.began = run.since = run.saved = time.monotonic()
    catch = lambda number, frame: interrupt(run, number)  # noqa: E731
    run.handlers = {number: signal.signal(number, catch) for number in (signal.SIGINT, signal.SIGTERM)}  # those before
    run.bar = tqdm(total=run.last, initial=first, disable=None if run.main else True, dynamic_ncols=True, unit="step")
    if run.main:
        share = cfg.batch_size // run.world
        parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        lines = {"parameters": f"{parameters / 1e6:.2f} M", "steps": f"{first} to {run.last} of {steps}", **about,
                 "batch": f"{cfg.batch_size} = {run.world} processes x {share}, {min(cfg.micro_batch, share)} a time",
                 "precision": f"{run.dtype} on {run.device}"}
        print("\n".join(f"{k.replace('_', ' '):>26}: {v}" for k, v in lines.items()), flush=True)
    return first


def interrupt(run, number):
    """The first Ctrl-C or SIGTERM makes the loop save and stop after the step it is in; a second one is not caught."""
    run.signal = number
    signal.signal(number, signal.SIG_DFL)
    if run.main:  # os.write: a print here could interrupt one, and wait for its lock
        os.write(1, b"\nstopping after this step, and saving; the same signal again stops at once and saves nothing\n")


def distribute(cfg, run, model):
    """The model that the loop calls: compiled if asked for, gradients averaged over processes if there are several."""
    if cfg.compile:
        model.compile()
    if run.world == 1:
        return model
    ids = [run.device.index] if run.device.type == "cuda" else None
    return torch.nn.parallel.DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)


# -------------------- Beside the loop --------------------


def timed(run, batches):
    """The same batches; the time spent waiting for them is counted in run.wait."""
    batches, done = iter(batches), object()
    while True:
        begin = time.monotonic()
        batch = next(batches, done)
        run.wait += time.monotonic() - begin
        if batch is done:
            return
        yield batch


def sync_on(last, net):
    """While gradients accumulate, processes exchange them once a step: in the backward of the last micro-batch."""
    return contextlib.nullcontext() if last or not hasattr(net, "no_sync") else net.no_sync()


def autocast(run):
    """Mixed precision for the forward pass, or nothing under fp32."""
    return torch.autocast(run.device.type, dtype=run.dtype, enabled=run.dtype != torch.float32)


def agree(run, loss, grad_norm):
    """(loss summed over processes, gradient norm, was any of them told to stop?) as plain numbers: one small exchange a
    step, in which the host waits for the GPU. All processes get the same answer and so leave the loop at the same step,
    be it for a signal or because one of them met a NaN."""
    numbers = torch.stack([loss.detach(), grad_norm / run.world, loss.new_tensor(run.signal > 0)]).double()
    if run.world > 1:
        dist.all_reduce(numbers)
    loss, grad_norm, told = numbers.tolist()
    return loss, grad_norm, told > 0


def leave_group():
    """Part from the other processes, if there are any: one that exits inside its group may abort instead."""
    if dist.is_initialized():
        dist.destroy_process_group()


def check_finite(run, step, lr, loss, grad_norm):
    """Stop before the optimizer carries a NaN into the weights. (Under fp16 an infinite gradient alone is ordinary: the
    scaler skips that update and lowers its scale.)"""
    if not math.isfinite(loss) or not (math.isfinite(grad_norm) or run.scaler.is_enabled()):
        leave_group()
        fail(f"step {step}: loss {loss}, gradient norm {grad_norm}, lr {lr:.3e}; this step changed nothing, and "
             f"{run.out / 'last.pt'} is as it was; try --precision bf16 or fp32, a lower --base_lr, --clip_grad 1")


def log(cfg, run, step, epoch, images, loss, lr, grad_norm):
    """Count a finished step; every `log_every` steps write a line to log.jsonl and to the terminal."""
    run.images, run.loss = run.images + images, run.loss + loss
    run.bar.update()
    done, now = step + 1, time.monotonic()
    if not run.main or (done % cfg.log_every and done < run.last):
        return
    rate, wait = run.images / (now - run.since), run.wait / (now - run.since)
    line = {"step": done, "epoch": round(epoch, 4), "loss": run.loss / (done - run.logged), "lr": lr,
            "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
            "images_per_s": round(rate, 1), "data_wait": round(wait, 3)}
    note(run, **line)
    run.bar.set_postfix(loss=f"{line['loss']:.4f}", lr=f"{lr:.1e}", images_s=f"{rate:.0f}", wait=f"{wait:.0%}")
    if run.bar.disable:  # not a terminal
        eta = datetime.timedelta(seconds=round((now - run.began) / (done - run.first) * (run.last - done)))
        print(f"step {done}/{run.last}  loss {line['loss']:.4f}  lr {lr:.2e}  {rate:.0f} images/s  "
              f"waiting for data {wait:.0%}  {eta} left", flush=True)
    if run.scaler.is_enabled() and run.scaler.get_scale() < 1:
        fail("fp16: the gradients overflow at a loss scale below 1; use --precision bf16 or fp32")
    run.images, run.loss, run.wait, run.since, run.logged = 0, 0.0, 0.0, now, done


def note(run, **line):
    """Append a line to log.jsonl."""
    if run.main:
        with user_errors(), open(run.out / "log.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")


def due(run, step, every):
    """Is it time, after this step, for what happens every so many steps (a float; 0 for never) and after the last?"""
    return (every > 0 and (step + 1) % max(1, round(every)) == 0) or step + 1 == run.last


def save_due(cfg, run, step, steps_per_epoch):
    """Checkpoints come every `save_epochs` epochs, every `save_minutes` minutes, and after the last step."""
    return due(run, step, cfg.save_epochs * steps_per_epoch) or time.monotonic() - run.saved > 60 * cfg.save_minutes


def save(cfg, run, done, model, optimizer, encoder=None, **more):
    """Write last.pt (all that a resumed run needs) and encoder.pt (all that fine-tuning needs, of `encoder`, or else of
    the model's, and `more`) after `done` steps."""
    run.saved = time.monotonic()
    if run.main:
        encoder = encoder or model.encoder
        encoder = {"arch": plain(encoder.arch), "model": encoder.state_dict()}
        last = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": run.scaler.state_dict()}
        with user_errors():
            checkpoint.write_together({
                run.out / "last.pt": {**last, "step": done, "config": plain(fixed(cfg))},
                run.out / "encoder.pt": {**encoder, "step": done, "method": type(model).__name__, **more}})


def finish(run, done):
    """Leave the process group; after a signal, say how to go on and exit with the code that shells expect, 128 + it.
    Returns one that came too late, in the last step, or 0."""
    run.bar.close()
    for number, handler in run.handlers.items():
        signal.signal(number, handler)
    if dist.is_initialized():  # which waits, too, for the main process to write what another one may go on to read
        told = torch.tensor(run.signal, device=run.device)
        dist.all_reduce(told, dist.ReduceOp.MAX)
        run.signal = int(told)
    leave_group()
    if done < run.last:
        if run.main:
            print(f"stopped after step {done} of {run.last} and saved; add --resume to go on", flush=True)
        raise SystemExit(128 + (run.signal or signal.SIGTERM))
    return run.signal
