"""What dense.py predicts for every pixel: the loss, the scores, the evaluation, and what a prediction looks like.

`output` (B, K, H, W) fp32 is what the head makes, `label` (B, H, W) what dense_data.py gives, `pred` (B, H, W) like it;
of keypoints both are (B, K, H, W).
`key`: what the colours of painted labels mean, as figures.grid takes it.
`loss` is the mean over the known pixels of each image, whatever else is in its batch. Tallies add up, over batches and
processes, to what `scores` needs.
"""

import colorsys
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F

import data
from common import config, neighbours, transforms

UNKNOWN = 255  # class of a pixel that nobody labelled; a distance is unknown where it is 0


class Segment:
    """A class for every pixel: cross-entropy, mean intersection over union."""

    def __init__(self, classes, max_depth):
        self.classes, self.about = list(classes), f"segment: {', '.join(classes)}"
        self.channels, self.counts = len(classes), len(classes) ** 2
        hues = [0.618034 * k % 1 for k in range(len(classes) - 1)]  # multiples of the golden ratio lie far apart
        colours = [(0, 0, 0), *(colorsys.hsv_to_rgb(hue, 0.75, 1) for hue in hues)]
        self.palette = torch.tensor(colours + [(1, 1, 1)] * (UNKNOWN + 1 - len(classes)))  # (256, 3)

    def loss(self, output, label):
        error = F.cross_entropy(output, label.long(), ignore_index=UNKNOWN, reduction="none")  # (B, H, W)
        return error.sum(dim=(1, 2)) / (label != UNKNOWN).sum(dim=(1, 2)).clamp(min=1)

    def predict(self, output):
        return output.argmax(dim=1)  # (B, H, W)

    def tally(self, pred, label):
        """How often each pair of true class and predicted class occurs, (K*K,)."""
        known = label != UNKNOWN
        return torch.bincount(label[known].long() * self.channels + pred[known], minlength=self.counts)

    def scores(self, tally):
        pairs = tally.view(self.channels, -1)  # (K, K), true x predicted
        hits, union = pairs.diag(), pairs.sum(dim=0) + pairs.sum(dim=1) - pairs.diag()
        found = zip(self.classes, hits.tolist(), union.tolist(), strict=True)
        iou = {name: 100 * hit / n for name, hit, n in found if n}
        return {"miou": round(sum(iou.values()) / len(iou), 6),  # over the classes that occur, here or there
                "pixel_accuracy": round(100 * (hits.sum() / tally.sum()).item(), 6),
                "per_class": {name: round(value, 2) for name, value in iou.items()}}

    def paint(self, label):
        return self.palette[label.long()].movedim(3, 1)  # (B, 3, H, W)

    def key(self, labels):
        found = labels.unique().tolist()  # there may be 150 classes, but not in one picture
        names = {k: self.classes[k] if k < len(self.classes) else "not known" for k in found}
        return {"legend": {name: tuple(self.palette[k].tolist()) for k, name in names.items()}}


class Depth:
    """Metres for every pixel, a sigmoid times the largest (SECRETS); error of the logarithm, scale-invariant by half
    (Eigen et al., 2014); root mean squared error, relative error, share of pixels less than a quarter off."""

    def __init__(self, classes, max_depth):
        self.max_depth, self.about = max_depth, f"depth: up to {max_depth:g} m"
        self.channels, self.counts = 1, 4

    def loss(self, output, label):
        known = self.known(label)
        truth = torch.where(known, label, 1.0).log()
        error = (F.logsigmoid(output[:, 0]) + math.log(self.max_depth) - truth) * known  # (B, H, W)
        n = known.sum(dim=(1, 2)).clamp(min=1)
        return error.square().sum(dim=(1, 2)) / n - 0.5 * (error.sum(dim=(1, 2)) / n).square()

    def known(self, label):
        return (label > 0) & (label <= self.max_depth)

    def predict(self, output):
        return self.max_depth * output[:, 0].sigmoid()  # (B, H, W)

    def tally(self, pred, label):
        """Squared error, relative error, pixels less than a quarter off, pixels: sums, (4,)."""
        known = self.known(label)
        pred, label = pred[known].double(), label[known].double()
        near = torch.maximum(pred / label, label / pred) < 1.25
        parts = ((pred - label).square(), (pred - label).abs() / label, near, torch.ones_like(label))
        return torch.stack([part.sum() for part in parts])  # (4,)

    def scores(self, tally):
        squared, relative, near, n = tally.tolist()
        return {"rmse": round(math.sqrt(squared / n), 6), "abs_rel": round(relative / n, 6),
                "delta1": round(100 * near / n, 6)}

    def paint(self, label):
        return (label / self.max_depth).clamp(0, 1)[:, None]  # (B, 1, H, W)

    def key(self, labels):
        return {"bar": (0.0, self.max_depth, "metres")}


