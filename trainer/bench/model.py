"""Training steps of our network, alternated with timm's network of the same function: `coatnet bench model`.

A step is forward, loss, backward and fused AdamW on one made-up batch in memory: no data, no DeepSpeed. All cases start
from the same weights and see the same batch, so that their losses can be compared.
"""

import gc
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn

from configs import schema
from configs.errors import InputError
from models import coatnet, cost, norm, spec, timm_names
from models.activations import Device, Dtype, Recompute, activations
from models.design import Spec, Stride
from trainer.bench import record as bench
from trainer.bench.held_bytes import held_bytes
from trainer.engine.recompute import run_block
from trainer.machine import devices, environment

CLASSES = 1000
WARMUP = {"cpu": 1, "cuda": 4}  # steps before the first measured one
STEPS = {"cpu": 1, "cuda": 4}  # measured together
COMPILED = "compiled"
PATIENT_BATCH = 16  # below it torch sends fp32 1x1 convolutions on one CPU thread down a slow road, timm's above all


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        stride: which MBConv convolution down-samples, on both sides; None: the model's own.
        against_timm: measure timm's network too, once for each dtype.
        compiled: "ours", "timm": whose translation by torch.compile is measured too.
        threads: of torch on a CPU.
    """

    name: str = "coatnet0"
    against_timm: bool = False
    batch: int = 16
    resolution: int = 224
    stride: Stride | None = None
    dtypes: tuple[Dtype, ...] = ("bf16",)
    recompute: tuple[Recompute, ...] = ("none",)
    compiled: tuple[str, ...] = ()
    rounds: int = 7
    threads: int = 1
    device: Device = "cpu"

    @property
    def spec(self) -> Spec:
        """The network as data, with the stride where it is wanted."""
        found = spec.get(self.name)
        return replace(found, stride=self.stride or found.stride)

    @property
    def in_cpu_time(self) -> bool:
        """Whether a step is timed by the process's CPU time, which other processes disturb least."""
        return self.device == "cpu" and self.threads == 1

    @property
    def record_name(self) -> str:
        """Such as model-coatnet0-bf16-expansion."""
        kinds = () if self.recompute == ("none",) else self.recompute
        compiled = ["compiled"] if self.compiled else []
        device = [self.device] if self.device != "cpu" else []
        return "-".join(["model", self.name, *self.dtypes, self.spec.stride, *kinds, *compiled, *device])

    @property
    def command(self) -> str:
        """The words that measure this again."""
        words = ["coatnet bench model", self.name, *(["--against timm"] if self.against_timm else [])]
        words += [f"--batch {self.batch} --resolution {self.resolution} --stride {self.spec.stride}"]
        words += [f"--dtype {' '.join(self.dtypes)} --recompute {' '.join(self.recompute)}"]
        words += [" ".join(["--compiled", *self.compiled])] if self.compiled else []
        return " ".join([*words, f"--rounds {self.rounds} --threads {self.threads} --device {self.device}"])


class Trainee:
    """A network in training on one batch.

    Attributes:
        losses: of its steps so far.
    """

    def __init__(self, model: nn.Module, dtype: Dtype, kind: Recompute, settings: Settings) -> None:
        """Give `model` an optimizer and the batch that all cases see, and warm it up."""
        self.model, self.dtype, self.run, self.settings = model.train(), dtype, run_block(kind), settings
        self.losses: list[float] = []
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05, fused=True)
        draw, side = torch.Generator().manual_seed(0), settings.resolution
        images = torch.randn(settings.batch, 3, side, side, generator=draw)
        self.images = images.to(settings.device, memory_format=torch.channels_last)
        self.labels = torch.randint(CLASSES, (settings.batch,), generator=draw).to(settings.device)
        for _ in range(WARMUP[settings.device]):
            self.losses.append(float(self.step()))

    def autocast(self) -> torch.autocast:
        """As the engine trains: no cache, since a pass uses every weight once."""
        return torch.autocast(self.settings.device, torch.bfloat16, enabled=self.dtype == "bf16", cache_enabled=False)

    def step(self) -> Tensor:
        """Forward, loss, backward, update; returns the loss on the device."""
        ours = isinstance(self.model, coatnet.CoAtNet)
        with self.autocast():
            logits = self.model(self.images, None, self.run) if ours else self.model(self.images)
        loss = nn.functional.cross_entropy(logits.float(), self.labels)
        torch.autograd.backward(loss)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if ours:
            norm.commit(self.model)  # timm's running statistics move in its forward pass
        return loss.detach()

    def seconds(self) -> float:
        """Make some steps; returns the seconds of one, by the clock that the settings call for."""
        clock = time.process_time if self.settings.in_cpu_time else time.perf_counter
        count = STEPS[self.settings.device]
        with _no_collection():
            self._wait()
            began = clock()
            losses = [self.step() for _ in range(count)]
            self._wait()
            passed = clock() - began
        self.losses += [float(loss) for loss in losses]
        return passed / count

    def held(self) -> int:
        """Bytes between the forward and the backward pass of our network."""
        assert isinstance(self.model, coatnet.CoAtNet)
        return sum(held_bytes(self.model, self.settings.batch, self.run, self.autocast()).values())

    def _wait(self) -> None:
        if self.settings.device == "cuda":
            torch.cuda.synchronize()


