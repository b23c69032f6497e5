"""What pre-training is worth for every method and backbone: the runs behind four tables of tools/tables.py.

    sweep      which learning rates? by validation images, one seed
    learns     pre-trained against random weights, at the rates that the sweep chose, on test images
    ablations  what each paper varies
    cifar10    the five methods on photographs

All arms of a row are the same network. "Scratch" starts from the very weights that pre-training started from. The first
three have one folder of runs: an encoder that two tables need is trained once.
"""

from tools import runner
from tools.demo import ARMS, BUDGET, FINETUNE, TITLE, slug, tuning

METHODS = {  # row of a table: command of its pre-training
    "MAE ViT": "mae.py --config configs/tiny.yaml",
    "SimMIM ViT": "simmim.py --config configs/simmim_tiny.yaml --model vit_tiny --patch_size 8",
    "SimMIM Swin": "simmim.py --config configs/simmim_tiny.yaml",
    "UM-MAE ViT": "um_mae.py --config configs/um_mae_tiny.yaml --model vit_tiny --patch_size 8",
    "UM-MAE Swin": "um_mae.py --config configs/um_mae_tiny.yaml",
    "UM-MAE PVT": "um_mae.py --config configs/um_mae_tiny.yaml --model pvt_tiny",
    "FastMIM ViT": "fastmim.py --config configs/fastmim_tiny.yaml",
    "FastMIM Swin": "fastmim.py --config configs/fastmim_tiny.yaml --model swin_tiny --patch_size 0 --mask_unit 8",
    "FastMIM PVTv2": "fastmim.py --config configs/fastmim_tiny.yaml --model pvtv2_tiny --patch_size 0 --mask_unit 8",
    "FastMIM ResNet-18":
        "fastmim.py --config configs/fastmim_tiny.yaml --model torchvision:resnet18 --patch_size 0 --mask_unit 8",
    "LUT ViT": "lut.py --config configs/lut_tiny.yaml"}  # without its context loss, it is MAE on these images
TRIED = {  # further rows of the sweep, at the rate of their recipes
    "MAE ViT, normalised pixels": METHODS["MAE ViT"] + " --target norm_pixels",
    "LUT ViT, context weight 0.05": METHODS["LUT ViT"] + " --context_weight 0.05",
    "LUT ViT, plain views": METHODS["LUT ViT"] + " --three_augment false --view_jitter 0,0,0,0",
    "LUT ViT, one-directional": METHODS["LUT ViT"] + " --one_directional true"}
SAME_NETWORK = {  # row: an earlier row whose random weights are the same, so that scratch is measured once
    **dict.fromkeys(["UM-MAE ViT", "FastMIM ViT", "LUT ViT", *TRIED], "MAE ViT"),
    "FastMIM Swin": "SimMIM Swin"}

RATES = (5e-4, 1e-3, 2e-3)  # of pre-training
TUNING_RATES = (1e-3, 2e-3, 4e-3, 8e-3)  # of fine-tuning
# Where the best of these lies at an end: more of them, {row: rates}
BEYOND = {"SimMIM ViT": (4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2), "FastMIM ViT": (2.5e-4,), "SimMIM Swin": (4e-3, 8e-3),
          "UM-MAE Swin": (4e-3,), "UM-MAE PVT": (4e-3,), "FastMIM PVTv2": (4e-3,), "FastMIM ResNet-18": (4e-3,)}
TUNING_BEYOND = {"SimMIM ViT": (1.6e-2, 3.2e-2)}  # of what was pre-trained
SCRATCH_BEYOND = {"SimMIM Swin": (5e-4,), "UM-MAE Swin": (5e-4,), "FastMIM ResNet-18": (1.6e-2,)}
SCRATCH = {arm: times for arm, (times, _) in ARMS.items() if arm != "pre-trained"}  # arm: times the budget
# The best ones on validation images (results/sweep_*.json).
PRETRAINED = {  # row: rate of pre-training
    "MAE ViT": 1e-3, "SimMIM ViT": 3.2e-2, "SimMIM Swin": 4e-3, "UM-MAE ViT": 1e-3, "UM-MAE Swin": 2e-3,
    "UM-MAE PVT": 2e-3, "FastMIM ViT": 5e-4, "FastMIM Swin": 1e-3, "FastMIM PVTv2": 2e-3, "FastMIM ResNet-18": 2e-3,
    "LUT ViT": 1e-3}
