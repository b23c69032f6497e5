"""What every script does before, beside and after its training loop.

A line that would change the loss, the gradient or the order of a step lives in the method file. What lives here is a
no-op on one GPU (no_sync), or runs once before or after the loop (set-up), or only looks on (statistics, log).
"""

import collections
import contextlib
import dataclasses
import datetime
import errno
import functools
import hashlib
import json
import math
import os
import platform
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import yaml
from torch.distributed.elastic.multiprocessing import errors
from torch.distributed.rendezvous import rendezvous
from tqdm import tqdm

from common import checkpoint, config, folder, jpeg, loggers, processes, transforms

FILES = ("config.yaml", "log.jsonl", "result.json", "last.pt", "encoder.pt", "previous.last.pt", "previous.encoder.pt",
         "refused.last.pt", "log.csv", "wandb_id.txt")


def record(main):
    """A `main` whose failure torchrun names, and with which its image-loading processes end, whatever ends it. Where
    memory or another process is gone, it ends in one line."""
    @errors.record
    @functools.wraps(main)
    def recorded(argv=None):
        try:
            return main(argv)
        except (MemoryError, RuntimeError) as error:
            fail_for_want(error, error.__traceback__.tb_next.tb_frame.f_locals)  # of `main`
            raise
        finally:
            processes.end_workers()

    return recorded


def fail_for_want(error, inside):
    """`config.fail` if an error says that there is no memory, or that another process of the run has ended. `inside`:
    what `main` had by then."""
    first_line = str(error).partition("\n")[0]
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in first_line:
        known = "cfg" in inside and "run" in inside
        what_to_try = advice(inside["cfg"], inside["run"].world_size) if known else \
            "; --plan prints how much a smaller --micro_batch, image or model needs"
        config.fail(f"not enough memory ({first_line or type(error).__name__}){what_to_try}", everywhere=True)
    if isinstance(error, dist.DistError) or "gloo" in first_line:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(2)  # torchrun ends this process, too; where nobody does, the line below says why it ends
        config.fail(f"another process of this run has ended, and says why: {first_line}")