def measure(settings: Settings) -> bench.Record:
    """Alternated step times of all cases, the bytes that ours hold, and what follows from both.

    Raises:
        InputError: no such model or resolution, no CUDA device, timm missing or unable to express the network.
    """
    check(settings)
    threads, broken = torch.get_num_threads(), dict[str, str]()
    if settings.device == "cpu":
        torch.set_num_threads(settings.threads)
    else:  # as `cluster.join` sets them for training
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    try:
        cases = _cases(settings, broken)
        held = {name: cases[name].held() for name in counted(settings)}
        samples = bench.alternate({name: trainee.seconds for name, trainee in cases.items()}, settings.rounds)
    finally:
        torch.set_num_threads(threads)
    losses = {name: trainee.losses for name, trainee in cases.items()}
    device = torch.cuda.get_device_name() if settings.device == "cuda" else "cpu"
    return bench.Record(
        name=settings.record_name,
        command=settings.command,
        facts=environment.facts(device),
        config=asdict(settings)
        | {"stride": settings.spec.stride, "held bytes": held, "counted bytes": counted(settings), "losses": losses},
        unit="seconds of the process's CPU time per step" if settings.in_cpu_time else "seconds per step",
        samples=samples,
        summary=_summary(settings, samples, held, losses, devices.peak_of(device)) | broken,
    )


def check(settings: Settings) -> None:
    """Refuse what cannot be measured, before anything is built.

    Raises:
        InputError: see `measure`.
    """
    found = settings.spec
    found.size(settings.resolution)
    spec.of(schema.Model(name=settings.name, stride=settings.stride or "auto"))
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds no CUDA device on this machine; nearest valid: cpu")
    if not settings.against_timm:
        if "timm" in settings.compiled:
            raise InputError("--compiled timm: timm's network is not measured; add --against timm")
        return
    if timm_names.obstacles(found):
        reasons = "; ".join(timm_names.obstacles(found))
        raise InputError(f"--against timm: timm cannot express {found.name}: {reasons}; leave --against out")
    try:
        import timm  # noqa: F401  # only whether it is there
    except ImportError:
        raise InputError("--against timm: the package timm is missing; pip install -e '.[timm]'") from None


def timm_twin(model: coatnet.CoAtNet) -> nn.Module:
    """timm's network of the same function, with the same weights, on the same device."""
    import timm

    arguments = timm_names.arguments(model.spec, model.resolution)
    device = next(model.parameters()).device
    twin: nn.Module = timm.create_model(timm_names.architecture(model.spec), num_classes=model.classes, **arguments)
    tensors = {name: tensor.contiguous() for name, tensor in timm_names.to_timm(model.state_dict(), model.spec).items()}
    missing, unexpected = twin.load_state_dict(tensors, strict=False)
    # timm counts batches and keeps its index of offsets; all else has its counterpart here.
    lacking = [name for name in missing if not name.endswith(("num_batches_tracked", "relative_position_index"))]
    assert not [*unexpected, *lacking], (unexpected, lacking)
    return twin.to(device)