OF_VIT = {arm: rate for arm, (_, rate) in ARMS.items()}
TUNED = {  # row: {arm: rate of fine-tuning}
    **dict.fromkeys(["MAE ViT", "UM-MAE ViT", "FastMIM ViT"], OF_VIT),
    "SimMIM ViT": {"pre-trained": 1.6e-2, "scratch": 2e-3, "scratch, 4x budget": 2e-3},
    "LUT ViT": {**OF_VIT, "pre-trained": 4e-3},
    "SimMIM Swin": {"pre-trained": 4e-3, "scratch": 1e-3, "scratch, 4x budget": 2e-3},
    "UM-MAE Swin": {"pre-trained": 2e-3, "scratch": 2e-3, "scratch, 4x budget": 1e-3},
    "UM-MAE PVT": {"pre-trained": 4e-3, "scratch": 2e-3, "scratch, 4x budget": 2e-3},
    "FastMIM Swin": {"pre-trained": 2e-3, "scratch": 1e-3, "scratch, 4x budget": 2e-3},
    "FastMIM PVTv2": {"pre-trained": 4e-3, "scratch": 4e-3, "scratch, 4x budget": 4e-3},
    "FastMIM ResNet-18": {"pre-trained": 4e-3, "scratch": 8e-3, "scratch, 4x budget": 8e-3}}
VALIDATION = "top-1, per cent of 2,000 validation images, 500 labels"


def pretraining(folder, name, seed, *more):
    """The job of a row, at the learning rate of its recipe."""
    out = folder / slug(" ".join([name, *map(str, more)])) / f"seed{seed}"
    return runner.training({**METHODS, **TRIED}[name], "--seed", seed, "--picture_epochs", 2, *more, out=out)


def best_pretraining(folder, name, seed, *more):
    """The job of a row at the learning rate that the sweep chose, with further options."""
    return pretraining(folder, name, seed, "--base_lr", PRETRAINED[name], *more)


def random_weights(folder, name, seed):
    """The job that leaves the weights that pre-training starts from: the learning rate of its only step is 0."""
    return pretraining(folder, SAME_NETWORK.get(name, name), seed, "--max_steps", 1)


def sweep(args):
    """The learning rates of every method and backbone, x2 apart: of pre-training, and of fine-tuning each arm."""
    cells = []
    for seed in args.seeds:
        for name in args.methods:
            rates = (*TUNING_RATES, *SCRATCH_BEYOND.get(SAME_NETWORK.get(name, name), ()))
            arms = {arm: (random_weights(args.out, name, seed), times, rates) for arm, times in SCRATCH.items()}
            rates = (*TUNING_RATES, *TUNING_BEYOND.get(name, ()))
            if name in TRIED:
                arms = {"pre-training": (pretraining(args.out, name, seed), 1, rates)}
            else:
                for rate in sorted([*RATES, *BEYOND.get(name, ())]):
                    arms[f"pre-training {rate:g}"] = pretraining(args.out, name, seed, "--base_lr", rate), 1, rates
            for arm, (encoder, times, rates) in arms.items():
                for rate in sorted(rates):
                    words = ["--labels", 500, "--epochs", times * BUDGET[500], "--base_lr", rate]
                    out = encoder.out / slug(f"x{times} {rate:g}")
                    job = tuning(FINETUNE, encoder, *words, out=out, seed=seed, split="val")
                    cells.append(runner.Cell(f"{name}: {VALIDATION}", arm, f"fine-tuning {rate:g}", seed, job))
    return cells


# ---------------------------------------- Does it learn?

LABELS = ["--labels", 500, "--epochs", BUDGET[500]]
TESTS = {  # name: options of fine-tuning, arms
    "500 labels": (LABELS, ["pre-trained", *SCRATCH]),
    # The head starts as the logistic regression on frozen features, and the only step has a learning rate of 0.
    "linear, 500 labels": ([*LABELS, "--mode", "linear", "--max_steps", 1, "--head_l2", 0],
                           ["pre-trained", "scratch"])}


def testing(name, test, arm, encoder, seed):
    """The job that gives an encoder of a row its number on test images."""
    longer = ["--epochs", SCRATCH[arm] * BUDGET[500]] if SCRATCH.get(arm, 1) > 1 else []
    words = [*TESTS[test][0], *longer, "--base_lr", TUNED[name][arm]]
    return tuning(FINETUNE, encoder, *words, out=encoder.out / slug(f"{test} {arm}"), seed=seed)


def learns(args):
    """Every method and backbone against the same network from random weights: the same labels, the same budget."""
    cells = []
    for seed in args.seeds:
        for name in args.methods:
            pretrained = best_pretraining(args.out, name, seed)
            scratch = random_weights(args.out, name, seed)
            for test, (_, arms) in TESTS.items():
                for arm in arms:
                    job = testing(name, test, arm, pretrained if arm == "pre-trained" else scratch, seed)
                    cells.append(runner.Cell(TITLE, name, f"{test}: {arm}", seed, job))
    return cells


def ends_of_logs(args):
    """{row: {seed: first and last line of the log of its pre-training}}."""
    ends = {}
    for name in args.methods:
        logs = {seed: runner.log_of(best_pretraining(args.out, name, seed).out) for seed in args.seeds}
        ends[name] = {seed: [lines[0], lines[-1]] for seed, lines in logs.items()}
    return ends


# ---------------------------------------- Ablations

