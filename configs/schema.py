"""Every setting of a run, as frozen dataclasses. A value out of range is refused where it is declared.

Cross-field rules (batch against world size, schedule against steps) live in `configs/resolve.py`.
"""

import math
import shlex
from dataclasses import dataclass, field
from typing import Literal

from configs.errors import InputError

MAX_CYCLE = 4096  # positions in which a mixture gives every data set its share exactly


def require(ok: bool, name: str, value: object, rule: str, nearest: object) -> None:
    """Refuse a value.

    Raises:
        InputError: naming the field, its value, the rule it breaks and the nearest valid value.
    """
    if not ok:
        raise InputError(f"{name} = {value!r}: {rule}; nearest valid: {nearest!r}")


def in_range(name: str, value: float, low: float, high: float) -> None:
    """Refuse `value` outside [low, high], naming the nearer bound."""
    nearest = min(max(value, low), high)
    require(low <= value <= high, name, value, f"must be between {low:g} and {high:g}", nearest)


def at_least(name: str, value: float, low: float) -> None:
    """Refuse `value` below `low`."""
    require(value >= low, name, value, f"must be at least {low:g}", low)


@dataclass(frozen=True)
class Model:
    """Which network, at which size of picture."""

    name: str = "coatnet0"  # a name of `coatnet models`
    resolution: int = 224  # pixels, a multiple of 32 (five halvings)
    stride: Literal["auto", "expansion", "depthwise"] = "auto"  # where MBConv down-samples; auto: the model's own
    depths: tuple[int, ...] = ()  # blocks of every stage from the stem on; empty: the model's own
    head_size: int = 0  # channels of an attention head; 0: the model's own
    relative_bias: Literal["auto", "pre", "post", "none"] = "auto"  # before or after the softmax; auto: the model's own
    conv_norm: Literal["auto", "batch", "layer"] = "auto"  # in MBConv; auto: the model's own
    drop_path: float = 0.0  # stochastic depth of the last block; block b of L drops at drop_path * b / L
    drop_path_group: int = 0  # of every so many samples an exact count drops, and is not computed; 0: each for itself
    attention: Literal["auto", "explicit", "sdpa", "flex"] = "auto"  # auto: explicit on CPU, sdpa on CUDA
    bias_lookup: Literal["index_select", "einsum"] = "index_select"  # of the relative bias; einsum repeats on CUDA

    def __post_init__(self) -> None:
        nearest = max(32, round(self.resolution / 32) * 32)
        require(
            self.resolution >= 32 and self.resolution % 32 == 0,
            "model.resolution",
            self.resolution,
            "must be a positive multiple of 32, the network's total stride",
            nearest,
        )
        at_least("model.head_size", self.head_size, 0)
        in_range("model.drop_path", self.drop_path, 0.0, 0.95)
        at_least("model.drop_path_group", self.drop_path_group, 0)


@dataclass(frozen=True)
class Init:
    """Weights that a run starts from instead of fresh ones. A run that has a checkpoint of its own continues that."""

    path: str = ""  # another run's folder or a file of `coatnet export`; empty: fresh weights
    weights: Literal["auto", "raw", "ema"] = "auto"  # auto: a run's averaged ones where it keeps them; a file's own
    head: Literal["keep", "reset"] = "keep"  # reset: a fresh classifier, for other classes


@dataclass(frozen=True)
class Norm:
    """BatchNorm, whose statistics span a fixed number of samples whatever the layout."""

    replica_batch: int = 256  # samples that share batch statistics: consecutive positions of the global batch
    momentum: float = 0.01  # share of the new statistics, PyTorch's sense

    def __post_init__(self) -> None:
        at_least("norm.replica_batch", self.replica_batch, 2)
        in_range("norm.momentum", self.momentum, 0.0, 1.0)


