"""fp32, bf16 autocast over fp32 parameters, and bf16 parameters with an fp32 master copy: accuracy, speed, bytes.

    python tests/benchmarks/precision.py [SEEDS] [--field value ...]

Three measurements. trainer: `coatnet train demo-digits` in the two modes it has. plain: a loop in one process over
models.coatnet in all three modes, the master copy written here; 200 steps on the same batches, ten steps of each mode
in turn. coatnet0: one training step at 96 px and 16 pictures on one thread, in turn, because nano's small kernels say
little of speed. Further words are overrides of demo-digits in the first two. The bytes that a rank sends for a step
of coatnet0 on eight are not measured here: they are those of trainer/stages/wire.py, whose tests hold them against
traces.
"""

import dataclasses
import functools
import statistics
import sys
import time
from collections.abc import Callable

import torch
from demo_digits import train_digits  # type: ignore[import-not-found]  # the scripts beside this one
from kept import ROOT, kept, spread  # type: ignore[import-not-found]
from torch import Tensor, nn

from configs import resolve
from configs.schema import Model, Norm, Optim, Parallel, Run
from data_pipeline import augment
from data_pipeline.manifest import Dataset, open_dataset
from data_pipeline.order import Order
from data_pipeline.stream import heldout_loader, train_loader
from models import norm
from trainer.bench import record as bench
from trainer.commands.config import resolve_command
from trainer.engine.deepspeed_config import Weights, deepspeed_config
from trainer.engine.loss import loss_function
from trainer.engine.network import bare, built
from trainer.engine.optim import adamw, learning_rate, parameter_groups
from trainer.machine import environment
from trainer.plan import layout
from trainer.stages import wire

MODES = ("fp32", "autocast", "master")
BYTES = ("state", "activations", "ZeRO-1 traffic", "ZeRO-3 traffic")
TRAINER = {"fp32": "fp32", "autocast": "bf16"}  # the trainer's words for the modes it has
STEPS, CHUNK = 200, 10  # of the plain loop; steps of one mode in a row
LARGE = (96, 16, 5)  # pixels, pictures, rounds
RANKS = 8  # among which coatnet0's weights and gradients would travel


class Training:
    """One network in training in one of MODES.

    Attributes:
        weights: fp32, what AdamW moves: the parameters themselves, or with `master` the copy of them.
    """

    def __init__(self, run: Run, classes: int, mode: str) -> None:
        self.run, self.mode = run, mode
        self.model = bare(run, classes, torch.device("cpu")).to(memory_format=torch.channels_last).train()
        norm.configure(self.model, group=run.norm.replica_batch)
        named = dict(self.model.named_parameters())
        if mode == "master":
            self.weights = {name: nn.Parameter(parameter.detach().clone()) for name, parameter in named.items()}
            for parameter in named.values():
                parameter.data = parameter.data.bfloat16()  # BatchNorm's running statistics stay fp32
        else:
            self.weights = named
        groups = parameter_groups(self.weights.items(), run.optim.weight_decay)
        self.optimizer = adamw(groups, run.optim, torch.device("cpu"))
        self.loss_of = loss_function(run.optim.loss)

    def forward(self, images: Tensor) -> Tensor:
        """The logits, fp32."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.mode == "autocast", cache_enabled=False):
            logits: Tensor = self.model(images.bfloat16() if self.mode == "master" else images)
        return logits.float()

    def step(self, images: Tensor, wanted: Tensor, rate: float) -> None:
        """One update at the learning rate `rate`."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        torch.autograd.backward(self.loss_of(self.forward(images), wanted))
        parameters = dict(self.model.named_parameters())
        if self.mode == "master":
            for name, weight in self.weights.items():
                gradient = parameters[name].grad
                assert gradient is not None, name
                weight.grad, parameters[name].grad = gradient.float(), None
        torch.nn.utils.clip_grad_norm_(self.weights.values(), self.run.optim.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.mode == "master":
            for name, weight in self.weights.items():
                parameters[name].data.copy_(weight.data)
        norm.commit(self.model)

    def bytes_kept(self, images: Tensor) -> dict[str, float]:
        """What the mode costs in memory.

        Returns:
            state: of each parameter itself, its master copy, AdamW's moments and the fp32 gradient that AdamW reads;
            activations: what a forward pass keeps for its backward pass; parameters are not counted, but autocast's
            bf16 copies of them are.
        """
        own = {parameter.untyped_storage().data_ptr() for parameter in self.model.parameters()}
        kept_storages: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept_storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            logits = self.forward(images)
        del logits
        moments = [value for state in self.optimizer.state.values() for value in state.values() if value.dim()]
        held = [*self.model.parameters(), *self.weights.values(), *moments]
        every = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in held}
        count = sum(weight.numel() for weight in self.weights.values())
        return {"state": sum(every.values()) / count + 4, "activations": float(sum(kept_storages.values()))}


