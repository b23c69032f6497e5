"""What pre-training buys, measured: `make demo`, or `make demo SEEDS="0 1 2"` for the numbers in the README.

For every seed it runs the commands that it prints, those that you would type: mae.py on the 20,000 images of `shapes`
without their labels, then finetune.py from that encoder and from random weights, with 200 and with 500 labels. Scratch
also gets two and four times the budget. Everything else is equal: architecture, labels, augmentation, optimizer, and a
learning rate that is the best of four for both on the validation images. Accuracies are on 2,000 test images.

`python -m tools.demo --what learns --seeds "0 1 2"` does the same for the other methods and backbones, at an equal
budget; there, what is finished is not done again, and what was stopped goes on. "Scratch" starts from the weights that
pre-training started from: those of a run that stops after its first step, in which the learning rate is still 0.
"""

import argparse
import concurrent.futures
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

from common import figures

BUDGET = {200: 20, 500: 8}  # labels: epochs that make 120 steps of 32 images
ARMS = {"pre-trained": 1, "scratch": 1, "scratch, 2x budget": 2, "scratch, 4x budget": 4}
LEARNS = {  # name: words of its pre-training
    "MAE ViT": "mae.py --config configs/tiny.yaml",
    "SimMIM ViT": "simmim.py --config configs/simmim_tiny.yaml --model vit_tiny --patch_size 8",
    "SimMIM Swin": "simmim.py --config configs/simmim_tiny.yaml",
    "UM-MAE ViT": "um_mae.py --config configs/um_mae_tiny.yaml --model vit_tiny --patch_size 8 --base_lr 0.016",
    "UM-MAE Swin": "um_mae.py --config configs/um_mae_tiny.yaml",
    "UM-MAE PVT": "um_mae.py --config configs/um_mae_tiny.yaml --model pvt_tiny --base_lr 0.016",
    "FastMIM ViT": "fastmim.py --config configs/fastmim_tiny.yaml",
    "FastMIM Swin":
        "fastmim.py --config configs/fastmim_tiny.yaml --model swin_tiny --patch_size 0 --mask_unit 8 --base_lr 0.008",
    "FastMIM PVTv2": "fastmim.py --config configs/fastmim_tiny.yaml --model pvtv2_tiny --patch_size 0 --mask_unit 8",
    "FastMIM ResNet-18":
        "fastmim.py --config configs/fastmim_tiny.yaml --model torchvision:resnet18 --patch_size 0 --mask_unit 8",
    "LUT ViT": "lut.py --config configs/lut_tiny.yaml",
    "LUT ViT without context": "lut.py --config configs/lut_tiny.yaml --context_weight 0 --one_directional true",
}
TESTS = {  # name: words of its finetune.py
    "200 labels": ["--labels", 200, "--epochs", BUDGET[200]],
    "500 labels": ["--labels", 500, "--epochs", BUDGET[500]],
    # The head starts as the logistic regression on frozen features, and the only step has a learning rate of 0.
    "linear, 500 labels": ["--labels", 500, "--epochs", BUDGET[500], "--mode", "linear", "--max_steps", 1],
}


def run(script, *words, out, again="--overwrite"):
    """Run one command of the project, one thread, output to OUT/output.txt; SystemExit with its last lines if it fails.
    With `again` --resume, a command that has ended well is not run a second time."""
    command = [script, *map(str, words), "--out", str(out), again]
    log, ended = out / "output.txt", out / "ended.txt"  # the latter holds the command that ended well
    if again == "--resume" and ended.exists() and ended.read_text() == " ".join(command):
        return
    print("  python " + " ".join(command), flush=True)
    out.mkdir(parents=True, exist_ok=True)
    threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}  # two processes share two cores
    with open(log, "w") as file:
        environment = {**os.environ, **threads}
        done = subprocess.run([sys.executable, *command], env=environment, stdout=file, stderr=subprocess.STDOUT)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n" + "\n".join(log.read_text().splitlines()[-15:]))
    ended.write_text(" ".join(command))


def finetune(out, *words, seed, again="--overwrite"):
    """Top-1 on the test images, in per cent; `words` say what the encoder starts from, and what is done with it."""
    run("finetune.py", "--config", "configs/finetune_tiny.yaml", *words, "--split", "test", "--seed", seed, out=out,
        again=again)
    return json.loads((out / "result.json").read_text())["top1"]


def one_seed(folder, seed):
    """{labels: {arm: top-1}} of one seed: pre-training on one core, the scratch runs beside it on the other."""
    top1 = {labels: {} for labels in BUDGET}
    failed = []

    def scratch():
        try:
            for labels in BUDGET:
                for arm in list(ARMS)[1:]:
                    out = folder / f"{slug(arm)}_{labels}"
                    words = ["--labels", labels, "--epochs", BUDGET[labels] * ARMS[arm]]
                    top1[labels][arm] = finetune(out, "--model", "vit_tiny", "--patch_size", 8, *words, seed=seed)
        except SystemExit as error:  # a thread's exit ends the thread alone
            failed.append(error)

    beside = threading.Thread(target=scratch)
    beside.start()
    run("mae.py", "--config", "configs/tiny.yaml", "--seed", seed, out=folder / "mae")
    for labels in BUDGET:
        words = ["--init", folder / "mae" / "encoder.pt", "--labels", labels, "--epochs", BUDGET[labels]]
        top1[labels]["pre-trained"] = finetune(folder / f"pre-trained_{labels}", *words, seed=seed)
    beside.join()
    if failed:
        raise failed[0]
    return top1


