r"""FastMIM-P: FastMIM in phases, each on larger images than the one before (FastMIM, 4.2).

    python -m tools.fastmim_p --sizes 128,160,192 --epochs 200,100,100 --out runs/fastmim_p_swin_l \
        --nproc-per-node 8 -- --config configs/fastmim_p_swin_l.yaml --data /data/imagenet

Prints and runs one command of fastmim.py for each phase, which starts from the weights of the phase before. What stands
behind -- goes to every phase. Runs lie in OUT/phase1_128px, ...; the encoder is that of the last one.
"""

import argparse
import dataclasses
import os
import shlex
import signal
import subprocess
import sys
import types
from pathlib import Path

import torch

import data
import fastmim
from common import checkpoint, config, engine, optim, randomness


def phases_of(args, words):
    """([words of each phase's command, behind "fastmim.py"], number of the phase to begin with, from 0). ValueError if
    numbers do not fit, or if OUT holds phases and there is no --resume."""
    cfg = config.parse(fastmim.Config, fastmim.__doc__, words)
    sizes = [config.parse_value("sizes", config.Size, size) for size in args.sizes.split(",")]
    epochs = args.epochs.split(",")
    batches = args.batches.split(",") if args.batches else [cfg.batch_size] * len(sizes)
    if not len(sizes) == len(epochs) == len(batches):
        raise ValueError("--sizes, --epochs and --batches hold one number for every phase")
    if not all(0 < side < 2**16 for size in sizes for side in size):
        raise ValueError(f"--sizes {args.sizes}: no such images")
    if cfg.overwrite:
        raise ValueError("--overwrite knows one phase alone: remove what --out holds, or name another")

    names = [f"{h}" if h == w else f"{h}x{w}" for h, w in sizes]
    outs = [Path(args.out) / f"phase{i}_{name}px" for i, name in enumerate(names, 1)]
    begun = [i for i, out in enumerate(outs) if checkpoint.exists(out / "last.pt")]
    if begun and not (cfg.resume or cfg.plan):
        raise ValueError(f"--out {args.out} holds {outs[begun[0]].name}: --resume goes on, or name another")
    first = begun[-1] if begun and cfg.resume else 0  # those before it have ended

    # DIFF: FastMIM-P's paper does not say how schedule and optimizer go from phase to phase. Here both start anew:
    # resized tables have no moments, batch and learning rate may change, and every phase ends with a usable encoder.
    phases = []
    for i, (h, w) in enumerate(sizes):
        # DIFF: Swin's windows grow with the images (8, 10, 12 at 128, 160, 192 px); the paper resizes those of 14.
        window = max(1, round(cfg.window * min(h, w) / min(sizes[0])))
        seed = randomness.seed_of(cfg.seed, "phase", i)  # other orders, crops and masks than in the phase before
        phase = [*words, "--img_size", names[i], "--window", window, "--epochs", epochs[i], "--batch_size", batches[i],
                 "--seed", seed, "--out", outs[i]]
        if i and begun and i == first:  # under the name that it had when the run began, for OUT may have moved
            saved = checkpoint.read_newest(outs[i] / "last.pt")
            checkpoint.require_run(saved, outs[i] / "last.pt")
            phase += ["--init", saved["config"].get("init")]
        elif i:
            phase += ["--init", outs[i - 1] / "last.pt"]
        phases.append([str(word) for word in phase])
    return phases, first


def check(phases, world_size):
    """ValueError, OSError or exit code 2 before the first phase begins if a later one cannot."""
    configs = [config.parse(fastmim.Config, fastmim.__doc__, words) for words in phases]
    for cfg in configs:
        cfg.check()
        engine.check_batch(cfg, world_size)
        with torch.device("meta"):
            fastmim.FastMIM(dataclasses.replace(cfg, plan=True))
    num_images, process = len(data.pretrain_set(configs[0])), types.SimpleNamespace(rank=0, world_size=1)
    for i, cfg in enumerate(configs):
        steps_per_epoch = data.global_batches(num_images, cfg, process).steps_per_epoch
        if optim.Schedule(cfg, steps_per_epoch).steps < 1:
            raise ValueError(f"phase {i + 1} of {len(configs)} makes no step: more --epochs")


def run(command):
    """Run a command and pass signals on to it. Returns its exit code, or 128 + number of a signal."""
    received = []
    process = subprocess.Popen(command, start_new_session=True)  # where Ctrl-C does not reach it a second time

    def pass_on(number, frame):
        received.append(number)
        process.send_signal(number)

    handlers = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    code = process.wait()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if received and code == 0:  # the signal came in its last step
        return 128 + received[0]
    return code if code >= 0 else 128 - code  # below 0: a signal killed it


def main(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    split = argv.index("--") if "--" in argv else len(argv)
    usage = "%(prog)s --sizes S,S,... --epochs E,E,... --out OUT -- OPTIONS OF fastmim.py"
    parser = argparse.ArgumentParser(prog="python -m tools.fastmim_p", usage=usage, description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", required=True, help="img_size of every phase, such as 128,160 or 96x128,192x256")
    parser.add_argument("--epochs", required=True, help="of every phase")
    parser.add_argument("--batches", help="batch_size of every phase; the recipe's if not given")
    parser.add_argument("--out", required=True, help="folder of all runs")
    parser.add_argument("--nproc-per-node", type=int, default=1, help="processes; torchrun starts more than one")
    parser.add_argument("--resume", action="store_true", help="go on with what was stopped")
    parser.add_argument("--plan", action="store_true", help="print what each phase costs")
    args = parser.parse_args(argv[:split])
    words = argv[split + 1 :] + ["--resume"] * args.resume + ["--plan"] * args.plan
    launcher = []
    if args.nproc_per_node > 1 and not args.plan:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.nproc_per_node)]
    if "WORLD_SIZE" in os.environ:
        config.fail("this tool starts torchrun itself: python -m tools.fastmim_p --nproc-per-node 8")
    with config.user_errors():
        phases, first = phases_of(args, words)
        if not args.plan:
            check(phases, args.nproc_per_node)
    if args.plan:  # in this process: importing torch for each phase would take longer
        for i, phase in enumerate(phases):
            config.print_once(f"phase {i + 1} of {len(phases)}")
            fastmim.main(phase)
        return
    for i in range(first, len(phases)):
        command, phase = [*launcher, os.path.relpath(fastmim.__file__), *phases[i]], f"phase {i + 1} of {len(phases)}"
        config.print_once(f"{phase}: {shlex.join(['python', *command])}")
        if code := run([sys.executable, *command]):
            config.print_once(f"stopped in {phase}; --resume goes on")
            raise SystemExit(code)


if __name__ == "__main__":
    main()
