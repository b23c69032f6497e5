r"""Fine-tuning: what a pre-trained encoder is worth once there are labels.

    encoder.pt --> encoder --> mean of patch tokens (or class token) --> norm --> linear head -->
    cross-entropy

One script for every protocol: all of it trains, with smaller learning rates for earlier layers; or
the last blocks (--train_blocks 4), or the head alone (--mode linear), or nothing (--mode knn); from
pre-trained or from random weights (--init none). Set-up and step are those of mae.py. What differs
is the model, and labels instead of masks.

Paper: He et al., Masked Autoencoders Are Scalable Vision Learners, arXiv 2111.06377, 4.3, A.1, A.2.

    CPU     python finetune.py --config configs/finetune_tiny.yaml --init runs/mae/encoder.pt \
                --out runs/finetune                                                  (top-1 76.9)
    1 GPU   python finetune.py --config configs/finetune_vit_b.yaml --data /data/imagenet \
                --init runs/mae_vit_b/encoder.pt --out runs/finetune_vit_b
    8 GPUs  torchrun --nproc-per-node 8 finetune.py --config configs/finetune_vit_b.yaml \
                --data /data/imagenet --init runs/mae_vit_b/encoder.pt \
                --out runs/finetune_vit_b                                             (not measured)
    check   python finetune.py --eval --data shapes --init runs/finetune/encoder.pt --out runs/eval
"""

import copy
import dataclasses

import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.transforms import v2

import data
import models
from common import (
    checkpoint,
    config,
    engine,
    evaluate,
    neighbours,
    optim,
    plan,
    randomness,
    transforms,
    weights,
)


@dataclasses.dataclass
class Config(config.RunConfig):
    """Fine-tuning of ViT-B as in MAE's released recipe; the paper has another lr and decay."""
    # The method
    init: str = "none"  # encoder.pt of a run, or published weights; none for random weights
    init_size: config.Size = (0, 0)  # of the images that published weights were made for, if needed
    num_heads: int = 0  # of published weights of a ViT, which do not tell; 0 as is usual
    weights: str = ""  # which of several in a published file, as ema; empty for model, state_dict
    class_names: str = ""  # file with the classes of a published classifier, a line each, in order
    mode: str = "finetune"  # finetune; linear: the head alone (see LINEAR); knn: nothing trains
    train_blocks: float = 0.0  # train only the last blocks; 0.5 is the last one's MLP; 0 trains all
    model: str = "auto"  # vit_b, swin_t, pvtv2_b2, torchvision:resnet18, ...; auto as in --init
    patch_size: int = 0  # pixels; 0 as in --init, or 16 for a ViT and 4 for a pyramid
    window: int = 0  # side of Swin's windows in tokens; 0 as in --init, or 7
    pool: str = "auto"  # mean of patch tokens, cls (class token); auto as in --init, or mean
    head_norm: str = "auto"  # layer, batch (no affine), none; auto: see choose_head
    head_start: str = "random"  # random, probe: logistic regression on frozen features
    head_l2: float = 1e-2  # weight of its squared norm (ours); 0: chosen by cross-validation
    neighbours: int = 20  # of an image, which vote in knn
    ema: float = 0.0  # decay of a moving average of the weights, which then counts; 0 for none
    eval: bool = False  # evaluate the classifier in --init and stop
    eval_epochs: float = 5.0  # epochs between evaluations
    split: str = "val"  # evaluate on val or test
    labels: int = 0  # train on so many images, the same number of every class; 0 for all
    # The recipe
    img_size: config.Size = (0, 0)  # height x width in pixels; 0 as in --init, or 224
    in_chans: int = 0  # image channels; 0 as in --init, or 3
    layer_decay: float = 0.65  # lr of a layer relative to the next one
    drop_path: float = 0.1  # stochastic depth of the last block; grows linearly from 0 at the first
    mixup: float = 0.8  # alpha of mixup; 0 for none
    cutmix: float = 1.0  # alpha of cutmix; 0 for none; with both, every batch takes one of them
    smoothing: float = 0.1  # label smoothing
    rand_augment: bool = True  # two random operations of magnitude 9
    color_jitter: float = 0.0  # strength; 0 for none
    random_erasing: float = 0.25  # probability
    crop_scale: tuple[float, float] = (0.08, 1.0)  # area that a crop covers; 1,1 for none
    flip: float = 0.5  # probability of a horizontal flip
    shift: int = 0  # largest random shift in pixels
    epochs: float = 100.0  # passes over the labelled images
    warmup_epochs: float = 5.0  # linear warm-up of the learning rate
    batch_size: int = 1024  # images of one optimizer step, over all processes
    micro_batch: int = 128  # images that one process holds at once
    base_lr: float = 5e-4  # per lr_batch images: lr = base_lr * batch_size / lr_batch
    lr_batch: int = 256  # images that base_lr is stated for
    min_lr: float = 1e-6  # end of the cosine
    optimizer: str = "auto"  # adamw, lars, sgd; auto is lars for linear, or else adamw
    weight_decay: float = 0.05  # of matrices
    betas: tuple[float, float] = (0.9, 0.999)  # AdamW
    clip_grad: float = 0.0  # largest gradient norm; 0 for no clipping

    may_change = ("micro_batch", "eval_epochs", "neighbours")
    own_recipes = True

    def check(self):
        super().check()
        config.one_of(self, mode="finetune linear knn", head_start="random probe")
        config.one_of(self, split="val test", optimizer="auto adamw lars sgd")
        config.one_of(self, pool="auto mean cls", head_norm="auto layer batch none")
        config.in_range(self, mixup="[0, inf)", cutmix="[0, inf)", color_jitter="[0, inf)")
        config.in_range(self, smoothing="[0, 1]", random_erasing="[0, 1]", layer_decay="[0, 1]")
        config.in_range(self, drop_path="[0, 1)", ema="[0, 1)", neighbours="[1, inf)")
        config.in_range(self, labels="[0, inf)", shift="[0, inf)", eval_epochs="[0, inf)")
        config.in_range(self, head_l2="[0, inf)")
        if self.mode == "linear" and (self.mixup or self.cutmix):
            raise ValueError("--mixup and --cutmix are of --mode finetune, and must be 0 in linear")
        if self.eval and self.mode == "knn":
            raise ValueError("one of --eval and --mode knn at a time")
        if self.plan and self.evaluates_only():
            raise ValueError("--plan is of training, and --eval and --mode knn have none")
        if self.train_blocks and self.mode != "finetune":
            raise ValueError(f"--train_blocks {self.train_blocks:g}: nothing of the encoder trains "
                             f"in --mode {self.mode}")
        if self.init == "none" and self.eval:
            raise ValueError("--eval needs a classifier in --init")
        if self.init == "none" and self.model == "auto":
            raise ValueError("--init, the encoder.pt of a pre-trained network, is missing; --model "
                             "starts one from random weights instead")

    def next_commands(self):
        return [["-m", "tools.show", "IMAGE", "--init", f"{self.out}/encoder.pt"],
                ["-m", "tools.show", "--confusion", f"{self.out}/result.json"]]

    def evaluates_only(self):
        return self.eval or self.mode == "knn"


