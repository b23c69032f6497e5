"""Every protocol of fine-tuning, measured at a scale that a laptop takes: the table in the README.

    python measure.py --cifar10_mini DIR --seeds 0      writes results/protocols.json

One encoder for each seed, mae.py on `shapes` without labels (2,500 steps, half the recipe of the demo), goes through
every protocol with 500 labels of `shapes`, tested on 2,000 images, and with 500 labels of DIR (4,000 and 1,000 images
of CIFAR-10 in train/CLASS/ and val/CLASS/), which it has never seen; all images at 64 px. Training is 120 steps of 32
images in the recipe of the demo; linear heads, whose features are kept, have 1,500 steps, and the better of two rates
of learning on the validation images of `shapes`. What has ended is not run again.
"""

import argparse
import json
from pathlib import Path

from demo import BUDGET, run

RANDOM = ["--init", "none", "--model", "vit_tiny", "--patch_size", 8]
LINEAR = ["--mode", "linear", "--head_start", "random", "--shift", 0, "--epochs", 100, "--warmup_epochs", 10]
PROTOCOLS = {  # name: words of its finetune.py, in the order of the table
    "k-NN": ["--mode", "knn"],
    "k-NN, random encoder": ["--mode", "knn", *RANDOM],
    "linear, LARS": [*LINEAR, "--base_lr", 128],
    "linear, SGD": [*LINEAR, "--optimizer", "sgd", "--base_lr", 8],
    "half a block": ["--train_blocks", 0.5],
    "one block of four": ["--train_blocks", 1],
    "two blocks": ["--train_blocks", 2],
    "all": [],
    "all, after the other data": [],
    "all, one block dropped": ["--drop_layers", 1],
    "all, two blocks dropped": ["--drop_layers", 2],
    "all, two dropped and two shuffled": ["--drop_layers", 2, "--shuffle_layers"],
    "from scratch": RANDOM,
    "from scratch, averaged": [*RANDOM, "--ema", 0.95],
}


def one_seed(sets, folder, seed):
    """{data: {protocol: top-1 in per cent}} of one seed."""
    run("mae.py", "--config", "configs/tiny.yaml", "--epochs", 4, "--warmup_epochs", 0.32, "--seed", seed,
        out=folder / "mae", again="--resume")
    results = {name: {} for name in sets}
    for protocol in ["all", *PROTOCOLS]:  # first what another one starts from
        for name, data in sets.items():
            other = next(other for other in sets if other != name)
            init = folder / (f"{other}_all" if protocol.endswith("the other data") else "mae") / "encoder.pt"
            out = folder / f"{name}_{protocol.replace(', ', '_').replace(' ', '_')}"
            run("finetune.py", "--config", "configs/finetune_tiny.yaml", "--data", data, "--init", init, "--labels",
                500, "--epochs", BUDGET[500], "--split", "test", "--seed", seed, *PROTOCOLS[protocol], out=out,
                again="--resume")
            results[name][protocol] = json.loads((out / "result.json").read_text())["top1"]
    return results


def table(results):
    """A markdown table of {seed: {data: {protocol: top-1}}}, mean over seeds."""
    names = list(next(iter(results.values())))
    lines = ["| protocol | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for protocol in PROTOCOLS:
        top1 = {name: [result[name][protocol] for result in results.values()] for name in names}
        lines.append(f"| {protocol} | " + " | ".join(f"{sum(v) / len(v):.1f}" for v in top1.values()) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar10_mini", type=Path, required=True)
    parser.add_argument("--seeds", default="0", help='such as "0 1 2"')
    parser.add_argument("--out", type=Path, default=Path("runs/protocols"))
    words = parser.parse_args()
    sets = {"shapes": "shapes", "cifar10_mini": words.cifar10_mini}
    results = {seed: one_seed(sets, words.out / f"seed{seed}", seed) for seed in map(int, words.seeds.split())}
    record = {"words": {name: " ".join(map(str, own)) for name, own in PROTOCOLS.items()}, "results": results}
    Path("results/protocols.json").write_text(json.dumps(record, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