@dataclass(frozen=True)
class Data:
    """Which samples, in which order."""

    path: str = ""  # folder or URL (http, https, s3, gs) with manifest.json, as written by `coatnet data`
    mixture: tuple[str, ...] = ()  # PATH:WEIGHT of several data sets read together, in place of `path`
    global_batch: int = 4096  # samples per optimizer step over all ranks; never changed silently
    workers: int = 2  # loader processes per rank; 0 loads in the rank itself
    lanes: int = 720  # shards read side by side; capped at what the data and the batch allow
    piece: int = 8192  # samples of a lane that are permuted together
    max_pixels: int = 100_000_000  # a larger picture is refused, not decoded
    on_damage: Literal["stop", "replace"] = "stop"  # a sample proven damaged: stop, or read another in its place
    damage_budget: int = 100  # distinct samples a run may find damaged before it stops after all
    cache: str = ""  # node-local folder to keep fetched shards in; empty: a temporary one for URLs, none for folders
    cache_bytes: int = 100_000_000_000  # the cache's size, which only shards in use may exceed
    fetch_retries: int = 5  # attempts in a row that bring nothing new, after the first
    pipe: str = ""  # command that writes {url} to its output, from byte {offset} if named; in place of our own fetching
    synthetic: bool = False  # made-up pictures instead of `path`, to check speed and fit of a machine
    synthetic_classes: int = 1000  # classes of the made-up data set

    def __post_init__(self) -> None:
        at_least("data.global_batch", self.global_batch, 2)
        at_least("data.workers", self.workers, 0)
        at_least("data.lanes", self.lanes, 1)
        at_least("data.piece", self.piece, 1)
        at_least("data.max_pixels", self.max_pixels, 1024)
        at_least("data.synthetic_classes", self.synthetic_classes, 2)
        at_least("data.damage_budget", self.damage_budget, 0)
        at_least("data.cache_bytes", self.cache_bytes, 1)
        in_range("data.fetch_retries", self.fetch_retries, 0, 1000)
        check_pipe(self)
        check_mixture(self.mixture)


def check_pipe(data: Data) -> None:
    """Refuse a `data.pipe` that names no {url}, another placeholder, or that no URL would use.

    Raises:
        InputError: see above.
    """
    command = data.pipe
    plain = command.replace("{url}", "").replace("{offset}", "")
    try:
        ok = not command or ("{url}" in " ".join(shlex.split(command)[1:]) and not {"{", "}", "\0"} & set(plain))
    except ValueError:  # a quote without its partner
        ok = False
    require(ok, "data.pipe", command, "must be a command with {url}, and may have {offset}", "curl -sf {url}")
    ok = not command or any("://" in path for path in (data.path, *data.mixture))
    require(ok, "data.pipe", command, "fetches URLs, and data.path is none", "")


def mixture_entry(entry: str) -> tuple[str, int]:
    """Path and weight of an entry of `data.mixture`.

    Raises:
        InputError: not PATH:WEIGHT with a whole number from 1 to 999,999,999.
    """
    path, _, weight = entry.rpartition(":")
    good = bool(path) and weight.isascii() and weight.isdecimal() and 0 < int(weight[:19]) < 10**9
    rule = "must be PATH:WEIGHT, the weight a whole number from 1 to 999999999"
    require(good, "data.mixture", entry, rule, f"{path or entry or 'PATH'}:1")
    return path, int(weight)


def check_mixture(entries: tuple[str, ...]) -> None:
    """Refuse a data set that is named twice, and weights whose cycle is too long to look up.

    Raises:
        InputError: see above, or `mixture_entry`'s.
    """
    weights = dict(map(mixture_entry, entries))
    once = tuple(f"{path}:{weight}" for path, weight in weights.items())
    require(len(once) == len(entries), "data.mixture", entries, "must name a data set once", once)
    total, room = sum(weights.values()), MAX_CYCLE - len(weights)
    rule = f"the weights, in lowest terms, must add up to at most {MAX_CYCLE}"
    lighter = tuple(f"{path}:{max(1, weight * room // max(total, 1))}" for path, weight in weights.items())
    require(total <= MAX_CYCLE * math.gcd(*weights.values()), "data.mixture", entries, rule, lighter)