# What --mode linear has for defaults: MAE's linear probing of ViT-B (A.1), but for the class token
# (--pool cls), which not every encoder has.
LINEAR = {
    "drop_path": 0.0, "mixup": 0.0, "cutmix": 0.0, "smoothing": 0.0, "rand_augment": False,
    "random_erasing": 0.0, "epochs": 90.0, "warmup_epochs": 10.0, "batch_size": 16384,
    "micro_batch": 512, "base_lr": 0.1, "min_lr": 0.0, "weight_decay": 0.0,
}


# ---------------------------------------- Model

class Classifier(nn.Module):
    """An encoder with a linear head on pooled, normalised features.

    The norm between them is a LayerNorm in place of the encoder's last one (`layer`, as in MAE's
    code for mean pooling), a BatchNorm without affine (`batch`, MAE, A.1), or nothing (`none`).
    `average`: a copy whose weights follow slowly (MAE, A.2), or None. ValueError for another pool.
    """

    def __init__(self, encoder, num_classes, pool="mean", head_norm="layer"):
        super().__init__()
        if pool == "cls" and encoder.num_prefix == 0:
            raise ValueError(f"--pool cls, but {encoder.arch['model']} has no class token: mean")
        self.encoder, self.pool, self.head_norm = encoder, pool, head_norm
        if head_norm == "layer":
            self.fc_norm = nn.LayerNorm(encoder.width, eps=1e-6)
        elif head_norm == "batch":
            self.fc_norm = nn.BatchNorm1d(encoder.width, affine=False, eps=1e-6)
        else:
            self.fc_norm = nn.Identity()
        self.head = nn.Linear(encoder.width, num_classes)
        nn.init.normal_(self.head.weight, std=0.01 if head_norm == "batch" else 2e-5)  # MAE's code
        nn.init.zeros_(self.head.bias)
        self.num_noise = 2 * encoder.num_layers
        self.average = None

    def forward(self, imgs, noise=None):
        """imgs (B, C, H, W), or features (B, D) that were kept, -> logits (B, K). noise (B, 2 *
        layers): for stochastic depth, or none."""
        features = imgs
        if imgs.dim() == 4:
            features = neighbours.pooled(self.encoder, imgs, self.pool, noise)  # (B, D)
        return self.head(self.fc_norm(features))  # (B, K)

    def train(self, mode=True):
        """What is frozen stays in eval mode, so that BatchNorm in it keeps its statistics."""
        super().train(mode)
        for module in self.encoder.modules():
            parameters = list(module.parameters(recurse=False))
            if parameters and not any(p.requires_grad for p in parameters):
                module.eval()
        return self

    def export(self, classes):
        """What encoder.pt needs beside the encoder to classify again: plain data and tensors."""
        tensors = {name: tensor for name, tensor in self.state_dict().items()
                   if name.startswith(("fc_norm.", "head."))}
        return {"pool": self.pool, "head_norm": self.head_norm, "classes": list(classes),
                "tensors": tensors}


