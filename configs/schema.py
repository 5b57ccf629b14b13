"""Every setting of a run, as frozen dataclasses. A value out of range is refused where it is declared.

Rules between settings live in `configs/resolve.py`, rules on the world size in `trainer/plan.py`.
"""

from dataclasses import dataclass, field
from typing import Literal

from configs.data_rules import check_mixture, check_pipe
from configs.errors import at_least, check_time, in_range, require
from configs.guard import Guard


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

    path: str = ""  # folder or URL (http, https, s3, gs) of manifest.json; TRAIN.beton,HELDOUT.beton; tars:PATTERN
    mixture: tuple[str, ...] = ()  # PATH:WEIGHT of several data sets read together, in place of `path`
    heldout: str = ""  # of `tars:PATTERN` in `path`: the data set that is scored and names the classes
    tar_samples: int = 0  # of `tars:PATTERN` in `path`: how many samples count as an epoch
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
        check_pipe(self.pipe, (self.path, *self.mixture))
        check_mixture(self.mixture)


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
    """How the work is laid out over ranks. None of it changes the mathematics.

    Ranks form a mesh: `pipeline` stages of the network, and as many replicas of each as there are ranks for. ZeRO cuts
    the state of a stage over its replicas.
    """

    layout: Literal["pinned", "auto"] = "pinned"  # auto: at the start `coatnet plan` chooses all of this section
    pipeline: int = 1  # stages; the network's list of blocks is cut into so many parts
    partition_impl: Literal["own", "fairscale"] = (
        "own"  # who cuts: trainer/stages/partition.py, or fairscale's solver (extra)
    )
    balance: str = "compute"  # what a cut makes even: compute, parameters, activations, or a JSON file {block: seconds}
    zero: Literal[0, 1, 2, 3] = 3  # DeepSpeed ZeRO stage
    shard_group: int = 0  # ZeRO-3: keep a second copy of the weights cut over so many neighbouring ranks only; 0: none
    offload: Literal["none", "cpu", "nvme"] = "none"  # where AdamW works and its state lies (and ZeRO-3's weights)
    offload_path: str = ""  # folder on a local NVMe disk, for nvme; a run makes one of its own in it
    micro_batch: int = 0  # samples per rank and pass; 0 is the rank's whole share of the global batch
    recompute: Literal["none", "selective", "full"] = "full"  # see trainer/engine/recompute.py
    recompute_impl: Literal["own", "fairscale"] = "own"  # whose wrapper does "full"; fairscale is an extra
    recompute_offload: bool = False  # fairscale's wrapper: what it keeps waits in the host's memory
    compile: bool = False  # torch.compile every block; equal blocks share one compilation
    trace: bool = (
        False  # write each rank's operations of the first steps to the run's folder, see trainer/stages/trace.py
    )

    def __post_init__(self) -> None:
        at_least("parallel.pipeline", self.pipeline, 1)
        at_least("parallel.shard_group", self.shard_group, 0)
        at_least("parallel.micro_batch", self.micro_batch, 0)


@dataclass(frozen=True)
class Precision:
    """Arithmetic."""

    dtype: Literal["fp32", "bf16"] = "bf16"  # bf16: autocast over fp32 parameters
    channels_last: bool = True  # memory format of the convolution stages
    deterministic: bool = False  # bitwise repeatable kernels on CUDA as well (slower); the CPU always is
    moments: Literal["fp32", "bf16"] = "fp32"  # how AdamW's two moments are kept, see trainer/engine/moments.py


@dataclass(frozen=True)
class Checkpoint:
    """When state is saved, and how much of it is kept."""

    every: int = 0  # optimizer steps; the end and a stop are always saved; 0: chosen, see trainer/state/interval.py
    mtbf_hours: float = 24.0  # assumed mean time between failures of the whole run, for `every` 0
    asynchronous: bool = True  # write from a copy in the host's memory while training goes on
    overlap: Literal["wait", "skip"] = "wait"  # a save that is due while one is written
    keep: int = 3  # newest checkpoints kept
    keep_every: int = 0  # keep those after a multiple of so many steps too; 0: none
    keep_best: str = ""  # keep the best by this score too, eval/top1 for example; each evaluation is then saved
    keep_best_mode: Literal["max", "min"] = "max"  # which score is the best

    def __post_init__(self) -> None:
        at_least("checkpoint.every", self.every, 0)
        require(self.mtbf_hours > 0, "checkpoint.mtbf_hours", self.mtbf_hours, "must be positive", 24.0)
        at_least("checkpoint.keep", self.keep, 1)
        at_least("checkpoint.keep_every", self.keep_every, 0)
        require(
            not self.keep_best or self.keep_best.startswith(("eval/", "eval_ema/")),
            "checkpoint.keep_best",
            self.keep_best,
            "must be a score of an evaluation: eval/NAME, or eval_ema/NAME of the averaged weights",
            "eval/top1",
        )