def table(results):
    """A markdown table of {seed: {labels: {arm: top-1}}}: one column a seed, and their mean."""
    lines = ["| labels | arm | " + " | ".join(f"seed {seed}" for seed in results) + " | mean |",
             "|---|---|" + "---|" * (len(results) + 1)]
    for labels in BUDGET:
        for arm in ARMS:
            values = [result[labels][arm] for result in results.values()]
            cells = " | ".join(f"{v:.1f}" for v in [*values, statistics.mean(values)])
            lines.append(f"| {labels} | {arm} | {cells} |")
    return "\n".join(lines)


def slug(name):
    return name.replace(",", "").replace(" ", "_")


def length(epochs):
    """Options of a pre-training as long as that: 625 steps of 32 images an epoch; the recipes have 4 or 8 epochs."""
    return ["--epochs", epochs, "--warmup_epochs", round(0.08 * epochs, 2)]


def log_of(folder):
    return [json.loads(line) for line in open(folder / "log.jsonl")]


def pair(folder, name, seed, epochs=2):
    """{test: {"pre-trained": top-1, "scratch": top-1}, ..., "log": its first and last line} of a method and seed, after
    as many epochs of pre-training."""
    folder, result = folder / slug(name) / f"{epochs}_epochs" / f"seed{seed}", {}
    words = [*LEARNS[name].split(), *length(epochs), "--seed", seed, "--picture_epochs", 2]
    for arm, more in ("pre-trained", []), ("scratch", ["--max_steps", 1]):
        run(*words, *more, out=folder / arm, again="--resume")
        for test, how in TESTS.items():
            start = ["--init", folder / arm / "encoder.pt"]
            top1 = finetune(folder / slug(f"{arm} {test}"), *start, *how, seed=seed, again="--resume")
            result.setdefault(test, {})[arm] = top1
    log = log_of(folder / "pre-trained")
    return {**result, "log": [log[0], log[-1]]}


def learns_table(results):
    """A markdown table of {method: {seed: result of `pair`}}: mean over seeds (lowest to highest, if several)."""
    columns = [(test, arm) for test in TESTS for arm in list(ARMS)[:2]]
    lines = ["| method | seeds | " + " | ".join(f"{test}: {arm}" for test, arm in columns) + " |",
             "|---" * (2 + len(columns)) + "|"]
    for name, seeds in results.items():
        values = [[result[test][arm] for result in seeds.values()] for test, arm in columns]
        ranges = [f" ({min(v):.1f} to {max(v):.1f})" if len(v) > 1 else "" for v in values]
        cells = [f"{statistics.mean(v):.1f}{span}" for v, span in zip(values, ranges, strict=True)]
        lines.append(f"| {name} | {len(seeds)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def learns(out, seeds, jobs, epochs, methods):
    """Those of LEARNS, first with the first seed; the result file is written anew whenever one of them is done."""
    name = "learns.json" if epochs == 2 else f"learns_{epochs}_epochs.json"
    path = Path("results", name) if len(seeds) >= 3 else out / name
    chosen = {name: LEARNS[name] for name in methods}
    record = {"pretraining": chosen, "options": length(epochs), "tests": TESTS, "results": {}}
    pool = concurrent.futures.ThreadPoolExecutor(jobs)
    tasks = {pool.submit(pair, out, name, seed, epochs): (name, seed) for seed in seeds for name in chosen}
    try:
        for task in concurrent.futures.as_completed(tasks):
            name, seed = tasks[task]
            record["results"].setdefault(name, {})[str(seed)] = task.result()
            path.write_text(json.dumps(record, indent=1) + "\n")
    finally:
        pool.shutdown(cancel_futures=True)
    print(learns_table(record["results"]))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", default="demo", choices=["demo", "learns"], help="MAE alone, or the other methods")
    parser.add_argument("--seeds", default="0", help='such as "0 1 2"; three or more write into results/')
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--jobs", type=int, default=2, help="of learns: runs at a time, one thread each")
    parser.add_argument("--epochs", type=int, default=2, help="of learns: passes over the images before fine-tuning")
    parser.add_argument("--methods", default=",".join(LEARNS), help="of learns: which of them, comma-separated")
    words = parser.parse_args(argv)
    seeds, methods = [int(seed) for seed in words.seeds.split()], words.methods.split(",")
    if unknown := set(methods) - set(LEARNS):
        parser.error(f"--methods: {', '.join(sorted(unknown))} is not one of {', '.join(LEARNS)}")
    if words.what == "learns":
        return learns(words.out, seeds, words.jobs, words.epochs, methods)
    begin, results = time.monotonic(), {}
    for seed in seeds:
        print(f"seed {seed}: pre-training on one core, scratch on the other", flush=True)
        results[seed] = one_seed(words.out / f"seed{seed}", seed)
    print(f"\nTop-1 on 2,000 test images, in per cent, after {time.monotonic() - begin:.0f} s:\n\n{table(results)}\n")

    folders = {seed: words.out / f"seed{seed}" / "mae" for seed in results}
    logs = {seed: log_of(folder) for seed, folder in folders.items()}
    seconds = round(time.monotonic() - begin)
    record = {"top1": results, "pretraining_log": logs, "budget_epochs": BUDGET, "seconds": seconds}
    path = Path("results/demo.json") if len(results) >= 3 else words.out / "demo.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    figures.demo(words.out / "demo.png", results, logs)
    picture = max((folders[max(results)] / "pictures").glob("*.png"))
    print(f"numbers          {path}\nfigure           {words.out / 'demo.png'}\nreconstructions  {picture}")


if __name__ == "__main__":
    main()