def advice(cfg, world_size):
    """What to try when `cfg` needs more memory than there is."""
    share = cfg.batch_size // world_size
    used = min(cfg.micro_batch, share)
    smaller = [n for n in range(1, used // 2 + 1) if share % n == 0]
    what = f"--micro_batch {smaller[-1]}" if smaller else "--activation_checkpointing"
    return f" for --micro_batch {used}; try {what}"


class Run:
    """One run of a script: its processes, device, precision, folder, log and signals. Exits with code 2 on options that
    make no run here.

    rank, world_size, is_main: which of torchrun's processes this is; dtype: of autocast; scaler: of fp16; out: the
    run's folder; stop_requested: shall the loop end after this step, because some process caught a signal?
    """

    def __init__(self, cfg):
        self.cfg = cfg
        processes.end_with_torchrun()
        self.rank = int(os.environ.get("RANK", 0))
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        self.is_main = self.rank == 0
        with config.user_errors():
            if not cfg.data and not cfg.plan:
                raise ValueError("--data is required: shapes, cifar10, cifar100, torchvision:NAME or a folder")
            cfg.check()
            check_batch(cfg, self.world_size)
            loggers.require(cfg.logger)
            self.device, self.dtype = choose_device(cfg)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.out, self.lock = Path(cfg.out), folder.Lock(cfg.out)

        # The loop's progress; `begin` sets the first line
        self.start_step = self.last_step = self.num_steps = self.steps_per_epoch = self.steps_done = 0
        self.caught_signal, self.stop_requested = 0, False  # by this process, by any process
        self.previous_handlers, self.bar, self.batches, self.model = {}, None, None, None
        self.write_line, self.close_logger = None, None  # of --logger
        self.images_of_run, self.goes_on_from = {}, None  # see describe_images; the checkpoint that was loaded
        self.found_range = ()  # what --value_range would say, if the images said it
        self.logged_step, self.images, self.data_wait = 0, 0, 0.0  # since the last line of the log
        self.loss = math.nan  # of the last step
        self.sums = collections.Counter()  # since then: of the loss, and of its parts where it has several
        self.begin_time = self.log_time = self.save_time = time.monotonic()

        if self.world_size > 1 and not cfg.plan:
            timeout = datetime.timedelta(minutes=cfg.timeout_minutes)
            store, rank, world_size = next(rendezvous("env://", timeout=timeout))
            # One command may make several runs, and --max-restarts several attempts: none reads another's keys
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
            store = dist.PrefixStore(f"{attempt}/{cfg.out}", store)
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
        torch.manual_seed(cfg.seed)  # of the weights; whatever comes later draws from randomness.seed_of

    # -------------------- Before the loop
    def begin(self, model, optimizer, schedule, sampler, dataset, **about):
        """Make --out this run's folder, load the checkpoint if --resume finds one, print what the run is, set up
        signals and logger. Returns the step to begin with. `about` is printed and kept in config.yaml. ValueError or
        OSError, and --out is left alone, if it is used or not writable, or if the checkpoint does not fit."""
        self.found_range = () if self.cfg.value_range else getattr(dataset.source, "value_range", ())
        if self.found_range:  # whatever starts from this run sees numbers as it did, be its images darker or brighter
            self.cfg = dataclasses.replace(self.cfg, value_range=tuple(self.found_range))
        cfg = self.cfg
        require_two_images(model, sampler)
        if schedule.steps < 1:
            raise ValueError(f"--epochs {cfg.epochs:g} of {sampler.steps_per_epoch} steps each make no step")
        self.images_of_run = describe_images(dataset.source)
        self.steps_per_epoch = sampler.steps_per_epoch
        about = {"warmup": schedule.warmup_steps, "lr": schedule.peak_lr, **about}
        with self.lock if self.is_main else contextlib.nullcontext():
            saved = None
            if cfg.resume:
                restore = functools.partial(self.restore, model=model, optimizer=optimizer, schedule=schedule)
                saved = checkpoint.read_newest(self.out / "last.pt", restore)
            if self.is_main:
                self.take_folder(saved, {"images": len(dataset), **about})

        self.start_step = self.steps_done = self.logged_step = saved["step"] if saved else 0
        if saved and "sums" in saved:  # since the last line of the log; a file of an earlier version has none
            self.logged_step, self.sums = saved["logged_step"], collections.Counter(saved["sums"])
        self.num_steps = schedule.steps
        self.last_step = max(self.start_step, min(cfg.max_steps or schedule.steps, schedule.steps))
        self.previous_handlers = {n: signal.signal(n, self.catch) for n in (signal.SIGINT, signal.SIGTERM)}
        parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        share, micro_batch = cfg.batch_size // self.world_size, cfg.micro_batch
        classes = f" of {len(dataset.source.classes)} classes" if dataset.source.classes else ""
        head = {"method": type(model).__name__, "data": f"{cfg.data}, {len(dataset)} images{classes}",
                "model": f"{cfg.model}, images of {cfg.img_size[0]} x {cfg.img_size[1]} px",
                "parameters": f"{parameters / 1e6:.2f} M",
                "steps": f"{self.start_step} to {self.last_step} of {schedule.steps}", **about,
                "batch": f"{cfg.batch_size} = {self.world_size} processes x {share}, {min(micro_batch, share)} a time",
                "precision": f"{self.dtype} on {self.device}", "out": self.out}
        for name, value in head.items():
            config.print_once(f"{name.replace('_', ' '):>26}: {value}")
        if self.start_step >= self.last_step:
            config.print_once(f"nothing is left to train: the run in {self.out} has done {self.start_step} steps")
        if self.is_main:
            options = config.to_plain(dataclasses.asdict(cfg))
            self.write_line, self.close_logger = loggers.open_logger(cfg.logger, self.out, self.start_step, options)
        self.model = model
        return self.start_step

    def restore(self, saved, path, model, optimizer, schedule):
        """Copy `saved`, the last.pt at `path`, into model, optimizer and scaler. ValueError if it is none of this run;
        its subclass OtherRun if it is one of other options or images."""
        checkpoint.require_run(saved, path)
        then = {**type(self.cfg)().fixed_options(), **saved["config"]}  # an option newer than the file had its default
        now = self.cfg.fixed_options()
        if self.found_range and not then["value_range"]:  # a file of an earlier version, which found it, too
            then["value_range"] = now["value_range"]
        changed = [f"--{name} was {then[name]} and is {value}" for name, value in now.items() if then[name] != value]
        unknown = sorted(saved["config"].keys() - now.keys())
        if changed and unknown:
            raise checkpoint.OtherRun(f"{path} is of another script, which has --{unknown[0]}; give this run a new "
                                      "--out")
        if changed:
            raise checkpoint.OtherRun(f"--resume with other options: {', '.join(changed)}; give those a new --out")
        images = saved.get("images", self.images_of_run)
        if images != self.images_of_run:
            number, number_then = self.images_of_run["number"], images.get("number")
            then = "other ones" if number == number_then else number_then
            raise checkpoint.OtherRun(f"--resume with other images: --data {self.cfg.data} holds {number} of them, and "
                                      f"held {then} when this run began; give those a new --out")
        steps_then = saved.get("steps_per_epoch", self.steps_per_epoch)
        if steps_then != self.steps_per_epoch:
            raise checkpoint.OtherRun(f"--resume with {self.world_size} process(es), whose epochs have "
                                      f"{self.steps_per_epoch} steps, and had {steps_then} when this run began: with "
                                      "--drop_last false that depends on their number; take as many as then")
        if saved["step"] > schedule.steps:
            raise ValueError(f"{path} is of step {saved['step']} in a run of {schedule.steps}")
        checkpoint.load_exactly(model, saved["model"], path)
        has_skipped = saved["scaler"] and not saved["optimizer"].get("state")  # fp16 may skip all of its first steps
        checkpoint.load_optimizer(optimizer, saved["optimizer"], path, 0 if has_skipped else saved["step"])
        checkpoint.load_scaler(self.scaler, saved["scaler"], path)
        self.goes_on_from = path

    def take_folder(self, saved=None, about=None):
        """Make --out this run's folder, until it ends, and write config.yaml: the resolved options, versions and git
        commit. ValueError or OSError before anything is removed, see `require_usable`, or if it cannot be written."""
        with self.lock:
            used = self.require_usable(saved)
            for part in [part for name in FILES for part in self.out.glob(f"{name}*.tmp")]:
                part.unlink()  # of a run that was killed while it saved
            last = self.out / "last.pt"
            if saved:
                self.shorten_log(saved["step"])
                if self.goes_on_from != last and last.exists():  # or else it would take the place of its predecessor
                    os.replace(last, self.out / "refused.last.pt")
            else:
                for path in used:
                    path.unlink()
            origin = {"command": " ".join(sys.argv), "commit": config.git_commit(), "torch": str(torch.__version__),
                      "python": platform.python_version(), "device": str(self.device), "dtype": str(self.dtype),
                      "processes": self.world_size, "jpeg": jpeg.decoder(), **(about or {})}
            content = config.to_plain({**dataclasses.asdict(self.cfg), "run": origin})
            folder.write_text(self.out / "config.yaml", yaml.safe_dump(content, sort_keys=False))

    def require_usable(self, saved):
        """The files of a run that --out holds. ValueError if neither --resume nor --overwrite says what to do with
        them, if this run starts from some, or evaluates alone and would remove weights, or if some lead elsewhere."""
        cfg, out = self.cfg, self.out
        used = [out / name for name in FILES if os.path.lexists(out / name)]
        has_weights = any(path.suffix == ".pt" for path in used)  # --resume does not begin anew over weights
        may_begin = saved or cfg.overwrite or (cfg.resume and not has_weights)
        if used and not may_begin:
            raise ValueError(f"--out {out} holds a run: --resume goes on, --overwrite replaces it, or name another")
        if has_weights and cfg.evaluates_only():
            raise ValueError(f"--out {out} holds the weights of a run, and an evaluation has none: name another")
        sources = [Path(getattr(cfg, name, "none")).resolve() for name in ("init", "teacher")]
        if not saved and any(path.resolve() in sources for path in used):
            raise ValueError(f"--out {out} holds what this run starts from, or would replace it: name another")
        for path in [out / "pictures", *(used if saved else ())]:
            folder.require_no_link(path)
        return used

    def shorten_log(self, step):
        """Remove what the log holds beyond a checkpoint: those steps will be done and written again."""
        path, kept = self.out / "log.jsonl", []
        for line in path.read_bytes().splitlines() if path.exists() else []:
            with contextlib.suppress(ValueError, TypeError, KeyError):  # half a line, as a power cut leaves it
                if json.loads(line)["step"] <= step:
                    kept.append(line.decode() + "\n")
        folder.write_text(path, "".join(kept))

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
            config.print_once("compiling, with the first step: this may take minutes")
        if self.world_size == 1:
            return model
        # Without device_ids, inputs stay where they are: noise for stochastic depth may be on the CPU.
        return torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)

    # -------------------- Beside the loop
    def timed(self, batches):
        """The same batches; the time spent waiting for them is counted for the log. The progress bar begins here."""
        self.bar = tqdm(total=self.last_step, initial=self.start_step, disable=None if self.is_main else True,
                        dynamic_ncols=True, unit="step", desc="compiling" if self.cfg.compile else None)
        self.begin_time = self.log_time = self.save_time = time.monotonic()
        self.batches = self.count_waiting(batches)
        return self.batches

    def count_waiting(self, batches):
        with contextlib.closing(batches):
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
        caught = torch.full_like(loss, self.caught_signal > 0)
        numbers = torch.stack([loss.detach(), grad_norm / self.world_size, caught])
        if self.world_size > 1:
            numbers = numbers.double()  # which mps, of one process, does not have
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
        self.steps_done, self.loss = step + 1, loss
        self.images += batch_size
        self.sums["loss"] += loss
        for name, term in getattr(self.model, "terms", {}).items():  # of this process's last micro-batch
            self.sums[name] += term
        self.bar.set_description(None, refresh=False)  # nothing is compiling any more
        self.bar.update()
        if not self.is_main or (self.steps_done % self.cfg.log_every and self.steps_done < self.last_step):
            return

        now = time.monotonic()
        images_per_s, waiting = self.images / (now - self.log_time), self.data_wait / (now - self.log_time)
        num_steps = self.steps_done - self.logged_step
        terms = {name: float(total) / num_steps for name, total in self.sums.items()}
        mean_loss = terms.pop("loss")
        self.note(step=self.steps_done, epoch=round(self.steps_done / self.steps_per_epoch, 4), loss=mean_loss, lr=lr,
                  grad_norm=grad_norm if math.isfinite(grad_norm) else None,
                  images_per_s=round(images_per_s, 1), data_wait=round(waiting, 3), **terms)
        per_step = (now - self.begin_time) / (self.steps_done - self.start_step)
        left = datetime.timedelta(seconds=round(per_step * (self.last_step - self.steps_done)))
        averaged, rate = f"loss {mean_loss:.4f} (mean of {num_steps} steps)", f"{images_per_s:.0f} images/s"
        self.bar.set_postfix_str(f"{averaged}, {rate}")
        self.bar.write(f"step {self.steps_done}/{self.last_step}  {averaged}  lr {lr:.2e}  {rate}  "
                       f"waiting for data {waiting:.0%}  {left} left")
        sys.stdout.flush()
        if self.scaler.is_enabled() and self.scaler.get_scale() < 1:
            config.fail("fp16: the gradients overflow at a loss scale below 1; use --precision bf16 or fp32")
        self.logged_step, self.images, self.data_wait = self.steps_done, 0, 0.0
        self.log_time = now
        self.sums.clear()

    def note(self, **line):
        """Append a line to log.jsonl."""
        if not self.is_main:
            return
        path, content = self.out / "log.jsonl", (json.dumps(line) + "\n").encode()
        with config.user_errors(), open(path, "ab", buffering=0, opener=folder.no_links) as file:
            size = file.tell()
            try:
                if file.write(content) < len(content):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError as error:  # the disk is full: no half a line
                file.truncate(size)
                error.filename = str(path)
                raise
            if self.write_line:
                self.write_line(line)

    def write_result(self, result, about, scores):
        """Write OUT/result.json and, of a run that has trained, the scores in it as a line of the log."""
        folder.write_text(self.out / "result.json", json.dumps({**about, **result}, indent=1) + "\n")
        if self.steps_done > self.start_step:
            self.note(**about, **scores)

    def due(self, step, epochs):
        """Is it time, after this step, for what happens every so many epochs (0 for never) and after the last step?"""
        every = max(1, round(epochs * self.steps_per_epoch))
        return (epochs > 0 and (step + 1) % every == 0) or step + 1 == self.last_step

    def picture_due(self, step):
        """Every `picture_epochs`, after the last step and, if more than one is drawn, after the first one, too: where
        the learning rate warms up from 0, that shows the network before it has learned."""
        is_first = step == 0 and 0 < self.cfg.picture_epochs <= self.cfg.epochs
        return self.is_main and (is_first or self.due(step, self.cfg.picture_epochs))

    def picture_title(self, step):
        """Method, ratios, step and its loss."""
        ratios = [f"{name} {value:g}" for name, value in vars(self.cfg).items() if name.endswith("_ratio") and value]
        about = [type(self.model).__name__, *ratios, f"step {step + 1}", f"loss {self.loss:.4f}"]
        return ", ".join(about)

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
        encoder = encoder or model.encoder
        last = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": self.scaler.state_dict(),
                "step": step + 1, "config": self.cfg.fixed_options(), "images": self.images_of_run,
                "steps_per_epoch": self.steps_per_epoch, "logged_step": self.logged_step,
                "sums": {name: float(total) for name, total in self.sums.items()}}
        images = transforms.about_images(encoder.arch["in_chans"], self.cfg)
        weights = {"arch": config.to_plain(encoder.arch), "model": encoder.state_dict(), "step": step + 1,
                   "method": type(model).__name__, **images, **more}
        if name := checkpoint.first_not_finite({"last.pt": last, "encoder.pt": weights}):  # on all processes alike
            leave_processes()
            config.fail(f"step {step} left values that are not finite ({name}): nothing was saved, and what was saved "
                        "before is as it was; try --precision bf16 or fp32, a lower --base_lr, --clip_grad 1")
        if self.is_main:
            with config.user_errors():
                checkpoint.write_together({self.out / "last.pt": last, self.out / "encoder.pt": weights})

    # -------------------- After the loop
    def finish(self):
        """Leave the process group, and print what to type next; if the loop was left early, that is how to go on, and
        the exit code is 128 + the signal."""
        self.bar.close()
        self.batches.close()
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)
        if self.close_logger:
            self.close_logger()
        self.lock.release()
        if self.world_size > 1:  # any process may have caught it; and all wait until the main one has written
            caught = torch.tensor(self.caught_signal, device=self.device)
            dist.all_reduce(caught, dist.ReduceOp.MAX)
            self.caught_signal = int(caught)
        leave_processes()
        if self.steps_done < self.last_step:
            done = f"{self.steps_done} of {self.last_step}"
            config.print_once(f"stopped after step {done} and saved; this goes on:\n  {command_again(self.world_size)}")
            raise SystemExit(128 + (self.caught_signal or signal.SIGTERM))
        if self.is_main:
            shown = [name for name in ("encoder.pt", "last.pt", "log.jsonl", "log.csv", "result.json", "pictures/")
                     if (self.out / name).exists()]
            config.print_once(f"{self.out} holds {', '.join(shown)}; next:")
            if self.last_step < self.num_steps:
                again = command_again(self.world_size, to_the_end=True)
                config.print_once(f"  {again}    # up to step {self.num_steps}")
            for words in self.cfg.next_commands():
                config.print_once(f"  {config.typed(words)}")


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
    if cfg.device == "mps" and not torch.backends.mps.is_available():
        raise ValueError("--device mps, but torch sees no GPU of a Mac; --device cpu runs everywhere")
    if cfg.device == "mps" and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("--device mps is one GPU, and takes one process: start without torchrun")
    if cfg.device == "mps" and cfg.precision == "bf16" and not torch.amp.is_autocast_available("mps"):
        raise ValueError("--precision bf16: this version of torch has none for mps; fp32 runs everywhere")
    uses_cuda = has_cuda and cfg.device in ("auto", "cuda")
    if cfg.precision == "fp16" and not uses_cuda:
        raise ValueError("--precision fp16 needs a GPU of --device cuda; others take bf16 or fp32")
    device, automatic = torch.device("mps" if cfg.device == "mps" else "cpu"), "fp32"
    if uses_cuda:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 in what stays fp32; on a CPU this would mean bf16
        automatic = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    precision = automatic if cfg.precision == "auto" else cfg.precision
    return device, {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]


def command_again(world_size, to_the_end=False):
    """The command that started this process, or torchrun, with --resume and, `to_the_end`, without --max_steps."""
    words = [word for word in sys.orig_argv[1:] if word != "-u"]
    words = config.without(words, ["overwrite", "resume", *["max_steps"] * to_the_end])
    words.append("--resume")
    if to_the_end and any(word.partition("=")[0] == "--config" for word in words):
        words += ["--max_steps", 0]  # the recipe may have one, too
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return config.typed(words)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    nodes = ["--nnodes", world_size // local, "..."] if world_size > local else []
    return config.typed(["--nproc-per-node", local, *nodes, *words], "torchrun")


def describe_images(source):
    """Number and hash of the files of a source, or, where it has none, of its labels."""
    names = np.asarray(getattr(source, "paths", ()))
    digest = hashlib.blake2b(names.tobytes() + np.asarray(source.labels).tobytes(), digest_size=16)
    return {"number": len(source), "hash": digest.hexdigest()}


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