def timed(training: Training, work: list[tuple[Tensor, Tensor, float]]) -> float:
    """Seconds per step of `training` over (images, targets, learning rate) of each step."""
    began = time.perf_counter()
    for images, wanted, rate in work:
        training.step(images, wanted, rate)
    return (time.perf_counter() - began) / len(work)


def prepared(run: Run, dataset: Dataset) -> Callable[[int], list[tuple[Tensor, Tensor, float]]]:
    """A function that gives the run's next so many steps, as `timed` wants them."""
    split, batch = dataset.split("train"), run.data.global_batch
    order = Order(split.counts, seed=run.seed, block=batch, lanes=run.data.lanes, piece=run.data.piece)
    batches = enumerate(train_loader(dataset, run, order, [(0, batch)], 0, run.optim.steps))

    def take(count: int) -> list[tuple[Tensor, Tensor, float]]:
        found = []
        for _ in range(count):
            step, one = next(batches)
            images = augment.prepare(one, run.augment, torch.float32, run.precision.channels_last)
            wanted = augment.targets(one, dataset.classes, run.optim.label_smoothing, run.optim.loss)
            rate = learning_rate(run.optim, step, run.optim.steps, run.optim.warmup_steps)
            found.append((images, wanted, rate))
        return found

    return take


@torch.no_grad()
def top1(training: Training, dataset: Dataset) -> float:
    """Share of the held-out pictures whose highest logit is their label."""
    run, hits, samples = training.run, 0, 0
    training.model.eval()
    for batch in heldout_loader(dataset, "heldout", run, 0, 1):
        images = augment.prepare(batch, run.augment, torch.float32, run.precision.channels_last)
        right = training.forward(images).argmax(1) == batch.labels
        hits, samples = hits + int(right[batch.valid_B].sum()), samples + int(batch.valid_B.sum())
    return hits / samples


def plain(run: Run) -> dict[str, float]:
    """Train all modes on the same batches in turn; per mode top-1 and the median seconds per step."""
    torch.set_num_threads(1)
    dataset = open_dataset(run.data.path)
    trainings = {mode: Training(run, dataset.classes, mode) for mode in MODES}
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    take = prepared(run, dataset)
    for number in range(run.optim.steps // CHUNK):
        work = take(CHUNK)
        for place in range(len(MODES)):
            mode = MODES[(number + place) % len(MODES)]
            seconds[mode].append(timed(trainings[mode], work))
    found = {f"{mode} top-1": top1(training, dataset) for mode, training in trainings.items()}
    return found | {f"{mode} seconds per step": statistics.median(values) for mode, values in seconds.items()}


def large() -> dict[str, list[float]]:
    """coatnet0 in all modes: seconds per step of each round, bytes per parameter, bytes of kept activations."""
    torch.set_num_threads(1)
    pixels, pictures, rounds = LARGE
    run = Run(model=Model(name="coatnet0", resolution=pixels), norm=Norm(replica_batch=pictures), optim=Optim(lr=1e-4))
    images = torch.randn(pictures, 3, pixels, pixels).to(memory_format=torch.channels_last)
    wanted = torch.full((pictures, 1000), 1e-3)
    trainings = {mode: Training(run, 1000, mode) for mode in MODES}
    cases = {mode: functools.partial(timed, training, [(images, wanted, 1e-4)]) for mode, training in trainings.items()}
    bench.alternate(cases, 1)
    found = {f"coatnet0 {mode} seconds per step": v for mode, v in bench.alternate(cases, rounds).items()}
    for mode, training in trainings.items():
        for name, value in training.bytes_kept(images).items():
            found[f"coatnet0 {mode} bytes of {name}"] = [value]
    return found


def on_the_wire(mode: str, zero: int) -> float:
    """Bytes that each of RANKS ranks sends for a step of coatnet0 in one micro-batch, under a stage of ZeRO.

    With bf16 parameters all that travels has two bytes an element, the new weights too; autocast's weights are fp32.
    """
    run = Run(norm=Norm(replica_batch=128), parallel=Parallel(zero=zero, recompute="none"))  # type: ignore[arg-type]
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, global_batch=RANKS * 128))
    model = built(run, 1000)
    plan = layout(run, RANKS)
    sizes = [weight.numel() for weight in model.parameters()]
    config = deepspeed_config(run, plan, Weights(sum(sizes), max(sizes)))["zero_optimization"]
    groups = parameter_groups(model.named_parameters(), run.optim.weight_decay)
    mapped = {
        id(weight)
        for layer in model.modules()
        if type(layer) in (nn.Conv2d, nn.Linear)
        for weight in layer.parameters(recurse=False)
    }
    share = wire.Share(
        zero=zero,
        dtype="fp32" if mode == "fp32" else "bf16",
        recompute="none",
        accumulation=1,
        replicas=RANKS,
        stages=1,
        stage=0,
        groups=[
            [(weight.numel(), int(mode == "master" or id(weight) in mapped)) for weight in g["params"]] for g in groups
        ],
        channels=sum(layer.running_mean.numel() for layer in model.modules() if isinstance(layer, norm.BatchNorm)),
        team=1,
        to_next=0,
        to_previous=0,
        threshold=config["stage3_param_persistence_threshold"],
        reuse=config["stage3_max_reuse_distance"],
        shard=0,
    )
    whole = ("new weights", "small weights")  # in fp32 unless the parameters themselves are bf16
    return sum(
        traffic.sent / (2 if mode == "master" and traffic.purpose in whole else 1) for traffic in wire.of_step(share)
    )


