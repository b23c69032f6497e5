"""What an encoder or a classifier is worth, in numbers that do not depend on how many processes counted.

    data set --extract--> features (n, D), labels (n,) --neighbours--> scores (n, K) --count--> counts --> top-1, ...

Every image counts once. A process takes every world-th of the batches that one process would make, so that a batch
holds the same images and gives the same numbers; what is added up over processes are integers, or rows and zeros.
"""

import itertools
import json
import math
import types

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torchvision.transforms import v2

import data
from common import engine, figures
from common.files import decode
from common.sources import Memory
from common.transforms import CORRUPTIONS, corruption

# ---------------------------------------- Features


def pooled(encoder, imgs, pool="mean", noise=None):
    """(B, C, H, W) -> features (B, D): the mean of the patch tokens, or `cls`, the class token. `noise`: see encode."""
    latent = encoder.encode(encoder.embed(imgs), noise=noise)  # (B, num_prefix + N, D)
    return latent[:, 0] if pool == "cls" else latent[:, encoder.num_prefix :].mean(dim=1)  # (B, D)


def ready(run, model):
    """The model in evaluation mode, on all processes with BatchNorm's statistics of process 0: the ones saved."""
    if run.world > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    return model.eval()


def batches_of(cfg, run, dataset):
    """This process's part of a data set: imgs (B, C, H, W) normalised, labels (B,), indices (B,)."""
    order = data.in_order(len(dataset), cfg.micro_batch, run.rank, run.world)
    for batch in data.loader(dataset, order, cfg.workers):
        imgs, labels, indices = (part.to(run.device) for part in batch)
        yield data.normalize(imgs), labels, indices


def require_finite(run, odd, what):
    """Exit with code 2, all processes alike, if one of them has met numbers that are not finite, `odd` of them."""
    if run.world > 1:
        dist.all_reduce(odd)
    if odd:
        engine.leave_group()
        engine.fail(f"{what} are not finite: there is no score; try --precision fp32")


@torch.no_grad()
def extract(cfg, run, encoder, dataset, pool="mean"):
    """Features (n, D), fp32, and labels (n,) of a whole data set, in order, on every process; of a broken image, which
    an evaluation leaves out, none."""
    features = torch.zeros(len(dataset), encoder.width, device=run.device)
    labels = torch.zeros(len(dataset), dtype=torch.int64, device=run.device)  # 1 + label, 0 where there is no image
    encoder, was_training = ready(run, encoder), encoder.training
    for imgs, its_labels, indices in batches_of(cfg, run, dataset):
        with engine.autocast(run):
            features[indices] = pooled(encoder, imgs, pool).float()
        labels[indices] = 1 + its_labels
    encoder.train(was_training)
    if run.world > 1:
        for table in (features, labels):
            dist.all_reduce(table)
    require_finite(run, (~features.isfinite()).sum(), "the encoder's features")
    there = labels > 0
    return features[there], labels[there] - 1  # (n, D), (n,)


def cached(cfg, run, model, dataset):
    """A data set of features (D,) in the place of images, for a head that trains alone on images that augmentation
    leaves as they are. Exact: what a frozen encoder makes of them is the same in every epoch."""
    features, labels = extract(cfg, run, model.encoder, dataset, model.pool)
    engine.say(f"features of {len(labels)} images kept: nothing changes an image from epoch to epoch")
    source = Memory(features.cpu(), labels.cpu(), dataset.source.classes)
    return data.Images(source, nn.Identity(), cfg.seed)


def neighbours(bank, labels, queries, K, k=20, temperature=0.07):
    """Scores (n, K) of a weighted k-NN classifier: each of the k features of `bank` (m, D) that are nearest to a query
    (n, D) by cosine adds exp(cosine / temperature) to its class (Wu et al., 2018; k = 20: Caron et al., 2021)."""
    bank, scores = F.normalize(bank, dim=1), []
    for part in F.normalize(queries, dim=1).split(256):
        cosine, nearest = (part @ bank.T).topk(min(k, len(bank)), dim=1)  # (b, k)
        votes = F.one_hot(labels[nearest], K) * (cosine / temperature).exp()[..., None]  # (b, k, K)
        scores.append(votes.sum(dim=1))
    return torch.cat(scores)  # (n, K)


