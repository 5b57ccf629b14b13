"""Every layout of a run on certain machines, with its memory and step time; the fastest that fits. No torch.

A layout is a pipeline x a ZeRO stage (with a second copy of the weights in groups of ranks or without) x recomputation
x a micro-batch x where AdamW's state lies x compiled or not. Which of them go together is not decided here but by the
rules that every run is held to (`configs.parallel_rules`, `trainer.plan`). AdamW's state is moved elsewhere only in
layouts that do not fit otherwise: that is never faster.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal, get_args

from configs.errors import InputError
from configs.parallel_rules import check_parallel
from configs.schema import Parallel, Run
from models.activations import Device as Kind
from models.activations import Recompute
from models.operations import Style
from trainer.engine.deepspeed_config import deepspeed_config
from trainer.plan import Layout, micro_batches
from trainer.planning import memory, step_time
from trainer.planning.anatomy import Anatomy
from trainer.planning.machines import Machines
from trainer.planning.memory import Memory
from trainer.planning.rates import Rates
from trainer.planning.roofline import Pace
from trainer.planning.step_time import StageWork, StepTime, Terms
from trainer.stages import partition
from trainer.stages.wire import Share

RECOMPUTE: tuple[Recompute, ...] = get_args(Recompute)
ZERO: tuple[Literal[0, 1, 2, 3], ...] = (0, 1, 2, 3)


@dataclass(frozen=True)
class Candidate:
    """One layout.

    Attributes:
        parallel: its settings.
        layout: how the global batch is cut.
        memory: of the stage that needs most.
        host: bytes of a machine's own memory for what `parallel.offload` keeps there; 0 where that is the device's.
        time: of a step; None: it does not fit.
    """

    parallel: Parallel
    layout: Layout
    memory: Memory
    host: int
    time: StepTime | None

    @property
    def rank(self) -> tuple[Any, ...]:
        """Order of preference: the fastest, then the simplest."""
        assert self.time is not None, "layouts that do not fit have no rank"
        simple = (self.parallel.pipeline, RECOMPUTE.index(self.parallel.recompute), self.parallel.zero)
        return (round(self.time.total, 9), *simple, self.parallel.compile, -self.layout.micro_batch)

    def words(self) -> str:
        """The layout in a few words."""
        parallel = self.parallel
        parts = [f"pipeline {parallel.pipeline}"] if parallel.pipeline > 1 else []
        parts.append(
            f"ZeRO-{parallel.zero}" + (f" in groups of {parallel.shard_group}" if parallel.shard_group else "")
        )
        parts += [f"recompute {parallel.recompute}", f"micro-batch {self.layout.micro_batch}"]
        parts += [f"offload {parallel.offload}"] if parallel.offload != "none" else []
        parts += ["compiled"] if parallel.compile else []
        return ", ".join(parts)


class Planner:
    """Evaluates the layouts of one run.

    Attributes:
        run: its own layout is one of many.
        rates: by style of computing.
        styles: those that are considered.
    """

    def __init__(
        self, run: Run, classes: int, machines: Machines, rates: Mapping[Style, Rates], styles: Sequence[Style] = ()
    ) -> None:
        kind: Kind = "cpu" if machines.device.on_host else "cuda"
        self.run = replace(run, cluster=replace(run.cluster, device=kind))
        self.machines, self.rates, self.styles = machines, rates, tuple(styles or rates)
        self.anatomy = Anatomy(self.run, classes, kind)
        self.pace = Pace(self.run, classes, kind, rates)
        self._known: dict[Parallel, bool] = {}

    def on(self, devices: int, batch: int = 0) -> "Planner":
        """The same on as many devices, for another global batch if one is given; what was counted is kept."""
        other = object.__new__(Planner)
        other.__dict__ |= self.__dict__
        other.machines = self.machines.of(devices)
        if batch:
            other.run = replace(self.run, data=replace(self.run.data, global_batch=batch))
        return other

    def candidates(self) -> list[Candidate]:
        """All layouts, those that do not fit among them."""
        return [found for parallel in self._kinds() for found in self._sizes(parallel)]

    def best(self) -> Candidate | None:
        """The fastest layout that fits, None if none does."""
        fitting = [found for found in self.candidates() if found.time is not None]
        return min(fitting, key=lambda found: found.rank, default=None)

    def fits(self) -> bool:
        """Whether any layout fits, AdamW's state elsewhere or not: only memory is looked at."""
        for parallel in self._kinds():
            run = replace(self.run, parallel=parallel)
            every = (run, *(replace(self.run, parallel=other) for other in self._moved(parallel)))
            if any(self._stages_fit(asked, plan) for plan in self._plans(run) for asked in every):
                return True
        return False

    def _stages_fit(self, run: Run, plan: Layout) -> bool:
        """Whether every stage of a layout fits; after one that does not the others are not looked at."""
        ends = partition.ends(run, self.anatomy.classes, plan.micro_batch)
        stages = (memory.of_stage(run, plan, self.anatomy, ends, number) for number in range(plan.stages))
        return all(self._room(stage, self.machines.local * stage.host) for stage in stages)

    def _room(self, need: Memory, host: int) -> bool:
        """Whether a device and its machine have room for so much."""
        return need.total <= self.machines.available and host <= self.machines.host_available

    def evaluate(self, parallel: Parallel, plan: Layout) -> Candidate:
        """One layout as it is asked for."""
        run = replace(self.run, parallel=replace(parallel, micro_batch=plan.micro_batch))
        need, host = self._memory(run, plan)
        return Candidate(run.parallel, plan, need, host, self._time(run, plan) if self._room(need, host) else None)

    def seconds(self, parallel: Parallel, plan: Layout) -> StepTime:
        """Seconds of a step of a layout, whether it fits or not."""
        return self._time(replace(self.run, parallel=replace(parallel, micro_batch=plan.micro_batch)), plan)

    def _kinds(self) -> Iterator[Parallel]:
        """Settings but for the micro-batch and offload, in which the rules find no fault."""
        devices, blocks = self.machines.devices, len(self.anatomy.blocks)
        stages = [count for count in range(1, min(devices, blocks) + 1) if devices % count == 0]
        for pipeline, zero, recompute, style in product(stages, ZERO, RECOMPUTE, self.styles):
            for group in self._groups(zero, devices // pipeline):
                parallel = replace(
                    self.run.parallel, pipeline=pipeline, zero=zero, shard_group=group, recompute=recompute,
                    compile=style == "compiled", offload="none", offload_path="", micro_batch=0, layout="pinned",
                )  # fmt: skip
                if self._allowed(parallel):
                    yield parallel

    def _groups(self, zero: int, replicas: int) -> tuple[int, ...]:
        """Sizes of the groups that keep a second copy of ZeRO-3's weights: none, and a machine where there are more."""
        near = self.machines.per_node
        return (0, near) if zero == 3 and replicas > near > 1 and replicas % near == 0 else (0,)

    def _allowed(self, parallel: Parallel) -> bool:
        """Whether the rules let these settings go together. No rule depends on how many stages there are beyond one."""
        asked = replace(parallel, pipeline=min(parallel.pipeline, 2))
        if asked not in self._known:
            try:
                check_parallel(replace(self.run, parallel=asked))
                self._known[asked] = True
            except InputError:
                self._known[asked] = False
        return self._known[asked]

    def _sizes(self, parallel: Parallel) -> Iterator[Candidate]:
        """The layouts of a kind: each micro-batch, with states on the host where it would not fit otherwise."""
        run = replace(self.run, parallel=parallel)
        for plan in self._plans(run):
            found = self.evaluate(parallel, plan)
            yield found
            if found.time is None:
                yield from (self.evaluate(moved, plan) for moved in self._moved(parallel))

    def _moved(self, parallel: Parallel) -> Iterator[Parallel]:
        """The settings with AdamW's state elsewhere: in the host's memory, or on a disk if the run names a folder."""
        if not self.machines.device.on_host:
            yield from filter(self._allowed, (replace(parallel, offload="cpu"),))
        path = self.run.parallel.offload_path
        if path:
            yield from filter(self._allowed, (replace(parallel, offload="nvme", offload_path=path),))

    def _plans(self, run: Run) -> list[Layout]:
        """The ways to cut the global batch."""
        devices, data = self.machines.devices, run.data
        stages, group = run.parallel.pipeline, run.norm.replica_batch
        return [Layout(devices, data.global_batch, size, group, stages) for size in micro_batches(run, devices)]

    def _memory(self, run: Run, plan: Layout) -> tuple[Memory, int]:
        """Of the stage that needs most; bytes of a machine's own memory, at most."""
        ends = partition.ends(run, self.anatomy.classes, plan.micro_batch)
        every = [memory.of_stage(run, plan, self.anatomy, ends, number) for number in range(plan.stages)]
        return max(every, key=lambda one: one.total), self.machines.local * max(one.host for one in every)

    def _time(self, run: Run, plan: Layout) -> StepTime:
        """Seconds of a step."""
        style: Style = "compiled" if run.parallel.compile else "eager"
        works, terms = self.works(run, plan)
        return step_time.of_layout(works, terms, self.machines, self.rates[style])

    def works(self, run: Run, plan: Layout) -> tuple[list[StageWork], Terms]:
        """What each stage of a run's own layout does in a step, and what of the layout matters beside that."""
        style: Style = "compiled" if run.parallel.compile else "eager"
        ends = partition.ends(run, self.anatomy.classes, plan.micro_batch)
        parts = list(zip((0, *ends), ends, strict=False))
        config = deepspeed_config(run, plan, self.anatomy.weights(*parts[-1]))["zero_optimization"]
        terms = Terms(
            recompute=partition.inside(run), overlap=config["overlap_comm"], bucket=config["reduce_bucket_size"],
            offload=run.parallel.offload, ema=run.optim.ema > 0,
        )  # fmt: skip
        return [self._work(run, plan, number, *part, style, config) for number, part in enumerate(parts)], terms

    def _work(
        self, run: Run, plan: Layout, number: int, first: int, last: int, style: Style, config: dict[str, Any]
    ) -> StageWork:
        """What a stage does in a step."""
        kept = self.anatomy.bytes(first, last, partition.inside(run), plan.micro_batch)
        layers, channels = self.anatomy.norms(first, last)
        share = Share(
            zero=run.parallel.zero, dtype=run.precision.dtype, recompute=run.parallel.recompute,
            accumulation=plan.accumulation, replicas=plan.replicas, stages=plan.stages, stage=number,
            groups=self.anatomy.groups(first, last), channels=channels, team=plan.team, to_next=kept.to_next,
            to_previous=kept.to_previous, threshold=config["stage3_param_persistence_threshold"],
            reuse=config["stage3_max_reuse_distance"], shard=run.parallel.shard_group,
        )  # fmt: skip
        return StageWork(
            seconds=self.pace.of(first, last, plan.micro_batch, style), share=share, blocks=last - first,
            elements=self.anatomy.elements(first, last), tensors=self.anatomy.tensors(first, last), norms=layers,
        )  # fmt: skip