NEAR, SIGMA = 1 / 32, 2.0  # of the longer side: a keypoint so near is found; pixels, width of a heat map (ours)


def heat_maps(points, size):
    """Points (K, 2), (row, column) in pixels -> float32 (K, H, W): 1 there, and exp(-d^2 / (2 SIGMA^2)) at distance d,
    at the centres of pixels."""
    row, column = torch.arange(size[0])[:, None] + 0.5, torch.arange(size[1]) + 0.5  # (H, 1), (W,)
    squared = (row - points[:, 0, None, None]).square() + (column - points[:, 1, None, None]).square()  # (K, H, W)
    return torch.exp(-squared / (2 * SIGMA**2))


class Keypoints:
    """A heat map for each keypoint: squared error (Xiao et al., arXiv 1804.06208) as a share of what 0 would cost.
    A keypoint is where its map is highest. PCK: per cent of keypoints that are found, up to NEAR of the longer side
    away. One whose true map stays below 1/2 was cropped away, and does not count."""

    names = ("centre", "tip")

    def __init__(self, classes, max_depth):
        self.about, self.channels, self.counts = f"keypoints: {', '.join(self.names)}", len(self.names), 2 * 2

    def loss(self, output, label):
        error, size = (output - label).square(), label.square()  # each (B, K, H, W)
        return error.sum(dim=(1, 2, 3)) / size.sum(dim=(1, 2, 3)).clamp(min=1)

    def predict(self, output):
        return output  # (B, K, H, W)

    def peaks(self, maps):
        """(row, column) of the highest pixel of each map (B, K, H, W), as floats (B, K, 2)."""
        place = maps.flatten(2).argmax(dim=2)  # (B, K)
        return torch.stack([place // maps.shape[3], place % maps.shape[3]], dim=2).float()

    def tally(self, pred, label):
        """How many of each keypoint are found, and how many there are, (2*K,)."""
        known = label.amax(dim=(2, 3)) >= 0.5  # (B, K)
        distance = (self.peaks(pred) - self.peaks(label)).norm(dim=2)  # (B, K)
        found = known & (distance <= NEAR * max(label.shape[2:]))
        return torch.cat([found.sum(dim=0), known.sum(dim=0)])

    def scores(self, tally):
        found, known = tally.view(2, -1)  # each (K,)
        each = 100 * found / known.clamp(min=1)
        scores = {f"pck_{name}": round(share, 6) for name, share in zip(self.names, each.tolist(), strict=True)}
        return {"pck": round(100 * (found.sum() / known.sum()).item(), 6), **scores}

    def paint(self, label):
        return F.pad(label, (0, 0, 0, 0, 0, 1)).clamp(0, 1)  # (B, 3, H, W): red is the first, green the second

    def key(self, labels):
        return {"legend": dict(zip(self.names, [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0)], strict=True))}


TASKS = {"segment": Segment, "depth": Depth, "keypoints": Keypoints}


@config.user_errors()
@torch.no_grad()
def accuracy(run, model, loader):
    """{the scores of the task, images} on a loader (data.evaluation), each image once on any number of processes;
    exits with code 2 if not a single pixel is labelled."""
    device = "cpu" if run.device.type == "mps" else run.device  # mps has no float64
    tally = torch.zeros(model.task.counts + 1, dtype=torch.float64, device=device)  # the last one counts images
    num_bad = torch.zeros((), dtype=torch.int64, device=run.device)
    neighbours.ready(run, model)
    for (imgs, labels), _, _ in loader:
        with run.autocast():
            output = model(transforms.normalize(imgs.to(run.device, non_blocking=True), run.cfg))  # (B, K, H, W)
        labels = labels.to(device, non_blocking=True)
        tally[:-1] += model.task.tally(model.task.predict(output.float()).to(device), labels)
        tally[-1] += len(imgs)
        num_bad += (~output.isfinite()).sum()
    if run.world_size > 1:
        dist.all_reduce(tally)
    neighbours.require_finite(run, num_bad, "the outputs")
    if not tally[:-1].sum():
        raise ValueError(f"not a single pixel of {loader.num_images} labels is known")
    return {**model.task.scores(tally[:-1]), "images": int(tally[-1])}


@torch.no_grad()
def pictures(model, dataset, run, n=8):
    """{row title: (n, C, H, W) in [0, 1]}: the first images of a data set, their labels, what is predicted; and the key
    to their colours."""
    (imgs, labels), _, _ = next(iter(data.loader(dataset, data.in_order(len(dataset), n))))
    output = model.eval()(transforms.normalize(imgs.to(run.device), run.cfg)).float().cpu()
    pred = model.task.predict(output)
    rows = {"image": imgs / 255, "label": model.task.paint(labels), "prediction": model.task.paint(pred)}
    return rows, model.task.key(torch.cat([labels, pred]))