@dataclass(frozen=True)
class Augment:
    """What happens to a picture between decoding and the network; everything is seeded by its position."""

    crop: Literal["random", "resize"] = "random"  # random: random-resized crop; resize: the whole picture
    crop_scale: tuple[float, float] = (0.08, 1.0)  # share of the picture's area
    crop_ratio: tuple[float, float] = (0.75, 4 / 3)  # width over height
    flip: bool = True  # mirror left-right with probability 1/2
    randaugment_layers: int = 0  # operations per picture; 0 is none
    randaugment_magnitude: float = 0.0  # 0..30, the paper's second number
    mixup_alpha: float = 0.0  # Beta(alpha, alpha); 0 is none
    cutmix_alpha: float = 0.0  # Beta(alpha, alpha); 0 is none; with mixup too, each pair takes one of both
    eval_crop: float = 0.875  # share of the short side that evaluation keeps; 1 is the whole
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # subtracted, on a 0..1 scale, RGB
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        for name in ("crop_scale", "crop_ratio"):
            low, high = getattr(self, name)
            require(0 < low <= high, f"augment.{name}", (low, high), "must be 0 < low <= high", (high, high))
        in_range("augment.crop_scale", self.crop_scale[1], 0.0, 1.0)
        in_range("augment.randaugment_layers", self.randaugment_layers, 0, 16)
        in_range("augment.randaugment_magnitude", self.randaugment_magnitude, 0.0, 30.0)
        in_range("augment.mixup_alpha", self.mixup_alpha, 0.0, 100.0)
        in_range("augment.cutmix_alpha", self.cutmix_alpha, 0.0, 100.0)
        in_range("augment.eval_crop", self.eval_crop, 0.1, 1.0)
        for name, value in (("augment.std", min(self.std)), ("augment.mean", min(self.mean) + 1e-6)):
            require(value > 0, name, value, "must be positive", 1e-6)


@dataclass(frozen=True)
class Optim:
    """The loss, AdamW and its schedule (the paper's table 10)."""

    loss: Literal["softmax", "sigmoid"] = "softmax"
    label_smoothing: float = 0.1
    epochs: float = 300.0  # passes over the training split
    steps: int = 0  # optimizer steps; 0 derives them from epochs
    lr: float = 1e-3  # peak, for the recipe's own global batch: it is not rescaled
    min_lr: float = 1e-5
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = 10_000
    warmup_epochs: float = 0.0  # used instead of warmup_steps when positive
    weight_decay: float = 0.05  # AdamW's; not on biases, norms and relative-bias tables
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip_norm: float = 1.0  # global gradient norm; 0 is off
    ema: float = 0.0  # decay per update of the averaged weights (the paper's fine-tuning: .9999); 0 is none

    def __post_init__(self) -> None:
        in_range("optim.label_smoothing", self.label_smoothing, 0.0, 0.99)
        require(self.epochs > 0, "optim.epochs", self.epochs, "must be positive", 1.0)
        at_least("optim.steps", self.steps, 0)
        require(self.lr > 0, "optim.lr", self.lr, "must be positive", 1e-3)
        in_range("optim.min_lr", self.min_lr, 0.0, self.lr)
        at_least("optim.warmup_steps", self.warmup_steps, 0)
        at_least("optim.warmup_epochs", self.warmup_epochs, 0.0)
        at_least("optim.weight_decay", self.weight_decay, 0.0)
        for value in self.betas:
            in_range("optim.betas", value, 0.0, 0.999999)
        require(self.eps > 0, "optim.eps", self.eps, "must be positive", 1e-8)
        at_least("optim.clip_norm", self.clip_norm, 0.0)
        in_range("optim.ema", self.ema, 0.0, 0.999999)


@dataclass(frozen=True)
class Parallel:
    """How the work is laid out over ranks. None of it changes the mathematics."""

    zero: Literal[0, 1, 2, 3] = 3  # DeepSpeed ZeRO stage
    micro_batch: int = 0  # samples per rank and pass; 0 is the rank's whole share of the global batch
    recompute: Literal["none", "selective", "full"] = "full"  # see trainer/recompute.py
    compile: bool = False  # torch.compile every block; equal blocks share one compilation

    def __post_init__(self) -> None:
        at_least("parallel.micro_batch", self.micro_batch, 0)


