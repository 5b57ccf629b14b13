"""Every touch of DeepSpeed's internals, each with its reason and the versions it was run on.

Run on deepspeed 0.19.8. `check_version` refuses a release line these were not written for, and
tests/parallel/test_shims.py shows of each what goes wrong without it.
"""

import importlib
import importlib.metadata
import inspect
import logging
import sys
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from configs.errors import InputError
from trainer.cluster import Member
from trainer.engine.mesh import Mesh
from trainer.engine.moments import moments_of

TESTED = "0.19.8"  # and later ones of its line, as long as what is replaced looks the same


def check_version() -> None:
    """Refuse a DeepSpeed release whose internals nobody looked at.

    Raises:
        InputError: naming the version found and the line that works.
    """
    installed = importlib.metadata.version("deepspeed")
    line, _, patch = TESTED.rpartition(".")
    found, _, number = installed.partition("+")[0].rpartition(".")
    if found != line or not number.isdecimal() or int(number) < int(patch):
        raise InputError(
            f"deepspeed {installed} is installed; this trainer is proven on {TESTED} and may do on later {line}.x: "
            f"pip install 'deepspeed=={TESTED}'"
        )


def _replace(owner: Any, name: str, arguments: str, new: Any) -> None:
    """Put our function in the place of one of DeepSpeed's.

    Args:
        owner: a module or an object.
        arguments: the names that the function's have to have, in order, with spaces between; a method's with self.

    Raises:
        InputError: there is no such function, or it has other arguments.
    """
    found: Any = getattr(owner, name, None)
    found = getattr(found, "__func__", found)  # of a bound method
    if getattr(found, "__closure__", None):  # DeepSpeed wraps functions to mark them for a profiler
        found = inspect.getclosurevars(found).nonlocals.get("func", found)
    names = " ".join(inspect.signature(found).parameters) if callable(found) else "nothing"
    if names != arguments:
        installed = importlib.metadata.version("deepspeed")
        raise InputError(
            f"deepspeed {installed}: {name} takes {names!r}, not {arguments!r}: what is put "
            f"in its place may not fit; this trainer is proven on {TESTED}: pip install 'deepspeed=={TESTED}'"
        )
    owner.__dict__[name] = new


def begin() -> None:
    """What comes before the first touch: refuse another release, build nothing, keep quiet."""
    # Collectives that torch renamed; DeepSpeed calls them by their old names once per step and bucket.
    warnings.filterwarnings("ignore", message=".*torch.distributed.* is deprecated", category=FutureWarning)
    check_version()
    build_nothing()
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)


def imported() -> Any:
    """DeepSpeed, without MLflow: its autotuner, which nobody uses here, would import that for 0.8 s of every start."""
    modules: dict[str, Any] = sys.modules
    if "deepspeed" in modules or "mlflow" in modules:
        return importlib.import_module("deepspeed")
    modules["mlflow"] = None  # an import of it fails, which the autotuner takes for "not installed"
    try:
        return importlib.import_module("deepspeed")
    finally:
        del modules["mlflow"]


def build_nothing() -> None:
    """Keep DeepSpeed from compiling its shared-memory collectives (75 s of C++) at the first start on a CPU.

    `deepspeed.comm` builds the op unless `deepspeed.ops.__compatible_ops__` marks it as unavailable; the table is
    filled lazily by running compilers, so an empty one set first also saves that. Nothing else reads it. gloo does
    the collectives instead.
    """
    imported().ops.__dict__["__compatible_ops__"] = {}