@dataclass(frozen=True)
class Resume:
    """What may differ between a run and the checkpoint that it goes on from."""

    allow: tuple[str, ...] = ()  # fields, sections ("augment."), "dataset", "scratch": configs/resume_rules.py


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
    sweep: str = ""  # runs of one sweep lie under one run of this name in MLflow
    register: str = ""  # name in MLflow's registry under which the finished weights are logged; empty: they are not
    log_every: int = 10  # optimizer steps
    system_every: float = 15.0  # seconds between two looks at a machine's processors, memory, network; 0: none

    def __post_init__(self) -> None:
        at_least("tracking.log_every", self.log_every, 1)
        at_least("tracking.system_every", self.system_every, 0.0)


@dataclass(frozen=True)
class Cluster:
    """The processes of this machine, and what its devices cost.

    Under an outside launcher (RANK set) neither ranks nor master_port matter.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    ranks: int = 0  # processes to start; 0: as many as fit the batch, at most one per GPU or two on a CPU
    master_port: int = 0  # rendezvous port; 0 picks a free one
    timeout: int = 600  # seconds a collective may wait before it fails
    start_timeout: int = 1800  # the same until two steps are made: compilation and first data come unevenly
    end_time: str = ""  # when the machine goes away, 2026-11-24T18:00+01:00 or unix seconds; empty: SLURM's, if any
    price: float = 0.0  # money for one device-hour, for the ledger; 0: not known
    currency: str = "USD"  # of the price
    watts: float = 0.0  # of one device, where its energy is not measured; 0: by its name, see trainer/cost/energy.py

    def __post_init__(self) -> None:
        at_least("cluster.ranks", self.ranks, 0)
        ok = self.master_port == 0 or 1024 <= self.master_port <= 65535
        require(ok, "cluster.master_port", self.master_port, "must be 0 or between 1024 and 65535", 0)
        at_least("cluster.timeout", self.timeout, 10)
        at_least("cluster.start_timeout", self.start_timeout, 10)
        check_time("cluster.end_time", self.end_time)
        at_least("cluster.price", self.price, 0.0)
        at_least("cluster.watts", self.watts, 0.0)


@dataclass(frozen=True)
class Run:
    """One training run, whole. Built by a recipe, changed by overrides, hashed by `configs.resolve.digest`."""

    recipe: str = ""  # the recipe's name, set by it
    name: str = ""  # folder under `runs`; empty: the recipe's name
    runs: str = "runs"
    seed: int = 0
    steps: int = 0  # stop after so many updates without changing the schedule, to check a machine; 0 is the whole run
    profile: str = ""  # FROM:TO: look into the steps after update FROM up to update TO, see trainer/bench/profiling.py
    profile_trace: bool = True  # of the last two of them a trace and a memory snapshot too, which take seconds to write
    model: Model = field(default_factory=Model)
    init: Init = field(default_factory=Init)
    norm: Norm = field(default_factory=Norm)
    data: Data = field(default_factory=Data)
    augment: Augment = field(default_factory=Augment)
    optim: Optim = field(default_factory=Optim)
    parallel: Parallel = field(default_factory=Parallel)
    precision: Precision = field(default_factory=Precision)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    resume: Resume = field(default_factory=Resume)
    guard: Guard = field(default_factory=Guard)
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
        low, colon, high = self.profile.partition(":")
        ok = not self.profile or (colon == ":" and low.isdecimal() and high.isdecimal() and int(low) < int(high))
        require(ok, "profile", self.profile, "must be FROM:TO, two numbers of updates that ascend", "20:25")
        folder = self.name or self.recipe
        require("/" not in folder, "name", folder, "must be a folder name without '/'", folder.rpartition("/")[2])
