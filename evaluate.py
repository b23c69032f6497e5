"""What an encoder or a classifier is worth, in numbers that do not depend on how many processes counted.

    data set --extract--> features (n, D), labels (n,) --neighbours--> scores (n, K) --count--> counts --> top-1, ...

Every image counts once. A process takes every world-th of the batches that one process would make, so that a batch
holds the same images and gives the same numbers; what is added up over processes are integers, or rows and zeros.
"""

import json
import types

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

import data
import engine
import figures

# ---------------------------------------- Features


def pooled(encoder, imgs, pool="mean", noise=None):
    """(B, C, H, W) -> features (B, D): the mean of an encoder's patch tokens, or `cls`, its class token. `noise`
    (B, 2 * layers) as the encoder takes it."""
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


@torch.no_grad()
def extract(cfg, run, encoder, dataset, pool="mean"):
    """Features (n, D), fp32, and labels (n,) of a whole data set, in order, on every process."""
    features = torch.zeros(len(dataset), encoder.width, device=run.device)
    labels = torch.zeros(len(dataset), dtype=torch.int64, device=run.device)
    encoder, was_training = ready(run, encoder), encoder.training
    for imgs, its_labels, indices in batches_of(cfg, run, dataset):
        with engine.autocast(run):
            features[indices] = pooled(encoder, imgs, pool).float()
        labels[indices] = its_labels
    encoder.train(was_training)
    if run.world > 1:
        for table in (features, labels):
            dist.all_reduce(table)
    return features, labels


def start_head(model, features, labels):
    """Put the solution of L2-regularised logistic regression on normalised features (n, D), labels (n,), into the head,
    so that fine-tuning does not begin by bending the encoder to a random head (Kumar et al., 2022)."""
    if isinstance(model.fc_norm, nn.BatchNorm1d):
        model.fc_norm.running_mean.copy_(features.mean(dim=0))
        model.fc_norm.running_var.copy_(features.var(dim=0, unbiased=False))
    with torch.no_grad():
        inputs = model.fc_norm.eval()(features)
    solver = torch.optim.LBFGS(model.head.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        solver.zero_grad()
        loss = F.cross_entropy(model.head(inputs), labels) + 1e-2 * model.head.weight.square().sum()  # 1e-2: ours
        loss.backward()
        return loss

    solver.step(closure)
    model.head.zero_grad(set_to_none=True)


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
    (bank, labels), (queries, truth) = (extract(cfg, run, encoder, part) for part in sets)
    K = len(sets[0].source.classes)
    top1 = 100 * (neighbours(bank, labels, queries, K).argmax(dim=1) == truth).double().mean().item()
    engine.note(run, step=step + 1, knn_top1=top1)
    if run.main:
        run.bar.write(f"step {step + 1}: k-NN top-1 {top1:.2f} % of {len(truth)} images")


# ---------------------------------------- Accuracy


def count(scores, labels):
    """Integers (K * K + 1,) of scores (B, K), labels (B,): the confusion matrix (true x predicted), then how often the
    label is among the five best."""
    K = scores.shape[1]
    best = scores.topk(min(5, K), dim=1).indices  # (B, 5)
    confusion = torch.bincount(labels * K + best[:, 0], minlength=K * K)
    return torch.cat([confusion, (best == labels[:, None]).sum().view(1)])  # (K * K + 1,)


def summary(counts, classes):
    """What a result.json holds of counts: {top1, top5, mean_per_class in per cent, images, per_class in per cent,
    confusion (true x predicted)}. A class without images has no accuracy and no part in the mean."""
    K = len(classes)
    confusion, n = counts[:-1].view(K, K).cpu(), int(counts[:-1].sum())  # (K, K)
    rates = {name: round(100 * int(row[i]) / int(row.sum()), 2) if row.any() else None
             for i, (name, row) in enumerate(zip(classes, confusion, strict=True))}
    present = confusion[confusion.any(dim=1)].sum(dim=1), confusion.diag()[confusion.any(dim=1)]
    return {"top1": 100 * int(confusion.trace()) / n, "top5": 100 * int(counts[-1]) / n,
            "mean_per_class": 100 * (present[1].double() / present[0]).mean().item(), "images": n,
            "per_class": rates, "confusion": confusion.tolist()}


@torch.no_grad()
def accuracy(cfg, run, model, dataset):
    """The `summary` of a classifier on a data set."""
    classes = dataset.source.classes
    counts = torch.zeros(len(classes) ** 2 + 1, dtype=torch.int64, device=run.device)
    ready(run, model)
    for imgs, labels, _ in batches_of(cfg, run, dataset):
        with engine.autocast(run):
            logits = model(imgs)  # (B, K)
        counts += count(logits, labels)
    if run.world > 1:
        dist.all_reduce(counts)
    return summary(counts, classes)


def report(cfg, run, result, **about):
    """Print the accuracy, write OUT/result.json and, if asked for, draw the confusion matrix."""
    if run.main:
        print(f"top-1 {result['top1']:.2f} %  top-5 {result['top5']:.2f} %  mean of classes "
              f"{result['mean_per_class']:.2f} %  of {result['images']} images", flush=True)
        (run.out / "result.json").write_text(json.dumps({**about, **result}, indent=1) + "\n")
        if cfg.confusion:
            figures.confusion(run.out / "pictures" / "confusion.png", result["confusion"], list(result["per_class"]))
