"""What every script does before, beside and after its training loop.

A line that would change the loss, the gradient or the order of a step lives in the method file. What lives here is a
no-op on one GPU (no_sync), or runs once before or after the loop (set-up), or only looks on (statistics, log).
"""

import atexit
import collections
import contextlib
import dataclasses
import datetime
import json
import math
import os
import platform
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import yaml
from torch.distributed.elastic.multiprocessing.errors import record  # noqa: F401  names the failed worker to torchrun
from torch.distributed.rendezvous import rendezvous
from tqdm import tqdm

from common import checkpoint, config

FILES = ("config.yaml", "log.jsonl", "result.json", "last.pt", "encoder.pt", "previous.last.pt", "previous.encoder.pt")


class Run:
    """One run of a script: its processes, device, precision, folder, log and signals. Exits with code 2 on options that
    make no run here.

    rank, world_size, is_main: which of torchrun's processes this is; dtype: of autocast; scaler: of fp16; out: the
    run's folder; stop_requested: shall the loop end after this step, because some process caught a signal?
    """

    def __init__(self, cfg):
        self.cfg = cfg
        self.rank = int(os.environ.get("RANK", 0))
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        self.is_main = self.rank == 0
        with config.user_errors():
            if not cfg.data and not cfg.plan:
                raise ValueError("--data is required: shapes, cifar10, cifar100 or a folder; a recipe may set it")
            cfg.check()
            check_batch(cfg, self.world_size)
            self.device, self.dtype = choose_device(cfg)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.out = Path(cfg.out)

        # The loop's progress; `begin` sets the first line
        self.start_step = self.last_step = self.steps_per_epoch = self.steps_done = 0
        self.caught_signal, self.stop_requested = 0, False  # by this process, by any process
        self.previous_handlers, self.bar, self.batches = {}, None, None
        self.logged_step, self.images, self.loss_sum, self.data_wait = 0, 0, 0.0, 0.0  # since the last line of the log
        self.term_sums = collections.Counter()  # of the parts of a loss that has several
        self.begin_time = self.log_time = self.save_time = time.monotonic()

        if self.world_size > 1 and not cfg.plan:
            timeout = datetime.timedelta(minutes=cfg.timeout_minutes)
            store, rank, world_size = next(rendezvous("env://", timeout=timeout))
            store = dist.PrefixStore(cfg.out, store)  # one command may make several runs; none reads another's keys
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
        torch.manual_seed(cfg.seed)  # of the weights; whatever comes later draws from randomness.seed_of

    # -------------------- Before the loop
    def begin(self, model, optimizer, schedule, sampler, **about):
        """Make --out this run's folder, load the checkpoint if --resume finds one, set up signals and progress bar.
        Returns the step to begin with. `about` is printed and kept in config.yaml. ValueError or OSError, and --out is
        left alone, if it is used or not writable, or if the checkpoint does not fit."""
        cfg = self.cfg
        require_two_images(model, sampler)
        if schedule.steps < 1:
            raise ValueError(f"--epochs {cfg.epochs:g} of {sampler.steps_per_epoch} steps each make no step")
        saved = checkpoint.read_newest(self.out / "last.pt") if cfg.resume else None
        if saved is not None:
            self.restore(saved, model, optimizer)
        about = {"warmup": schedule.warmup_steps, "lr": schedule.peak_lr, **about}
        if self.is_main:
            self.take_folder(saved, about)

        self.start_step = self.steps_done = self.logged_step = saved["step"] if saved else 0
        self.last_step = min(cfg.max_steps or schedule.steps, schedule.steps)
        self.steps_per_epoch = sampler.steps_per_epoch
        self.previous_handlers = {n: signal.signal(n, self.catch) for n in (signal.SIGINT, signal.SIGTERM)}
        parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        share, micro_batch = cfg.batch_size // self.world_size, cfg.micro_batch
        head = {"parameters": f"{parameters / 1e6:.2f} M",
                "steps": f"{self.start_step} to {self.last_step} of {schedule.steps}", **about,
                "batch": f"{cfg.batch_size} = {self.world_size} processes x {share}, {min(micro_batch, share)} a time",
                "precision": f"{self.dtype} on {self.device}"}
        for name, value in head.items():
            config.print_once(f"{name.replace('_', ' '):>26}: {value}")
        self.bar = tqdm(total=self.last_step, initial=self.start_step, disable=None if self.is_main else True,
                        dynamic_ncols=True, unit="step")
        self.begin_time = self.log_time = self.save_time = time.monotonic()
        self.model = model
        return self.start_step

    def restore(self, saved, model, optimizer):
        """Copy a last.pt into model, optimizer and scaler. ValueError if it is of other options or sizes."""
        path = self.out / "last.pt"
        checkpoint.require_run(saved, path)
        then = {**type(self.cfg)().fixed_options(), **saved["config"]}  # an option newer than the file had its default
        now = self.cfg.fixed_options()
        changed = [f"--{name} was {then[name]} and is {value}" for name, value in now.items() if then[name] != value]
        if changed:
            raise ValueError(f"--resume with other options: {', '.join(changed)}; give those a new --out")
        checkpoint.load_exactly(model, saved["model"], path)
        checkpoint.load_optimizer(optimizer, saved["optimizer"], path)
        if saved["scaler"]:  # empty if what was saved ran in another precision, as auto may on another device
            self.scaler.load_state_dict(saved["scaler"])

    def take_folder(self, saved=None, about=None):
        """Make --out this run's folder and write config.yaml: the resolved options, versions and git commit. Before
        anything is removed, ValueError if it holds a run that neither --resume nor --overwrite says what to do with, or
        weights that would be lost: those that this run starts from, or any, if it evaluates alone; OSError if it cannot
        be written."""
        cfg, out = self.cfg, self.out
        if out.exists() and not out.is_dir():
            raise ValueError(f"--out {out} is a file")
        used = [out / name for name in FILES if (out / name).exists()]
        has_weights = any(path.suffix == ".pt" for path in used)  # --resume does not begin anew over weights
        may_begin = saved or cfg.overwrite or (cfg.resume and not has_weights)
        if used and not may_begin:
            raise ValueError(f"--out {out} holds a run: --resume goes on, --overwrite replaces it, or name another")
        if has_weights and cfg.evaluates_only():
            raise ValueError(f"--out {out} holds the weights of a run, and an evaluation has none: name another")
        sources = [Path(getattr(cfg, name, "none")).resolve() for name in ("init", "teacher")]
        if not saved and any(path.resolve() in sources for path in used):
            raise ValueError(f"--out {out} holds what this run starts from, or would replace it: name another")

        out.mkdir(parents=True, exist_ok=True)
        (out / ".writable").write_text("yes")
        (out / ".writable").unlink()
        if saved:
            self.shorten_log(saved["step"])
        else:
            for path in used:
                path.unlink()
        origin = {"command": " ".join(sys.argv), "commit": config.git_commit(), "torch": str(torch.__version__),
                  "python": platform.python_version(), "device": str(self.device), "dtype": str(self.dtype),
                  "processes": self.world_size, **(about or {})}
        content = config.to_plain({**dataclasses.asdict(cfg), "run": origin})
        (out / "config.yaml").write_text(yaml.safe_dump(content, sort_keys=False))

    def shorten_log(self, step):
        """Remove what the log holds beyond a checkpoint: those steps will be done and written again."""
        path, kept = self.out / "log.jsonl", []
        for line in path.read_text().splitlines(keepends=True) if path.exists() else []:
            with contextlib.suppress(json.JSONDecodeError):  # half a line, as a power cut leaves it
                if json.loads(line)["step"] <= step:
                    kept.append(line)
        path.write_text("".join(kept))

    def catch(self, number, frame):
        """The first Ctrl-C or SIGTERM makes the loop save and stop after its step; a second is not caught."""
        self.caught_signal = number
        signal.signal(number, signal.SIG_DFL)
        if self.is_main:  # os.write: a print here could interrupt one, and wait for its lock
            os.write(1, b"\nstopping after this step, and saving; "
                        b"the same signal again stops at once and saves nothing\n")

    def distribute(self, model):
        """The model that the loop calls: compiled if asked for, its gradients averaged over processes."""
        if self.cfg.compile:
            model.compile()
        if self.world_size == 1:
            return model
        device_ids = [self.device.index] if self.device.type == "cuda" else None
        return torch.nn.parallel.DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)

    # -------------------- Beside the loop
    def timed(self, batches):
        """The same batches; the time spent waiting for them is counted for the log. They end with the run, whatever
        ends it: image-loading processes do not listen to signals, and would be waited for."""
        self.batches = self.count_waiting(batches)
        atexit.register(self.batches.close)
        return self.batches

    def count_waiting(self, batches):
        begin = time.monotonic()
        for batch in batches:
            self.data_wait += time.monotonic() - begin
            yield batch
            begin = time.monotonic()

    def sync_gradients(self, net, is_last):
        """While gradients accumulate, processes exchange them once a step: in the backward of the last micro-batch."""
        return contextlib.nullcontext() if is_last or self.world_size == 1 else net.no_sync()

    def autocast(self):
        """Mixed precision for the forward pass, or nothing under fp32."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def all_reduce_stats(self, step, lr, loss, grad_norm):
        """(loss summed over processes, gradient norm) as plain numbers: the one exchange of a step. All processes get
        the same numbers and the same `stop_requested`, and so leave the loop at the same step. A NaN of any process
        exits with code 2 before the optimizer carries it into the weights. (Under fp16 an infinite gradient alone is
        ordinary: the scaler skips the update.)"""
        caught = loss.new_tensor(self.caught_signal > 0)
        numbers = torch.stack([loss.detach(), grad_norm / self.world_size, caught]).double()
        if self.world_size > 1:
            dist.all_reduce(numbers)
        loss, grad_norm, caught = numbers.tolist()
        self.stop_requested = caught > 0
        if not math.isfinite(loss) or not (math.isfinite(grad_norm) or self.scaler.is_enabled()):
            leave_processes()
            config.fail(f"step {step}: loss {loss}, gradient norm {grad_norm}, lr {lr:.3e}; this step changed nothing, "
                        f"and {self.out / 'last.pt'} is as it was; try --precision bf16 or fp32, a lower --base_lr, "
                        "--clip_grad 1")
        return loss, grad_norm

    def log(self, step, batch_size, loss, lr, grad_norm):
        """Count a finished step; every `log_every` steps write a line to log.jsonl and to the terminal."""
        self.steps_done = step + 1
        self.images += batch_size
        self.loss_sum += loss
        for name, term in getattr(self.model, "terms", {}).items():  # of this process's last micro-batch
            self.term_sums[name] += term
        self.bar.update()
        if not self.is_main or (self.steps_done % self.cfg.log_every and self.steps_done < self.last_step):
            return

        now = time.monotonic()
        images_per_s, waiting = self.images / (now - self.log_time), self.data_wait / (now - self.log_time)
        num_steps = self.steps_done - self.logged_step
        mean_loss = self.loss_sum / num_steps
        terms = {name: float(total) / num_steps for name, total in self.term_sums.items()}
        self.note(step=self.steps_done, epoch=round(self.steps_done / self.steps_per_epoch, 4), loss=mean_loss, lr=lr,
                  grad_norm=grad_norm if math.isfinite(grad_norm) else None,
                  images_per_s=round(images_per_s, 1), data_wait=round(waiting, 3), **terms)
        rate, wait = f"{images_per_s:.0f}", f"{waiting:.0%}"
        self.bar.set_postfix(loss=f"{mean_loss:.4f}", lr=f"{lr:.1e}", images_s=rate, wait=wait)
        if self.bar.disable:  # not a terminal
            per_step = (now - self.begin_time) / (self.steps_done - self.start_step)
            left = datetime.timedelta(seconds=round(per_step * (self.last_step - self.steps_done)))
            print(f"step {self.steps_done}/{self.last_step}  loss {mean_loss:.4f}  lr {lr:.2e}  {rate} images/s  "
                  f"waiting for data {wait}  {left} left", flush=True)
        if self.scaler.is_enabled() and self.scaler.get_scale() < 1:
            config.fail("fp16: the gradients overflow at a loss scale below 1; use --precision bf16 or fp32")
        self.logged_step, self.images, self.loss_sum, self.data_wait = self.steps_done, 0, 0.0, 0.0
        self.log_time = now
        self.term_sums.clear()

    def note(self, **line):
        """Append a line to log.jsonl."""
        if self.is_main:
            with config.user_errors(), open(self.out / "log.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")

    def due(self, step, epochs):
        """Is it time, after this step, for what happens every so many epochs (0 for never) and after the last step?"""
        every = max(1, round(epochs * self.steps_per_epoch))
        return (epochs > 0 and (step + 1) % every == 0) or step + 1 == self.last_step

    def picture_due(self, step):
        return self.is_main and self.due(step, self.cfg.picture_epochs)

    def picture_path(self, step):
        return self.out / "pictures" / f"step_{step + 1:07d}.png"

    def probe_due(self, step):
        return self.cfg.probe_epochs > 0 and self.due(step, self.cfg.probe_epochs)

    def save_due(self, step):
        """Checkpoints come every `save_epochs` and `save_minutes`, after the last step, and after a signal."""
        minutes = (time.monotonic() - self.save_time) / 60
        return self.stop_requested or self.due(step, self.cfg.save_epochs) or minutes > self.cfg.save_minutes

    def save(self, step, model, optimizer, encoder=None, **more):
        """Write last.pt, to resume from, and encoder.pt, to fine-tune: `encoder`, or else the model's, and `more`."""
        self.save_time = time.monotonic()
        if not self.is_main:
            return
        encoder = encoder or model.encoder
        last = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": self.scaler.state_dict(),
                "step": step + 1, "config": self.cfg.fixed_options()}
        weights = {"arch": config.to_plain(encoder.arch), "model": encoder.state_dict(), "step": step + 1,
                   "method": type(model).__name__, **more}
        with config.user_errors():
            checkpoint.write_together({self.out / "last.pt": last, self.out / "encoder.pt": weights})

    # -------------------- After the loop
    def finish(self):
        """Leave the process group; if the loop was left early, print how to go on and exit with 128 + the signal."""
        self.bar.close()
        self.batches.close()
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)
        if self.world_size > 1:  # any process may have caught it; and all wait until the main one has written
            caught = torch.tensor(self.caught_signal, device=self.device)
            dist.all_reduce(caught, dist.ReduceOp.MAX)
            self.caught_signal = int(caught)
        leave_processes()
        if self.steps_done < self.last_step:
            done = f"{self.steps_done} of {self.last_step}"
            config.print_once(f"stopped after step {done} and saved; add --resume to go on")
            raise SystemExit(128 + (self.caught_signal or signal.SIGTERM))


