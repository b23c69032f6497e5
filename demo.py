"""What pre-training buys, measured: `make demo`, or `make demo SEEDS="0 1 2"` for the numbers in the README.

For every seed it runs the commands that it prints, those that you would type: mae.py on the 20,000 images of `shapes`
without their labels, then finetune.py from that encoder and from random weights, with 200 and with 500 labels. Scratch
also gets two and four times the budget. Everything else is equal: architecture, labels, augmentation, optimizer, and a
learning rate that is the best of four for both on the validation images. Accuracies are on 2,000 test images.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import figures

BUDGET = {200: 20, 500: 8}  # labels: epochs that make 120 steps of 32 images
ARMS = {"pre-trained": 1, "scratch": 1, "scratch, 2x budget": 2, "scratch, 4x budget": 4}


def run(log, script, *words):
    """Run one command of the project, one thread, output to a file; SystemExit with its last lines if it fails."""
    command = [script, *map(str, words), "--overwrite"]
    print("  python " + " ".join(command), flush=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}  # two processes share two cores
    with open(log, "w") as file:
        environment = {**os.environ, **threads}
        done = subprocess.run([sys.executable, *command], env=environment, stdout=file, stderr=subprocess.STDOUT)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n" + "\n".join(log.read_text().splitlines()[-15:]))


def finetune(folder, arm, labels, seed):
    """Top-1 of one arm on the test images, in per cent."""
    out = folder / f"{arm.replace(', ', '_').replace(' ', '_')}_{labels}"
    start = ["--init", folder / "mae" / "encoder.pt"]
    if arm != "pre-trained":
        start = ["--model", "vit_tiny", "--patch_size", 8]
    run(out / "output.txt", "finetune.py", "--config", "configs/finetune_tiny.yaml", *start, "--labels", labels,
        "--epochs", BUDGET[labels] * ARMS[arm], "--split", "test", "--seed", seed, "--out", out)
    return json.loads((out / "result.json").read_text())["top1"]


def one_seed(folder, seed):
    """{labels: {arm: top-1}} of one seed: pre-training on one core, the scratch runs beside it on the other."""
    top1 = {labels: {} for labels in BUDGET}
    failed = []

    def scratch():
        try:
            for labels in BUDGET:
                for arm in list(ARMS)[1:]:
                    top1[labels][arm] = finetune(folder, arm, labels, seed)
        except SystemExit as error:  # a thread's exit ends the thread alone
            failed.append(error)

    beside = threading.Thread(target=scratch)
    beside.start()
    out = folder / "mae"
    run(out / "output.txt", "mae.py", "--config", "configs/tiny.yaml", "--seed", seed, "--out", out)
    for labels in BUDGET:
        top1[labels]["pre-trained"] = finetune(folder, "pre-trained", labels, seed)
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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0", help='such as "0 1 2"; three or more write results/demo.json')
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    words = parser.parse_args()
    begin, results = time.monotonic(), {}
    for seed in map(int, words.seeds.split()):
        print(f"seed {seed}: pre-training on one core, scratch on the other", flush=True)
        results[seed] = one_seed(words.out / f"seed{seed}", seed)
    print(f"\nTop-1 on 2,000 test images, in per cent, after {time.monotonic() - begin:.0f} s:\n\n{table(results)}\n")

    folders = {seed: words.out / f"seed{seed}" / "mae" for seed in results}
    logs = {seed: [json.loads(line) for line in open(folder / "log.jsonl")] for seed, folder in folders.items()}
    seconds = round(time.monotonic() - begin)
    record = {"top1": results, "pretraining_log": logs, "budget_epochs": BUDGET, "seconds": seconds}
    path = Path("results/demo.json") if len(results) >= 3 else words.out / "demo.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    figures.demo(words.out / "demo.png", results, logs)
    picture = max((folders[max(results)] / "pictures").glob("*.png"))
    print(f"numbers          {path}\nfigure           {words.out / 'demo.png'}\nreconstructions  {picture}")


if __name__ == "__main__":
    main()