def _cases(settings: Settings, broken: dict[str, str]) -> dict[str, Trainee]:
    """Every case by its name, "ours bf16 selective" or "timm bf16", warmed up.

    Where torch cannot translate timm's network the rest is measured, and `broken` says why.
    """
    found: dict[str, Trainee] = {}
    for dtype in settings.dtypes:
        for kind in settings.recompute:
            found[case_name("ours", dtype, kind)] = Trainee(_ours(settings), dtype, kind, settings)
        if settings.against_timm:
            found[case_name("timm", dtype)] = Trainee(_theirs(settings), dtype, "none", settings)
        if "ours" in settings.compiled:
            model = _ours(settings)
            coatnet.compile_blocks(model)
            found[case_name("ours", dtype, COMPILED)] = Trainee(model, dtype, "none", settings)
        if "timm" in settings.compiled:
            name, whole = case_name("timm", dtype, COMPILED), torch.compile(_theirs(settings))
            try:
                found[name] = Trainee(whole, dtype, "none", settings)  # type: ignore[arg-type]
            except RuntimeError as error:
                broken[name] = f"not measured: {str(error).splitlines()[0]}"
    return found


def counted(settings: Settings) -> dict[str, int]:
    """The bytes held by each of our cases as `models.activations` counts them."""
    return {
        case_name("ours", dtype, kind): sum(
            block.saved
            for block in activations(
                settings.spec,
                settings.resolution,
                batch=settings.batch,
                dtype=dtype,
                recompute=kind,
                device=settings.device,
                classes=CLASSES,
            )
        )
        for dtype in settings.dtypes
        for kind in settings.recompute
    }


def case_name(who: str, dtype: str, kind: str = "none") -> str:
    """The name of a case; recomputation is named where there is some, and so is torch.compile."""
    return f"{who} {dtype}" if kind == "none" else f"{who} {dtype} {kind}"


def _ours(settings: Settings) -> coatnet.CoAtNet:
    """Our network with the initial weights of seed 0, BatchNorm over the whole batch."""
    model = coatnet.build(settings.spec, resolution=settings.resolution, classes=CLASSES)
    coatnet.initialise(model, 0, settings.device)
    norm.configure(model, group=settings.batch)
    return model.to(memory_format=torch.channels_last)


def _theirs(settings: Settings) -> nn.Module:
    """timm's network with the same weights."""
    return timm_twin(_ours(settings)).to(memory_format=torch.channels_last)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python's collector of cycles out of a measurement."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _summary(
    settings: Settings,
    samples: dict[str, list[float]],
    held: dict[str, int],
    losses: dict[str, list[float]],
    peak: float | None,
) -> dict[str, str]:
    """What a reader wants: speed of each case, ours over timm's, recomputation beside none."""
    flops = 6 * cost.count(settings.spec, settings.resolution, classes=CLASSES).multiply_adds * settings.batch
    found: dict[str, str] = {}
    for name, seconds in samples.items():
        middle = statistics.median(seconds)
        found[name] = f"{settings.batch / middle:.2f} images/s ({middle:.3f} s a step)"
        if name.startswith("ours bf16") and peak is not None:
            found[name] += f", MFU {flops / middle / peak:.1%}"
    for dtype in settings.dtypes:
        ours, theirs = case_name("ours", dtype, settings.recompute[0]), case_name("timm", dtype)
        if theirs in samples:
            ratio = bench.median_ratio(samples[theirs], samples[ours])
            fastest = min(samples[theirs]) / min(samples[ours])
            apart = max(abs(a - b) for a, b in zip(losses[ours], losses[theirs], strict=True))
            found[f"speed over timm, {dtype}"] = (
                f"{ratio:.2f}x (median of {settings.rounds} rounds; of the fastest steps {fastest:.2f}x; losses of "
                f"{len(losses[ours])} steps within {apart:.1g})"
            )
        fast, slow = case_name("ours", dtype, COMPILED), case_name("timm", dtype, COMPILED)
        for name, other in ((fast, ours), (slow, theirs), (fast, theirs), (fast, slow)):
            if name in samples and other in samples:
                found[f"{name} beside {other}"] = f"{bench.median_ratio(samples[other], samples[name]):.2f}x the speed"
        for kind in settings.recompute:
            plain, other = case_name("ours", dtype), case_name("ours", dtype, kind)
            if plain not in samples or other == plain:
                continue
            equal = "bitwise equal" if losses[plain] == losses[other] else "NOT equal"
            found[f"{kind} beside none, {dtype}"] = (
                f"{bench.median_ratio(samples[other], samples[plain]):.3f}x the time, "
                f"{1 - held[other] / held[plain]:.1%} fewer bytes held, losses of {len(losses[plain])} steps {equal}"
            )
    if settings.in_cpu_time and "fp32" in settings.dtypes and settings.batch < PATIENT_BATCH:
        found["note"] = f"fp32 below batch {PATIENT_BATCH} on one thread: not a fair ratio (slow 1x1 convolutions)"
    return found