def choose_head(cfg, saved, evaluates):
    """(pool, head_norm) of the classifier that the options and --init ask for. ValueError if they
    contradict each other."""
    head = saved.get("classifier") if saved else None
    pool = cfg.pool
    if pool == "auto":
        pool = head["pool"] if head else "mean"
    lost_norm = bool(saved) and weights.lost_its_norm(saved)  # it went into a head

    if evaluates:
        head_norm = head["head_norm"]
        if pool != head["pool"] or cfg.head_norm not in ("auto", head_norm):
            raise ValueError(f"--pool {pool} --head_norm {cfg.head_norm}, but the classifier in "
                             f"{cfg.init} pools by {head['pool']} and has the norm {head_norm}")
    elif cfg.head_norm != "auto":
        head_norm = cfg.head_norm
    elif lost_norm:
        head_norm = "layer"
    elif cfg.mode == "knn":
        head_norm = "none"
    elif cfg.mode == "linear" or cfg.head_start == "probe":
        head_norm = "batch"
    else:
        head_norm = "layer" if pool == "mean" else "none"

    if lost_norm and head_norm != "layer":
        raise ValueError(f"--head_norm {head_norm}, but the last norm of the encoder in {cfg.init} "
                         "went into a head: layer, or auto, starts another one")
    return pool, head_norm


def build_classifier(cfg, saved, classes, load=True):
    """The classifier to train or, with --eval, to evaluate. Its encoder is the one in `saved`, or
    has random weights (always without `load`). ValueError, in one line, if `saved` does not fit, or
    has no classifier of these classes."""
    evaluates = load and cfg.eval
    head = saved.get("classifier") if saved else None
    is_unnamed = bool(head and head.get("unnamed"))  # from elsewhere: its classes have no names,
    if is_unnamed and cfg.pool != "auto":  # nor do names tell what it pools
        head = {**head, "pool": cfg.pool}
        saved = {**saved, "classifier": head}
    if evaluates:
        head = evaluate.of_classes(head, classes, cfg.init)
        saved = {**saved, "classifier": head}

    pool, head_norm = choose_head(cfg, saved, evaluates)
    trains = cfg.mode == "finetune"
    encoder = weights.encoder_for(cfg, saved, models.from_arch, trains,
                                  final_norm=head_norm != "layer")
    model = Classifier(encoder, len(classes), pool, head_norm)
    if saved and load:
        load_weights(cfg, model, saved, classes)

    model.requires_grad_(trains)
    model.head.requires_grad_(True)
    if cfg.train_blocks:
        freeze(model.encoder, cfg.train_blocks)
    if cfg.ema and not cfg.evaluates_only():
        model.average = copy.deepcopy(model).requires_grad_(False)
    return model