@dataclass(frozen=True)
class Precision:
    """Arithmetic."""

    dtype: Literal["fp32", "bf16"] = "bf16"  # bf16: autocast over fp32 parameters
    channels_last: bool = True  # memory format of the convolution stages
    deterministic: bool = False  # bitwise repeatable kernels on CUDA as well (slower); the CPU always is


@dataclass(frozen=True)
class Checkpoint:
    """When state is saved, and how much of it is kept."""

    every: int = 1000  # optimizer steps; the end and a stop are always saved
    keep: int = 3  # newest checkpoints kept

    def __post_init__(self) -> None:
        at_least("checkpoint.every", self.every, 1)
        at_least("checkpoint.keep", self.keep, 1)


@dataclass(frozen=True)
class Evaluate:
    """When the held-out split is scored."""

    every: int = 0  # optimizer steps; 0 evaluates at the end only
    micro_batch: int = 64  # samples per rank and forward pass

    def __post_init__(self) -> None:
        at_least("evaluate.every", self.every, 0)
        at_least("evaluate.micro_batch", self.micro_batch, 1)


@dataclass(frozen=True)
class Tracking:
    """Where figures go. metrics.jsonl in the run folder is always written."""

    mlflow: bool = True
    uri: str = ""  # MLflow; empty: MLFLOW_TRACKING_URI, else SQLite in the folder of runs
    experiment: str = "coatnet"
    tensorboard: bool = False  # event files in the run folder (extra `tensorboard`)
    wandb: bool = False  # an offline W&B run in the run folder (extra `wandb`); `wandb sync` uploads it
    log_every: int = 10  # optimizer steps

    def __post_init__(self) -> None:
        at_least("tracking.log_every", self.log_every, 1)


@dataclass(frozen=True)
class Cluster:
    """The processes of this machine. Under an outside launcher (RANK set) only device and timeout matter."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    ranks: int = 0  # processes to start; 0: as many as fit the batch, at most one per GPU or two on a CPU
    master_port: int = 0  # rendezvous port; 0 picks a free one
    timeout: int = 600  # seconds a collective may wait before it fails

    def __post_init__(self) -> None:
        at_least("cluster.ranks", self.ranks, 0)
        ok = self.master_port == 0 or 1024 <= self.master_port <= 65535
        require(ok, "cluster.master_port", self.master_port, "must be 0 or between 1024 and 65535", 0)
        at_least("cluster.timeout", self.timeout, 10)


@dataclass(frozen=True)
class Run:
    """One training run, whole. Built by a recipe, changed by overrides, hashed by `configs.resolve.digest`."""

    recipe: str = ""  # the recipe's name, set by it
    name: str = ""  # folder under `runs`; empty: the recipe's name
    runs: str = "runs"
    seed: int = 0
    steps: int = 0  # stop after so many updates without changing the schedule, to check a machine; 0 is the whole run
    model: Model = field(default_factory=Model)
    init: Init = field(default_factory=Init)
    norm: Norm = field(default_factory=Norm)
    data: Data = field(default_factory=Data)
    augment: Augment = field(default_factory=Augment)
    optim: Optim = field(default_factory=Optim)
    parallel: Parallel = field(default_factory=Parallel)
    precision: Precision = field(default_factory=Precision)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    evaluate: Evaluate = field(default_factory=Evaluate)
    tracking: Tracking = field(default_factory=Tracking)
    cluster: Cluster = field(default_factory=Cluster)

    @property
    def folder(self) -> str:
        """The folder that belongs to the run."""
        return f"{self.runs}/{self.name or self.recipe + ('-synthetic' if self.data.synthetic else '')}"

    def __post_init__(self) -> None:
        in_range("seed", self.seed, 0, 2**31 - 1)
        at_least("steps", self.steps, 0)
        folder = self.name or self.recipe
        require("/" not in folder, "name", folder, "must be a folder name without '/'", folder.rpartition("/")[2])