def probe_sets(cfg):
    """The labelled training and validation images that `probe` compares; None without --probe_epochs. ValueError or
    OSError, in one line, if --probe_data, or else --data, has no labels."""
    if not cfg.probe_epochs:
        return None
    options = types.SimpleNamespace(**{**vars(cfg), "data": cfg.probe_data or cfg.data, "labels": cfg.probe_labels})
    return data.labelled_set(options, "train", augment=False), data.labelled_set(options, "val")


def probe(cfg, run, step, encoder, sets):
    """Is the representation improving? Print and log the k-NN accuracy of the encoder as it is. Draws no number and
    changes no weight, so that training goes the same way with and without."""
    result = nearest(cfg, run, encoder, *sets)
    engine.note(run, step=step + 1, knn_top1=result["top1"])
    if run.main:
        run.bar.write(f"step {step + 1}: k-NN top-1 {result['top1']:.2f} % of {result['images']} images")


def nearest(cfg, run, encoder, bank, dataset, pool="mean", k=20):
    """The `summary` of k-NN, without any training: images of `dataset` are told by those of `bank`."""
    (features, labels), (queries, truth) = (extract(cfg, run, encoder, part, pool) for part in (bank, dataset))
    scores = neighbours(features, labels, queries, len(bank.source.classes), k)  # (n, K)
    scores = scores.masked_fill(scores == 0, -math.inf)  # (n, K); a class without a vote is not among the five best
    return summary(count(scores, truth), dataset.source.classes)


# ---------------------------------------- Accuracy


LARGEST = 1000  # classes that have a confusion matrix: that of 8,142 would take half a gigabyte, in every batch


def places(K):
    """How many pairs of true class and predicted class are told apart: all, or of too many classes right and wrong."""
    return K * K if K <= LARGEST else 2 * K


