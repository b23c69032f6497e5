"""What a classifier is worth, in numbers that do not depend on how many processes counted.

    loader --classifier, or k-NN--> scores (n, K) --count--> counts --summary--> top-1, top-5, confusion, ...

Every image of a loader (see neighbours.py) counts once, and what is added up over processes are integers.
"""

import math

import torch
import torch.distributed as dist

from common import folder, neighbours
from common.config import print_once
from common.transforms import normalize

LARGEST = 1000  # classes that have a confusion matrix: that of 8,142 would take half a gigabyte, in every batch


def named(head, path):
    """A classifier from elsewhere, with its classes named by the lines of the file at `path`. ValueError if there is
    none, or if they are not as many; OSError."""
    names = [line.strip() for line in folder.read_text(path).splitlines() if line.strip()]
    if not (head and head.get("unnamed")):
        raise ValueError("--class_names is of a published classifier in --init, whose classes have no names")
    if not len(head["classes"]) == len(names) == len(set(names)):
        raise ValueError(f"--class_names {path} should hold {len(head['classes'])} different names, a line each, not "
                         f"{len(names)}")
    return {name: value for name, value in head.items() if name != "unnamed"} | {"classes": names}


def of_classes(head, classes, path):
    """A classifier that chooses among `classes` alone, those of a data set, which may be fewer than its own: then a
    line says so. Classes without names are taken in their order. ValueError if it does not know all of them."""
    own = head["classes"]
    if own == classes or (head.get("unnamed") and len(own) == len(classes)):
        return head
    unknown = sorted(set(classes) - set(own))
    if head.get("unnamed"):
        raise ValueError(f"{path} has a head of {len(own)} classes without names, and there are {len(classes)}: "
                         "--class_names FILE, a line each, tells which ones these are")
    if unknown:
        raise ValueError(f"{path} holds no classifier of the {len(classes)} classes {', '.join(classes)[:80]}: it does "
                         f"not know {', '.join(unknown[:3])[:80]}")
    rows = torch.tensor([own.index(name) for name in classes])  # (K,)
    tensors = {name: tensor[rows] if name.startswith("head.") else tensor for name, tensor in head["tensors"].items()}
    if len(classes) < len(own):
        print_once(f"scored over the {len(classes)} classes of the data, of the {len(own)} that {path} knows: no image "
                   "can be taken for one of the others")
    return {**head, "classes": list(classes), "tensors": tensors}


def num_columns(K):
    """Columns of the table of counts: one for each predicted class or, of too many classes, wrong and right."""
    return K if K <= LARGEST else 2


def count(scores, labels):
    """Integers of scores (B, K), labels (B,): the table of true class x column, flat, then how often the label is among
    the five best, of which one with the score -inf is none."""
    K = scores.shape[1]
    values, best = scores.topk(min(5, K), dim=1)  # each (B, 5)
    column = best[:, 0] if K <= LARGEST else (best[:, 0] == labels).long()  # (B,)
    table = torch.bincount(labels * num_columns(K) + column, minlength=K * num_columns(K))
    hits = (best == labels[:, None]) & (values > -math.inf)  # (B, 5)
    return torch.cat([table, hits.sum().view(1)])  # (K * columns + 1,)


def summary(counts, classes):
    """What a result.json holds of counts: {top1, top5, mean_per_class in per cent, images, per_class in per cent,
    confusion (true x predicted), unless there are more than LARGEST}. A class without images has no accuracy and no
    part in the mean."""
    K = len(classes)
    table, top5 = counts[:-1].view(K, -1).cpu(), int(counts[-1])  # (K, columns)
    right = table.diag() if K <= LARGEST else table[:, 1]  # (K,)
    num_images = int(table.sum())
    rates = 100 * right.double() / table.sum(dim=1)  # (K,), NaN for a class without images
    per_class = [None if math.isnan(rate) else round(rate, 2) for rate in rates.tolist()]

    result = {"top1": 100 * int(right.sum()) / num_images, "top5": 100 * top5 / num_images,
              "mean_per_class": rates.nanmean().item(), "images": num_images,
              "per_class": dict(zip(classes, per_class, strict=True))}
    if K <= LARGEST:
        result["confusion"] = table.tolist()
    return result


@torch.no_grad()
def accuracy(run, model, loader):
    """The `summary` of a classifier on the images of a loader. Exits with code 2 if its outputs are not finite."""
    K = len(loader.classes)
    counts = torch.zeros(K * num_columns(K) + 1, dtype=torch.int64, device=run.device)
    num_bad = torch.zeros((), dtype=torch.int64, device=run.device)
    neighbours.ready(run, model)
    for imgs, labels, _ in loader:
        imgs = normalize(imgs.to(run.device, non_blocking=True), run.cfg)
        labels = labels.to(run.device, non_blocking=True)
        with run.autocast():
            logits = model(imgs)  # (B, K)
        num_bad += (~logits.isfinite()).sum()
        counts += count(logits, labels)
    if run.world_size > 1:
        dist.all_reduce(counts)
    neighbours.require_finite(run, num_bad, "the classifier's outputs")
    return summary(counts, loader.classes)


def nearest(run, encoder, bank, queries, pool="mean", k=20):
    """The `summary` of k-NN: images of the loader `queries` get the classes of those of `bank` that are nearest."""
    scores, truth = neighbours.classify(run, encoder, bank, queries, pool, k)
    scores = scores.masked_fill(scores == 0, -math.inf)  # (n, K); a class without a vote is not among the five best
    return summary(count(scores, truth), queries.classes)


def report(run, result, **about):
    """Print a summary and write it, with what it is `about`, to OUT/result.json."""
    if run.is_main:
        print_once(f"top-1 {result['top1']:.2f} %  top-5 {result['top5']:.2f} %  mean of classes "
                   f"{result['mean_per_class']:.2f} %  of {result['images']} images")
        run.write_result(result, about, {"top1": result["top1"], "top5": result["top5"]})
        if run.steps_done == run.start_step:  # nothing was trained: no line at the end says where the numbers are
            print_once(f"numbers: {run.out / 'result.json'}")
