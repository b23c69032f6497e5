r"""How robust a classifier is: its accuracy on noisy, blurred, faded and coarse images, at five strengths each.

    python -m tools.corruptions --init runs/finetune/encoder.pt --data shapes --out runs/corruptions
    torchrun --nproc-per-node 8 -m tools.corruptions --init runs/finetune_vit_b/encoder.pt --data /data/imagenet \
        --out runs/corruptions_vit_b

OUT/result.json is that of `finetune.py --eval`, and {kind: top-1 at five strengths} beside it. The noise of an image is
a function of its index alone: all classifiers see the same. The options are those of finetune.py.
"""

import dataclasses
import math

import torch
from torchvision.transforms import v2

import data
import finetune
from common import config, engine, evaluate
from common.transforms import BILINEAR

CORRUPTIONS = {  # five strengths, those of ImageNet-C for 224 px (Hendrycks & Dietterich, 2019)
    "noise": (0.08, 0.12, 0.18, 0.26, 0.38),  # standard deviation
    "blur": (1, 2, 3, 4, 6),  # standard deviation in pixels, of an image of 224
    "contrast": (0.4, 0.3, 0.2, 0.1, 0.05),  # share that is left
    "pixelate": (0.6, 0.5, 0.4, 0.3, 0.25),  # share of the pixels of a side that are left
}


def corruption(kind, strength, size):
    """A transform of uint8 images (C, *size), grey or RGB; strength is 0 to 4."""
    amount = CORRUPTIONS[kind][strength]
    if kind == "noise":
        return v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.GaussianNoise(sigma=amount),
                           v2.ToDtype(torch.uint8, scale=True)])
    if kind == "blur":
        sigma = amount * min(size) / 224
        return v2.GaussianBlur(2 * math.ceil(3 * sigma) + 1, sigma)
    if kind == "contrast":
        return v2.ColorJitter(contrast=(amount, amount))
    small = [max(1, round(side * amount)) for side in size]
    return v2.Compose([v2.Resize(small, BILINEAR), v2.Resize(size, v2.InterpolationMode.NEAREST)])


@engine.record
def main(argv=None):
    cfg = config.parse(finetune.Config, __doc__, argv)
    with config.user_errors():
        cfg, saved = finetune.resolve(dataclasses.replace(cfg, eval=True))
    run = engine.Run(cfg)
    with config.user_errors():
        if cfg.in_chans not in (1, 3):
            raise ValueError(f"corruptions know grey and RGB, not --in_chans {cfg.in_chans}")
        dataset = data.labelled_set(cfg, cfg.split)
        model = finetune.build_classifier(cfg, saved, dataset.source.classes).to(run.device)
        if run.is_main:
            run.take_folder()

    result = evaluate.accuracy(run, model, data.evaluation(dataset, cfg, run))
    result["corruptions"] = {kind: [] for kind in CORRUPTIONS}
    for kind, top1 in result["corruptions"].items():
        for strength in range(5):
            # A corruption stands behind the transform. What is broken is named once for all.
            transform = v2.Compose([dataset.transform, corruption(kind, strength, cfg.img_size)])
            images = data.Images(dataset.source, transform, 0, dataset.max_bad, dataset.substitutes, dataset.broken)
            top1.append(evaluate.accuracy(run, model, data.evaluation(images, cfg, run))["top1"])

    evaluate.report(run, result, init=cfg.init)
    for kind, top1 in result["corruptions"].items():
        row = " ".join(f"{value:6.2f}" for value in top1)
        config.print_once(f"{kind:>10} {row}   mean {sum(top1) / 5:.2f} %")
    engine.leave_processes()


if __name__ == "__main__":
    main()