def count(scores, labels):
    """Integers (places(K) + 1,) of scores (B, K), labels (B,): the confusion matrix (true x predicted; beyond LARGEST
    classes, true x (wrong, right)), then how often the label is among the five best, of which one with the score -inf
    is none."""
    K = scores.shape[1]
    values, best = scores.topk(min(5, K), dim=1)  # 2 x (B, 5)
    column = best[:, 0] if K <= LARGEST else (best[:, 0] == labels).long()  # (B,)
    confusion = torch.bincount(labels * (places(K) // K) + column, minlength=places(K))
    hits = (best == labels[:, None]) & (values > -math.inf)  # (B, 5)
    return torch.cat([confusion, hits.sum().view(1)])  # (places(K) + 1,)


def summary(counts, classes):
    """What a result.json holds of counts: {top1, top5, mean_per_class in per cent, images, per_class in per cent,
    confusion (true x predicted), unless there are more than LARGEST}. A class without images has no accuracy and no
    part in the mean."""
    K, n = len(classes), int(counts[:-1].sum())
    confusion = counts[:-1].view(K, -1).cpu()  # (K, K), or (K, 2)
    right = confusion.diag() if K <= LARGEST else confusion[:, 1]  # (K,)
    rates = 100 * right.double() / confusion.sum(dim=1)  # (K,), NaN for a class without images
    per_class = [None if rate.isnan() else round(rate.item(), 2) for rate in rates]
    result = {"top1": 100 * int(right.sum()) / n, "top5": 100 * int(counts[-1]) / n,
              "mean_per_class": rates.nanmean().item(), "images": n,
              "per_class": dict(zip(classes, per_class, strict=True))}
    return result | ({"confusion": confusion.tolist()} if K <= LARGEST else {})


@torch.no_grad()
def accuracy(cfg, run, model, dataset):
    """The `summary` of a classifier on a data set. Exits with code 2 if its outputs are not finite."""
    classes = dataset.source.classes
    counts = torch.zeros(places(len(classes)) + 1, dtype=torch.int64, device=run.device)
    odd = torch.zeros((), dtype=torch.int64, device=run.device)
    ready(run, model)
    for imgs, labels, _ in batches_of(cfg, run, dataset):
        with engine.autocast(run):
            logits = model(imgs)  # (B, K)
        odd += (~logits.isfinite()).sum()
        counts += count(logits, labels)
    if run.world > 1:
        dist.all_reduce(counts)
    require_finite(run, odd, "the classifier's outputs")
    return summary(counts, classes)


def judge(cfg, run, model, dataset):
    """The `accuracy` of a classifier and, with --corruptions, {kind: top-1 at five strengths} on spoiled images, whose
    noise is a function of the index alone: all classifiers see the same."""
    result = accuracy(cfg, run, model, dataset)
    if cfg.corruptions:
        result["corruptions"] = {kind: [] for kind in CORRUPTIONS}
        for kind, strength in itertools.product(CORRUPTIONS, range(5)):
            transform = v2.Compose([dataset.transform, corruption(kind, strength, cfg.img_size)])
            spoiled = data.Images(dataset.source, transform, 0, dataset.max_bad, dataset.substitutes)
            spoiled.broken = dataset.broken  # named once
            result["corruptions"][kind].append(accuracy(cfg, run, model, spoiled)["top1"])
    return result


def alone(cfg, run, model, dataset):
    """An evaluation without training, of a classifier or, by k-NN, of its features."""
    bank = data.labelled_set(cfg, "train", augment=False) if cfg.mode == "knn" else None
    if run.main:
        engine.claim(cfg, run, None, {})
    if bank:
        result = nearest(cfg, run, model.encoder, bank, dataset, model.pool, cfg.neighbours)
    else:
        result = judge(cfg, run, model, dataset)
    report(cfg, run, result, init=cfg.init)
    engine.leave_group()


def report(cfg, run, result, **about):
    """Print the accuracy, write OUT/result.json and, if asked for, draw the confusion matrix."""
    if run.main:
        print(f"top-1 {result['top1']:.2f} %  top-5 {result['top5']:.2f} %  mean of classes "
              f"{result['mean_per_class']:.2f} %  of {result['images']} images", flush=True)
        for kind, top1 in result.get("corruptions", {}).items():
            print(f"{kind:>10} " + " ".join(f"{value:6.2f}" for value in top1) + f"   mean {sum(top1) / 5:.2f} %")
        (run.out / "result.json").write_text(json.dumps({**about, **result}, indent=1) + "\n")
        if cfg.confusion and "confusion" not in result:
            print(f"no picture of the confusion: there are more than {LARGEST} classes", flush=True)
        elif cfg.confusion:
            figures.confusion(run.out / "pictures" / "confusion.png", result["confusion"], list(result["per_class"]))


@torch.no_grad()
def predict(cfg, run, model, classes):
    """Print what a classifier takes each file of --predict for, and how sure it is. ValueError if one is no image."""
    model.eval()
    crop = data.CentreCrop(cfg.img_size, v2.InterpolationMode.BICUBIC)
    for path in cfg.predict:
        image = crop(decode(path, cfg.in_chans))  # (C, H, W)
        with engine.autocast(run):
            logits = model(data.normalize(image[None].to(run.device)))  # (1, K)
        share, best = logits[0].float().softmax(dim=0).max(dim=0)
        if not share.isfinite():
            raise ValueError(f"{path}: the classifier's outputs are not finite")
        engine.say(f"{path}: {classes[best]} {100 * share:.1f} %")
    engine.leave_group()