def summarise(samples: dict[str, list[float]]) -> dict[str, str]:
    """What a reader wants to know of each measurement, and which mode the trainer therefore has.

    Speeds are of the plain loop and of coatnet0, whose modes ran in turn; those of the trainer's whole runs did not.
    """
    summary = {f"trainer, {mode}": f"top-1 {spread(samples[f'trainer {mode} top-1'])}" for mode in TRAINER}
    speeds = {}
    for mode in MODES:
        nano, speeds[mode] = (
            bench.median_ratio(
                samples[f"{network} fp32 seconds per step"], samples[f"{network} {mode} seconds per step"]
            )
            for network in ("plain", "coatnet0")
        )
        state, held, sent1, sent3 = (samples[f"coatnet0 {mode} bytes of {name}"][0] for name in BYTES)
        summary[f"plain loop, {mode}"] = (
            f"top-1 {spread(samples[f'plain {mode} top-1'])}, speed over fp32 {nano:.2f}x (nano) and "
            f"{speeds[mode]:.2f}x (coatnet0), {state:.0f} bytes of state a parameter, {held / 1e6:.0f} MB kept by "
            f"coatnet0's forward pass, {sent1 / 1e6:.0f} MB sent by each of {RANKS} ranks for a step of coatnet0 under "
            f"ZeRO-1 and {sent3 / 1e6:.0f} MB under ZeRO-3 (by formula)"
        )
    summary["chosen"] = (
        f"autocast over fp32 parameters: {speeds['autocast'] / speeds['master']:.2f}x the speed of bf16 parameters "
        f"with an fp32 master copy (coatnet0), less state, accuracy within the seeds' spread"
    )
    return summary


def main(seeds: int, words: list[str]) -> None:
    """Measure all three; print and write the record."""
    given = ["--data.path", str(ROOT / "data/digits"), *words]
    samples: dict[str, list[float]] = {}
    for seed in range(seeds):
        for mode in TRAINER if seed % 2 == 0 else reversed(TRAINER):
            more = ["--precision.dtype", TRAINER[mode], "--tracking.no-mlflow", *words]
            run = resolve_command("demo-digits", [*given, *more, "--seed", str(seed)])
            found = kept(f"precision-trainer-{mode}", run, functools.partial(train_digits, seed, *more))
            for figure in ("top-1", "images/s"):
                samples.setdefault(f"trainer {mode} {figure}", []).append(found[figure])
        run = resolve_command("demo-digits", [*given, "--seed", str(seed)])
        run = dataclasses.replace(run, optim=dataclasses.replace(run.optim, steps=min(STEPS, run.optim.steps)))
        for figure, value in kept("precision-plain", run, functools.partial(plain, run)).items():
            samples.setdefault(f"plain {figure}", []).append(value)
    samples |= large()
    for mode in MODES:
        for zero in (1, 3):
            samples[f"coatnet0 {mode} bytes of ZeRO-{zero} traffic"] = [on_the_wire(mode, zero)]
    record = bench.Record(
        name="precision",
        command=" ".join(["python tests/benchmarks/precision.py", str(seeds), *words]),
        facts=environment.facts("cpu"),
        config=resolve.flat(resolve_command("demo-digits", given)) | {"plain.steps": STEPS, "coatnet0": LARGE},
        unit="share of held-out pictures, images/s, seconds, bytes; one value per seed, for coatnet0 per round",
        samples=samples,
        summary=summarise(samples),
    )
    print(record.write(ROOT / "tests" / "records"))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3, sys.argv[2:])