ABLATIONS = {  # what a paper varies, and what it found: (row of METHODS, {row: options of its pre-training})
    "mask ratio (MAE, Fig. 5: 0.75 is best)": ("MAE ViT", {
        "0.5": "--mask_ratio 0.5", "0.75": "", "0.9": "--mask_ratio 0.9"}),
    "decoder blocks (MAE, Table 1a: more help linear probing, not fine-tuning)": ("MAE ViT", {
        "1": "", "4": "--decoder_depth 4"}),
    "hidden patches in the encoder (MAE, Table 1c: left out is better)": ("MAE ViT", {
        "left out": "", "as mask tokens": "--mask_tokens_in_encoder true"}),
    "mask unit (SimMIM: best where hidden pixels are neither near nor far from visible ones)": ("SimMIM Swin", {
        "4 px": "--mask_unit 4", "8 px": "", "16 px": "--mask_unit 16"}),
    "mask ratio (SimMIM: 0.6 is best for its unit)": ("SimMIM Swin", {
        "0.4": "--mask_ratio 0.4", "0.6": "", "0.8": "--mask_ratio 0.8"}),
    "secondary masking (UM-MAE, 3.2: better with it)": ("UM-MAE Swin", {
        "none": "--secondary_ratio 0", "0.25": ""}),
    "sampling (UM-MAE, Table 1: the more uniform, the worse; secondary masking makes up for it)": ("UM-MAE ViT", {
        **{kind: f"--secondary_ratio 0 --sampling {kind}" for kind in ("random", "uniform", "grid")},
        "uniform, 0.25 masked": ""}),
    "size of its images (FastMIM, Table 7: HOG loses less than pixels)": ("FastMIM ViT", {
        "HOG, 64 px": "", "HOG, 32 px": "--img_size 32",
        "pixels, 64 px": "--target pixels", "pixels, 32 px": "--target pixels --img_size 32"}),
    "context loss (LUT, 5: better with it)": ("LUT ViT", {
        "none": "--context_weight 0", "one direction": "--one_directional true", "both directions": ""})}


def ablations(args):
    """What each paper varies, at this scale, from the row of `learns` that has its default: the encoder fine-tuned and
    frozen, with 500 labels, all at that row's learning rates."""
    cells = []
    for seed in args.seeds:
        for title, (name, rows) in ABLATIONS.items():
            for row, options in rows.items():
                encoder = best_pretraining(args.out, name, seed, *options.split())
                for test in TESTS:
                    job = testing(name, test, "pre-trained", encoder, seed)
                    cells.append(runner.Cell(f"{name}, {title}: {TITLE}", row, test, seed, job))
    return cells


# ---------------------------------------- Photographs

CIFAR10 = {name: f"{script} --config configs/cifar10_{script[:-3]}.yaml" for name, script in {
    "MAE": "mae.py", "SimMIM": "simmim.py", "UM-MAE": "um_mae.py", "FastMIM": "fastmim.py", "LUT": "lut.py"}.items()}
CIFAR10_TUNING = "finetune.py --config configs/cifar10_finetune.yaml --model vit_tiny --patch_size 4"
CIFAR10_BUDGET = {1000: 20, 5000: 10, 50000: 1}  # labels: epochs of 32 images a step
CIFAR10_TITLE = "CIFAR-10: top-1, per cent of 5,000 validation images"


def cifar10(args):
    """Every method on 50,000 photographs in DIR/train/CLASS/, against the same ViT from random weights. MAE and scratch
    with all seeds, the others with the first one."""
    cells = []
    for seed in args.seeds:
        encoders = {"scratch": None, "scratch, 4x budget": None}
        for name in args.methods if seed == args.seeds[0] else ["MAE"]:
            out = args.out / name / f"seed{seed}"
            words = ["--data", args.data, "--seed", seed]
            encoders[name] = runner.training(CIFAR10[name], *words, out=out / "pre-trained")
        for row, encoder in encoders.items():
            for labels, epochs in CIFAR10_BUDGET.items():
                epochs *= SCRATCH.get(row, 1)
                words = ["--data", args.data, "--labels", labels, "--epochs", epochs, "--warmup_epochs", epochs / 20]
                start = ["--init", encoder.out / "encoder.pt"] if encoder else []
                needs = [encoder] if encoder else []
                out = args.out / slug(row) / f"seed{seed}" / f"{labels}_labels"
                job = runner.training(CIFAR10_TUNING, *words, *start, "--seed", seed, needs=needs, out=out)
                cells.append(runner.Cell(CIFAR10_TITLE, row, f"{labels:,} labels", seed, job))
            if encoder:
                words = ["--data", args.data, "--init", encoder.out / "encoder.pt", "--seed", seed, "--mode", "knn"]
                out = args.out / row / f"seed{seed}" / "k-NN"
                job = runner.training(CIFAR10_TUNING, *words, needs=[encoder], out=out)
                cells.append(runner.Cell(CIFAR10_TITLE, row, "k-NN, 50,000 labels", seed, job))
    return cells