# ---------------------------------------- What Run is made of

def check_batch(cfg, world_size):
    """ValueError unless processes and micro-batches divide the batch. (An evaluation has none.)"""
    if cfg.evaluates_only():
        return
    share, rest = divmod(cfg.batch_size, world_size)
    if rest:
        raise ValueError(f"--batch_size {cfg.batch_size} is not divisible by {world_size} processes")
    if share % min(cfg.micro_batch, share):
        fits = max(n for n in range(1, min(cfg.micro_batch, share) + 1) if share % n == 0)
        raise ValueError(f"--micro_batch {cfg.micro_batch} does not divide the {share} images of --batch_size that "
                         f"each of {world_size} process(es) holds; --micro_batch {fits} does")


def choose_device(cfg):
    """(device, dtype of autocast). ValueError if this machine lacks what the options ask for."""
    has_cuda = torch.cuda.is_available()
    if cfg.device == "cuda" and not has_cuda:
        raise ValueError("--device cuda, but torch sees no GPU; --device cpu runs everywhere")
    if cfg.precision == "fp16" and (cfg.device == "cpu" or not has_cuda):
        raise ValueError("--precision fp16 needs a GPU; a CPU takes bf16 or fp32")
    device, automatic = torch.device("cpu"), "fp32"
    if has_cuda and cfg.device != "cpu":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 in what stays fp32; on a CPU this would mean bf16
        automatic = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    precision = automatic if cfg.precision == "auto" else cfg.precision
    return device, {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]


def require_two_images(model, sampler):
    """ValueError if BatchNorm, of a head or behind a map of one place, were to find the spread of a single number."""
    one_place = model.encoder.arch["img_size"] == [model.encoder.out_stride] * 2
    kinds = (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d) if one_place else (torch.nn.BatchNorm1d,)
    normalizes = any(type(module) in kinds and module.training for module in model.train().modules())
    if normalizes and sampler.smallest() < 2:
        raise ValueError("BatchNorm needs two images at once, and some process would hold one: a --micro_batch of 2 or "
                         "more, a larger --batch_size, or --drop_last true")


def leave_processes():
    """Part from the other processes: one that exits inside its group may abort instead."""
    if dist.is_initialized():
        dist.destroy_process_group()
