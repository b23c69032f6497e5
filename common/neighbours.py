"""Is the representation any good? Features of a data set, and a k-NN classifier on them, which needs no training.

    loader --extract--> features (n, D), labels (n,) --neighbours--> scores (n, K)

A loader (data.evaluation) gives a process every world_size-th of the batches that one process would make: imgs uint8
(B, C, H, W), labels (B,), indices (B,). So a batch gives the same numbers on any number of processes.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F

from common import config, engine
from common.transforms import normalize


def pooled(encoder, imgs, pool="mean", noise=None):
    """(B, C, H, W) -> features (B, D): the mean of the patch tokens, or `cls`, the class token. `noise`: see encode."""
    latent = encoder.encode(encoder.embed(imgs), noise=noise)  # (B, num_prefix + N, D)
    if pool == "cls":
        return latent[:, 0]  # (B, D)
    return latent[:, encoder.num_prefix :].mean(dim=1)  # (B, D)


def ready(run, model):
    """The model in evaluation mode, on all processes with BatchNorm's statistics of process 0: the ones saved."""
    if run.world_size > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    return model.eval()


def require_finite(run, num_bad, what):
    """Exit with code 2, all processes alike, if one of them has met numbers that are not finite."""
    if run.world_size > 1:
        dist.all_reduce(num_bad)
    if num_bad:
        engine.leave_processes()
        config.fail(f"{what} are not finite: there is no score; try --precision fp32")


@torch.no_grad()
def extract(run, encoder, loader, pool="mean"):
    """Features (n, D), fp32, and labels (n,) of a data set, in order, on every process; broken images are left out."""
    features = torch.zeros(loader.num_images, encoder.width, device=run.device)
    labels = torch.full((loader.num_images,), -1, device=run.device)  # -1: broken, or on another process

    was_training = encoder.training
    ready(run, encoder)
    for imgs, batch_labels, indices in loader:
        imgs = normalize(imgs.to(run.device, non_blocking=True), run.cfg)
        indices = indices.to(run.device, non_blocking=True)
        with run.autocast():
            features[indices] = pooled(encoder, imgs, pool).float()
        labels[indices] = batch_labels.to(run.device, non_blocking=True)
    encoder.train(was_training)

    if run.world_size > 1:
        dist.all_reduce(features)  # a sum of rows and zeros
        dist.all_reduce(labels, dist.ReduceOp.MAX)
    require_finite(run, (~features.isfinite()).sum(), "the encoder's features")
    is_whole = labels >= 0  # (n,)
    return features[is_whole], labels[is_whole]


def neighbours(bank, labels, queries, K, k=20, temperature=0.07):
    """Scores (n, K) of a weighted k-NN classifier: each of the k features of `bank` (m, D) that are nearest to a query
    (n, D) by cosine adds exp(cosine / temperature) to its class (Wu et al., 2018; k = 20: Caron et al., 2021). A bank
    of fewer votes as a whole. Features come unnormalised. Queries go in parts, b at a time, so that (n, m) never is."""
    bank, queries = F.normalize(bank, dim=1), F.normalize(queries, dim=1)
    scores = []
    for part in queries.split(256):
        cosine, nearest = (part @ bank.T).topk(min(k, len(bank)), dim=1)  # each (b, k)
        weights = (cosine / temperature).exp()[:, :, None]  # (b, k, 1)
        votes = F.one_hot(labels[nearest], K) * weights  # (b, k, K)
        scores.append(votes.sum(dim=1))
    return torch.cat(scores)  # (n, K)


def classify(run, encoder, bank, queries, pool="mean", k=20):
    """Scores (n, K) that the images of the loader `bank` give those of `queries`, whose true labels are (n,)."""
    features, labels = extract(run, encoder, bank, pool)
    query_features, truth = extract(run, encoder, queries, pool)
    return neighbours(features, labels, query_features, len(bank.classes), k), truth


def probe(run, step, encoder, bank, queries):
    """Print and log the k-NN accuracy of the encoder as it is. Draws no number and changes no weight, so that training
    goes the same way with and without."""
    scores, truth = classify(run, encoder, bank, queries)
    guesses = scores.topk(min(5, scores.shape[1]), dim=1).indices[:, 0]  # (n,); ties as in evaluate.count
    top1 = 100 * int((guesses == truth).sum()) / len(truth)
    run.note(step=step + 1, knn_top1=top1)
    if run.is_main:
        run.bar.write(f"step {step + 1}: k-NN top-1 {top1:.2f} % of {len(truth)} images")