def load_weights(cfg, model, saved, classes):
    """Copy the encoder in `saved` and what still fits of its head, and print what that is: for the
    same classes all of it, so that fine-tuning goes on; for others the norm, which was trained with
    the encoder."""
    head = saved.get("classifier")
    kept = []
    if head and (head["pool"], head["head_norm"]) == (model.pool, model.head_norm):
        goes_on = cfg.mode == "finetune" and cfg.head_start == "random"
        same_classes = head["classes"] == classes
        kept = ["fc_norm", "head"] if cfg.eval or (goes_on and same_classes) else ["fc_norm"]
        notes = [*saved.get("notes", []), f"kept of its classifier: {', '.join(kept)}"]
        saved = {**saved, "notes": notes}
        del saved["classifier"]

    names = model.export(classes)["tensors"]
    fresh = [name for name in names if name.split(".")[0] not in kept]
    weights.load_encoder(model.encoder, saved, cfg.init, fresh, cfg)
    for part in kept:
        tensors = {name.removeprefix(part + "."): tensor for name, tensor in head["tensors"].items()
                   if name.startswith(part + ".")}
        checkpoint.load_exactly(getattr(model, part), tensors, f"{cfg.init}, {part}")


# ---------------------------------------- What a protocol does to a model

def freeze(encoder, train_blocks):
    """Leave the last `train_blocks` blocks of an encoder to train, and what comes after them. Half
    a block, as in 0.5 or 1.5, is its MLP with the norm ahead of it (MAE, Fig. 9), and a merging
    behind it. ValueError if there are no such blocks."""
    if train_blocks % 0.5 or not 0 < train_blocks <= encoder.num_layers:
        raise ValueError(f"--train_blocks takes 0.5, 1, 1.5, ... {encoder.num_layers}, not "
                         f"{train_blocks:g}")
    last_frozen = encoder.num_layers - int(train_blocks)  # of which the MLP may train
    has_half = train_blocks % 1 > 0
    found_half = False
    for name, parameter in encoder.named_parameters():
        depth = encoder.layer_id(name)
        in_block = "blocks." in name
        in_second_half = any(part in name for part in (".norm2.", ".mlp.", ".gamma_2"))
        is_half = has_half and depth == last_frozen and (in_second_half or not in_block)
        parameter.requires_grad_(depth > last_frozen or is_half)
        found_half = found_half or (is_half and in_block)
    if has_half and not found_half:
        raise ValueError(f"--train_blocks {train_blocks:g}: the blocks of "
                         f"{encoder.arch['model']} have no MLP half")


def start_head(model, features, labels, l2):
    """Put L2-regularised logistic regression on normalised features (n, D), labels (n,), into the
    head, so that fine-tuning does not begin by bending the encoder to a random one (Kumar et al.,
    2022). With an l2 of 0, cross-validation chooses it."""
    if isinstance(model.fc_norm, nn.BatchNorm1d):
        model.fc_norm.running_mean.copy_(features.mean(dim=0))
        model.fc_norm.running_var.copy_(features.var(dim=0, unbiased=False))
    with torch.no_grad():
        inputs = model.fc_norm.eval()(features)  # (n, D)
    if l2 == 0:
        l2 = choose_l2(model.head, inputs, labels)
        config.print_once(f"{'L2 of the head':>26}: {l2:g}, by cross-validation")
    fit_head(model.head, inputs, labels, l2)