def elements(parameter: nn.Parameter) -> int:
    """Of a whole parameter, also where ZeRO-3 has cut it."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def enter_mesh(member: Member, model: nn.Module) -> Mesh | None:
    """What to hand DeepSpeed as `mpu`; None without a pipeline.

    Three touches: `groups.mpu` is a global that an earlier engine of this process may have left behind. The norm for
    the clip counts a parameter on the first stage only unless it is marked as a part of the model that no other rank
    has. ZeRO-3 compares each recorded order of modules with that of rank 0, which computes another stage.
    """
    from deepspeed.runtime.zero import partitioned_param_coordinator as coordinator
    from deepspeed.utils import groups

    groups.mpu = None
    group = member.data_group if member.stages > 1 else None

    def same_on_all_replicas(ints: list[int]) -> None:
        """Refuse numbers that differ between the replicas of a stage."""
        mine = torch.tensor([len(ints), hash(tuple(ints))], device=member.device)
        low, high = mine.clone(), mine.clone()
        dist.all_reduce(low, dist.ReduceOp.MIN, group=group)
        dist.all_reduce(high, dist.ReduceOp.MAX, group=group)
        if not torch.equal(low, high):
            raise RuntimeError(f"the replicas of stage {member.stage} called their modules in different orders")

    _replace(coordinator, "assert_ints_same_as_other_ranks", "ints", same_on_all_replicas)
    if member.stages == 1:
        return None
    for parameter in model.parameters():
        parameter.__dict__["model_parallel"] = True
    return Mesh(member)


class Cutter:
    """Cuts the blocks of a network into ZeRO-3's pieces as soon as they have their weights.

    So no rank ever holds more than one block whole. `deepspeed.initialize` would cut a network that is there already.
    All replicas of a stage call this for the same blocks in the same order. The groups of `parallel.shard_group` are a
    global that an earlier engine of this process may have left behind.
    """

    def __init__(self, member: Member, config: dict[str, Any]) -> None:
        begin()
        import deepspeed
        from deepspeed.utils import groups

        deepspeed.init_distributed(dist.get_backend(), dist_init_required=False)  # its own count of ranks is else one
        groups.__dict__["_ZERO_PARAM_INTRA_PARALLEL_GROUP"] = None
        if "aio" in config:
            own_weights()
        self._member, self._config = member, config
        self._cut: Any = None

    def __call__(self, block: nn.Module) -> None:
        """Cut all weights of a block."""
        from deepspeed.runtime.zero import Init

        # The weights come before the engine, which would tell it of the ranks: it would take itself for the only one.
        imported().init_distributed(
            dist.get_backend(), auto_mpi_discovery=False, verbose=False, dist_init_required=False
        )
        parameters = list(block.parameters())
        if self._cut is None:
            mesh = enter_mesh(self._member, block)
            group = self._member.data_group
            # Given a dtype it takes bf16 on a CPU, whatever that is (0.19.8: an "or" binds otherwise than meant).
            Init(block, data_parallel_group=group, config_dict_or_path=self._config, mpu=mesh)
            self._cut = parameters[0]
        else:  # by the same object, which has the files on a disk
            self._cut.convert_to_zero_parameters(param_list=parameters)


def keep_gradients(engine: Any) -> None:
    """Let an offloaded ZeRO-3 take each part's gradient from where it was added up.

    DeepSpeed copies it into a second place of the same size, and with NVMe on to the disk: with transfers that fail
    without an error where a weight's gradient does not begin at a multiple of 512 bytes, as behind a table of relative
    biases, and then trains with what was in the buffer before. And it adds the norm up part by part over the pipeline,
    whose stages have different numbers of parts and would wait for each other for ever.
    """
    zero, gradients, place = engine.optimizer, [], 0
    for flat, size in zip(zero.fp32_partitioned_groups_flat, zero.fp16_partitioned_groups_flat_numel, strict=True):
        flat.grad = None
        gradients.append(zero.grad_partitions_flat_buffer.narrow(0, place, size))
        place += size

    def note_norm(parameter: Any, gradient: Tensor, *_: Any) -> None:
        zero.norm_for_param_grads[zero.get_param_id(parameter)] = zero._constant_buffered_norm2(gradient)

    def prepare(number: int, names: Any) -> None:
        if zero._swappable_optimizer_subgroup(number):
            zero._optimizer_states_and_gradient_swap_in(number, names)
        zero.fp32_partitioned_groups_flat[number].grad = gradients[number]

    def norms() -> list[Tensor]:
        every = [parameter for group in zero.fp16_groups for parameter in group]
        return [zero.complete_grad_norm_calculation_for_cpu_offload(every)]

    at_boundary = "self param grad_buffer offload_fp32_gradients offload_fp32_offsets"
    _replace(zero, "_offload_grad_partition_at_boundary", at_boundary, note_norm)
    _replace(zero, "_prepare_sub_group", "self sub_group_id timer_names", prepare)
    _replace(zero, "_get_norm_groups", "self", norms)


def own_weights() -> None:
    """Let weights from a disk that no other rank shares be copies, on a CPU too, not the buffer that they came through.

    Autograd keeps a linear map's weight as a view of what it was. A buffer has another weight in it by then.
    """
    from deepspeed.runtime.zero import partition_parameters as partition

    theirs: Any = partition._no_gather_coalesced
    theirs = getattr(theirs, "theirs", theirs)  # an earlier engine of this process has been here

    def copied(params: Any) -> Any:
        listed = list(params)
        handle = theirs(listed)
        for parameter in listed:
            if parameter.nvme_swapper is not None:
                parameter.data = parameter.data.clone()
        return handle

    copied.__dict__["theirs"] = theirs
    _replace(partition, "_no_gather_coalesced", "params", copied)


def write_moments(engine: Any) -> None:
    """Put AdamW's moments on the disk, which its first step would do: a checkpoint can then be loaded before it."""
    zero = engine.optimizer
    for number, flat in enumerate(zero.fp32_partitioned_groups_flat):
        if zero._swappable_optimizer_subgroup(number):
            zero._optimizer_states_and_gradient_swap_in(number)
            moments_of(zero.optimizer, flat)
            zero._optimizer_states_and_gradient_swap_out(number)


def build_disk() -> None:
    """Compile DeepSpeed's transfers between memory and disk (some minutes, once for a machine), or load them."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    AsyncIOBuilder().load(verbose=False)


def publish(engine: Any, stage: int) -> None:
    """Make the ranks' parameters follow their fp32 master fragments, after these were written from outside.

    A collective call. It does what DeepSpeed's own step does behind the optimizer's update.
    """
    optimizer = engine.optimizer
    if stage in (1, 2):
        optimizer.update_lp_params()
    elif stage == 3:
        optimizer._partition_all_parameters()  # an evaluation leaves parameters whole, with their old values
        optimizer.invalidate_secondary_tensor()  # and so does a shard group's copy
        for group in range(len(optimizer.fp16_groups)):
            from_disk = optimizer._swappable_optimizer_subgroup(group)
            if from_disk:
                optimizer._optimizer_states_and_gradient_swap_in(group)
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
            if from_disk:
                optimizer._release_swap_buffers(group)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)


def set_optimizer_step(engine: Any, step: int) -> None:
    """Tell AdamW how many updates it has made: the moments' bias correction depends on it."""
    for state in _adamw(engine).state.values():
        state["step"].fill_(step)


def optimizer_step(engine: Any) -> int:
    """How many updates AdamW has made. Waits for the device."""
    state = _adamw(engine).state
    return int(next(iter(state.values()))["step"]) if state else 0


def _adamw(engine: Any) -> torch.optim.Optimizer:
    """The AdamW inside DeepSpeed's wrapper, or the one it uses as it is under ZeRO-0."""
    inner: torch.optim.Optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    return inner
