"""What a comparison of numerics must find: the engine with a fault in it, or with a part of the shims left out."""

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from torch import Tensor, nn

import trainer.engine.engine
from trainer import cluster
from trainer.engine import deepspeed_config, deepspeed_shims
from trainer.engine.deepspeed_config import _offload as offload_section
from trainer.engine.deepspeed_shims import enter_mesh
from trainer.engine.optim import clip


def _clipped_later(parameters: list[nn.Parameter], limit: float, stages: dist.ProcessGroup | None) -> Tensor:
    """A clip that leaves gradients a fiftieth too long, and tells the right norm."""
    return clip(parameters, 1.02 * limit, stages)


def _clipped_alone(parameters: list[nn.Parameter], limit: float, stages: dist.ProcessGroup | None) -> Tensor:
    """A clip by the norm of the own stage."""
    return clip(parameters, limit, None)


def _unmarked(member: cluster.Member, model: nn.Module) -> Any:
    """A mesh in which no weight says that no other stage has it."""
    mesh = enter_mesh(member, model)
    for parameter in model.parameters():
        parameter.__dict__.pop("model_parallel", None)
    return mesh


def _four_buffers(*arguments: Any) -> dict[str, Any]:
    """State on a disk with room for the gradient, which DeepSpeed takes there too."""
    found = offload_section(*arguments)
    found["offload_optimizer"]["buffer_count"] = 4
    return found


# Faults that a comparison must find, as patches: of the engine under ZeRO-0; of `deepspeed_shims`, one part left out.
BREAKS: dict[str, tuple[Callable[[], Any], ...]] = {
    "clip": (lambda: patch.object(trainer.engine.engine, "clip", _clipped_later),),
    "norm": (lambda: patch.object(trainer.engine.engine, "clip", _clipped_alone),),
    "unmarked": (lambda: patch.object(deepspeed_shims, "enter_mesh", _unmarked),),
    "aliased": (lambda: patch.object(deepspeed_shims, "own_weights", lambda: None),),
    "swapped": (
        lambda: patch.object(deepspeed_shims, "keep_gradients", lambda _: None),
        lambda: patch.object(deepspeed_config, "_offload", _four_buffers),
    ),
}