def fit_head(head, inputs, labels, l2):
    """Logistic regression of inputs (n, D) on labels (n,): the head that makes cross-entropy plus
    l2 times its squared weights least."""
    solver = torch.optim.LBFGS(head.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        solver.zero_grad()
        loss = F.cross_entropy(head(inputs), labels) + l2 * head.weight.square().sum()
        loss.backward()
        return loss

    solver.step(closure)
    head.zero_grad(set_to_none=True)


def choose_l2(head, inputs, labels):
    """The L2 with which most images are right when the other four fifths have taught the head."""
    fold = folds(labels)
    hits = {}
    for l2 in (1e-5, 1e-4, 1e-3, 1e-2, 1e-1):
        hits[l2] = 0
        for k in range(5):
            is_held_out = fold == k
            trial = copy.deepcopy(head)
            fit_head(trial, inputs[~is_held_out], labels[~is_held_out], l2)
            guesses = trial(inputs[is_held_out]).argmax(dim=1)
            hits[l2] += int((guesses == labels[is_held_out]).sum())
    return max(hits, key=hits.get)


def folds(labels):
    """A fifth, 0 to 4, for each of labels (n,): by position. Where a fifth would so hold more than
    half of a class, as it does of labels that come in a cycle, by position once they are sorted by
    class: else the head would be asked for classes that it was never taught."""
    fold = torch.arange(len(labels), device=labels.device) % 5  # (n,)
    counts = torch.bincount(labels * 5 + fold, minlength=5 * (int(labels.max()) + 1)).view(-1, 5)
    most, total = counts.amax(dim=1), counts.sum(dim=1)  # each (K,)
    if (2 * most > total).any():
        by_class = labels.argsort(stable=True)  # (n,)
        fold[by_class] = fold.clone()
    return fold


def mix(imgs, targets, cfg, seed):
    """Mixup (Zhang et al., 2018) or cutmix (Yun et al., 2019) with one ratio for the whole global
    batch: imgs (B, C, H, W), targets (B, K) one-hot -> the same shapes.

    Images at positions 2i and 2i + 1 are each other's partners, so that no process needs an image
    that another one holds. torchvision mixes an image with the next of its batch: handing over all
    first and all second partners as a "batch" of two does just that.
    """
    choices = []
    if cfg.mixup > 0:
        choices.append(v2.MixUp(alpha=cfg.mixup, num_classes=2))
    if cfg.cutmix > 0:
        choices.append(v2.CutMix(alpha=cfg.cutmix, num_classes=2))
    if not choices:
        return imgs, targets

    # DIFF: partners in mixup and cutmix are neighbours; timm pairs the first image of a batch with
    # the last.
    B, C, H, W = imgs.shape
    if B % 2:  # the last image of a short batch is its own partner
        imgs = torch.cat([imgs, imgs[-1:]])  # (B + 1, C, H, W)
        targets = torch.cat([targets, targets[-1:]])  # (B + 1, K)
        imgs, targets = mix(imgs, targets, cfg, seed)
        return imgs[:B], targets[:B]

    pairs = imgs.view(B // 2, 2, C, H, W).transpose(0, 1)  # (2, B/2, C, H, W)
    pairs = pairs.reshape(2, -1, H, W)  # (2, B/2 * C, H, W)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        ids = torch.arange(2, device=imgs.device)
        pairs, share = v2.RandomChoice(choices)(pairs, ids)  # share (2, 2)
    imgs = pairs.view(2, B // 2, C, H, W).transpose(0, 1).reshape(B, C, H, W)  # (B, C, H, W)
    partners = targets.view(B // 2, 2, -1).flip(1).view(B, -1)  # (B, K)
    return imgs, share[0, 0] * targets + share[0, 1] * partners


def keep_features(cfg, run, model, dataset):
    """A data set of features (D,) in the place of images, for a head that trains alone on images
    that augmentation leaves as they are: exact, for a frozen encoder."""
    images = data.evaluation(dataset, cfg, run)
    features, labels = neighbours.extract(run, model.encoder, images, model.pool)
    config.print_once(f"features of {len(labels)} images kept: nothing changes an image from epoch "
                      "to epoch")
    source = data.Memory(features.cpu(), labels.cpu(), images.classes)
    return data.Images(source, nn.Identity(), cfg.seed)


def build_optimizer(cfg, model):
    """AdamW, LARS or SGD with momentum (MAE, A.1), for layers that learn at rates of their own."""
    lr_scale = optim.layer_decay(model, cfg.layer_decay)
    groups = optim.parameter_groups(model, cfg.weight_decay, lr_scale)
    kind = cfg.optimizer
    if kind == "auto":
        kind = "lars" if cfg.mode == "linear" else "adamw"
    if kind == "lars":
        return optim.LARS(groups)
    if kind == "sgd":
        return torch.optim.SGD(groups, momentum=0.9)
    return torch.optim.AdamW(groups, betas=cfg.betas, fused=True)


def evaluate_alone(cfg, run, model, val):
    """--eval and --mode knn: an evaluation without training."""
    bank = None
    if cfg.mode == "knn":
        bank = data.evaluation(data.labelled_set(cfg, "train", augment=False), cfg, run)
    if run.is_main:
        run.take_folder()
    if bank:
        result = evaluate.nearest(run, model.encoder, bank, val, model.pool, cfg.neighbours)
    else:
        result = evaluate.accuracy(run, model, val)
    evaluate.report(run, result, init=cfg.init)
    engine.leave_processes()


def resolve(cfg):
    """(cfg with model, sizes and channels as --init has them, content of --init). ValueError or
    FileNotFoundError, in one line, if it is no encoder or another one than the options ask for."""
    cfg.check()
    cfg, saved = weights.as_in_init(cfg, models.from_arch, models.SIZES)
    if cfg.eval and "classifier" not in saved:
        raise ValueError(f"--eval: {cfg.init} holds an encoder and no classifier; fine-tune it "
                         "first")
    if cfg.class_names:
        head = evaluate.named(saved and saved.get("classifier"), cfg.class_names)
        saved = {**saved, "classifier": head}
    return cfg, saved


# ---------------------------------------- Training

@engine.record
def main(argv=None):
    cfg = config.parse(Config, __doc__, argv, presets={"linear": LINEAR})
    with config.user_errors():
        cfg, saved = resolve(cfg)
    run = engine.Run(cfg)  # processes, device, precision
    with config.user_errors():  # what is wrong with options, images or a checkpoint: one line
        if cfg.plan:
            classes = range(1000)
            return plan.show(cfg, lambda cfg: build_classifier(cfg, saved, classes, load=False))
        val = data.evaluation(data.labelled_set(cfg, cfg.split), cfg, run)
        model = build_classifier(cfg, saved, val.classes).to(run.device)
        if cfg.evaluates_only():
            return evaluate_alone(cfg, run, model, val)
        dataset = data.labelled_set(cfg, "train")
        sampler = data.global_batches(len(dataset), cfg, run)
        optimizer = build_optimizer(cfg, model)
        schedule = optim.Schedule(cfg, sampler.steps_per_epoch)
        start_step = run.begin(model, optimizer, schedule, sampler, dataset)
    if cfg.head_start == "probe" and start_step == 0:
        plain = data.evaluation(data.labelled_set(cfg, "train", augment=False), cfg, run)
        features, labels = neighbours.extract(run, model.encoder, plain, model.pool)
        start_head(model, features, labels, cfg.head_l2)
        if cfg.ema:  # the average begins where the head does
            optim.update_ema(model.average, model, 0.0)
    keeps_features = cfg.mode == "linear" and transforms.always_alike(cfg)
    if keeps_features:
        dataset = keep_features(cfg, run, model, dataset)
    best = model.average if cfg.ema else model  # what is evaluated and exported
    net = run.distribute(model)
    batches = data.loader(dataset, sampler.batches(start_step, run.last_step), cfg.workers)
    batches = run.timed(batches)

    model.train()
    for step in range(start_step, run.last_step):
        # Learning rate of this step
        lr = schedule.lr(step)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]

        # Forward and backward: one global batch, shared by processes and cut into micro-batches
        batch_size, num_micro_batches = sampler.size(step), sampler.num_micro_batches(step)
        noise = randomness.noise(cfg.seed, step, batch_size, model.num_noise, use="drop path")
        loss_sum = torch.zeros((), device=run.device)
        for micro_step in range(num_micro_batches):
            imgs, labels, positions = next(batches)  # positions of these images in the global batch
            imgs = imgs.to(run.device, non_blocking=True)
            if not keeps_features:
                imgs = transforms.normalize(imgs, cfg)  # (B, C, H, W)
            labels = labels.to(run.device, non_blocking=True)
            targets = F.one_hot(labels, len(val.classes)).float()  # (B, K)
            if cfg.mode == "finetune":
                seed = randomness.seed_of(cfg.seed, "mix", step)
                imgs, targets = mix(imgs, targets, cfg, seed)
            own_noise = noise[positions]  # (B, 2 * layers), on the CPU: see layers.add_branch
            is_last = micro_step == num_micro_batches - 1
            with run.sync_gradients(net, is_last), run.autocast():
                logits = net(imgs, own_noise).float()  # (B, K)
                loss = F.cross_entropy(logits, targets, label_smoothing=cfg.smoothing)
                loss = loss * (len(imgs) / batch_size)
            run.scaler.scale(loss * run.world_size).backward()  # DDP averages: this makes it a sum
            loss_sum += loss.detach()

        # Update
        run.scaler.unscale_(optimizer)
        grad_norm = optim.clip(model, cfg.clip_grad)
        loss, grad_norm = run.all_reduce_stats(step, lr, loss_sum, grad_norm)  # stops at a NaN
        run.scaler.step(optimizer)
        run.scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if cfg.ema:
            optim.update_ema(model.average, model, cfg.ema)

        # Log, checkpoint, evaluation
        run.log(step, batch_size, loss, lr, grad_norm)
        if run.save_due(step):
            run.save(step, model, optimizer, best.encoder, classifier=best.export(val.classes))
        if run.stop_requested:
            break
        if run.due(step, cfg.eval_epochs) and step + 1 < run.last_step:
            result = evaluate.accuracy(run, best, val)
            run.note(step=step + 1, top1=result["top1"], top5=result["top5"])
            model.train()
    if run.steps_done == run.last_step:
        evaluate.report(run, evaluate.accuracy(run, best, val), step=run.steps_done)
    run.finish()


if __name__ == "__main__":
    main()
