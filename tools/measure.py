"""Every protocol of fine-tuning on the encoder of every method, at a scale that a laptop takes: a table in the README.

    python -m tools.measure --cifar10_mini DIR --seeds 0      writes results/protocols.json

For each seed one small ViT of every method, pre-trained on `shapes` without labels as in `demo.py --what learns` (1,250
steps of 32 images), and one with random weights go through the protocols with 500 labels of `shapes`, tested on 2,000
images, and with 500 labels of DIR (4,000 and 1,000 images of CIFAR-10 in train/CLASS/ and val/CLASS/), which none has
seen; all images at 64 px. Training is 120 steps of 32 images in the recipe of the demo; linear heads, whose features
are kept, have 1,500 steps, and the better of two rates of learning on the validation images of `shapes`. What has ended
is not run again.
"""

import argparse
import json
import statistics
from pathlib import Path

from tools.demo import BUDGET, LEARNS, length, run, slug

METHODS = ["MAE", "SimMIM", "UM-MAE", "FastMIM", "LUT", "random weights"]
LINEAR = ["--mode", "linear", "--head_start", "random", "--shift", 0, "--epochs", 100, "--warmup_epochs", 10]
PROTOCOLS = {  # name: words of its finetune.py, in the order of the table
    "k-NN": ["--mode", "knn"],
    "linear, LARS": [*LINEAR, "--base_lr", 128],
    "linear, SGD": [*LINEAR, "--optimizer", "sgd", "--base_lr", 8],
    "half a block": ["--train_blocks", 0.5],
    "one block of four": ["--train_blocks", 1],
    "two blocks": ["--train_blocks", 2],
    "all": [],
    "all, after the other data": [],
    "all, averaged": ["--ema", 0.95],
    "all, one block dropped": ["--drop_layers", 1],
    "all, two blocks dropped": ["--drop_layers", 2],
    "all, two dropped and two shuffled": ["--drop_layers", 2, "--shuffle_layers"],
}
OF_RANDOM = ["k-NN", "linear, LARS", "linear, SGD", "all", "all, averaged"]  # others are of what was learned


def one_method(sets, folder, method, seed):
    """{data: {protocol: top-1 in per cent}} of the encoder of one method and seed."""
    folder, results = folder / slug(method) / f"seed{seed}", {name: {} for name in sets}
    start = ["--init", "none", "--model", "vit_tiny", "--patch_size", 8]
    if method != "random weights":
        script, *own = LEARNS[f"{method} ViT"].split()
        words = [*length(2), *own, "--seed", seed, "--picture_epochs", 2]
        run(script, *words, out=folder / "pre-trained", again="--resume")
        start = ["--init", folder / "pre-trained" / "encoder.pt"]
    for protocol in PROTOCOLS if method != "random weights" else OF_RANDOM:
        for name, data in sets.items():
            own = start
            if protocol.endswith("the other data"):  # to which `all` was fine-tuned before
                other = next(other for other in sets if other != name)
                own = ["--init", folder / slug(f"{other} all") / "encoder.pt"]
            out = folder / slug(f"{name} {protocol}")
            run("finetune.py", "--config", "configs/finetune_tiny.yaml", "--data", data, *own, "--labels", 500,
                "--epochs", BUDGET[500], "--split", "test", "--seed", seed, *PROTOCOLS[protocol], out=out,
                again="--resume")
            results[name][protocol] = json.loads((out / "result.json").read_text())["top1"]
    return results


def table(results, data):
    """A markdown table of {method: {seed: {data: {protocol: top-1}}}} on one of the data sets, mean over seeds."""
    lines = [f"| {data} | " + " | ".join(results) + " |", "|---|" + "---|" * len(results)]
    for protocol in PROTOCOLS:
        top1 = [[seed[data][protocol] for seed in seeds.values() if protocol in seed[data]]
                for seeds in results.values()]
        lines.append(f"| {protocol} | " + " | ".join(f"{statistics.mean(v):.1f}" if v else "" for v in top1) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar10_mini", type=Path, required=True)
    parser.add_argument("--seeds", default="0", help='such as "0 1 2"')
    parser.add_argument("--out", type=Path, default=Path("runs/protocols"))
    words = parser.parse_args()
    sets, path = {"shapes": "shapes", "cifar10_mini": words.cifar10_mini}, Path("results/protocols.json")
    record = {"pretraining": {name: LEARNS.get(f"{name} ViT", "none") for name in METHODS}, "options": length(2),
              "words": {name: " ".join(map(str, own)) for name, own in PROTOCOLS.items()}, "results": {}}
    for seed in map(int, words.seeds.split()):
        for method in METHODS:
            record["results"].setdefault(method, {})[str(seed)] = one_method(sets, words.out, method, seed)
            path.write_text(json.dumps(record, indent=1) + "\n")
    print("\n\n".join(table(record["results"], data) for data in sets))


if __name__ == "__main__":
    main()
