"""Parameter groups, AdamW and the learning-rate schedules of the paper's table 10."""

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from configs.schema import Optim
from trainer.engine.moments import HalfMoments


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: kernels with weight decay; biases, norms and relative-bias tables without (COATNET.md section 2).

    Kernels are the parameters of two or four dimensions; relative-bias tables have three. Each group carries `name`
    and `names` beside `params`.
    """
    decayed = [(name, parameter) for name, parameter in named]
    groups: dict[str, list[tuple[str, nn.Parameter]]] = {"decay": [], "no_decay": []}
    for name, parameter in decayed:
        # Under ZeRO-3 construction a parameter's own shape is empty; DeepSpeed keeps the true one aside.
        shape = getattr(parameter, "ds_shape", parameter.shape)
        groups["decay" if len(shape) in (2, 4) else "no_decay"].append((name, parameter))
    return [
        {
            "name": kind,
            "names": [name for name, _ in members],
            "params": [parameter for _, parameter in members],
            "weight_decay": weight_decay if kind == "decay" else 0.0,
        }
        for kind, members in groups.items()
    ]


def adamw(
    groups: list[dict[str, Any]], optim: Optim, device: torch.device, moments: Literal["fp32", "bf16"] = "fp32"
) -> torch.optim.AdamW:
    """AdamW over `groups`; torch's fused kernel, so that nothing is compiled at start.

    Args:
        moments: how the two moments are kept (`precision.moments`).
    """
    bare = [{key: value for key, value in group.items() if key != "names"} for group in groups]
    fused = device.type in ("cuda", "cpu")
    kind = HalfMoments if moments == "bf16" else torch.optim.AdamW
    return kind(bare, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=fused)


def learning_rate(optim: Optim, step: int, steps: int, warmup: int) -> float:
    """The learning rate of the update number `step` (0-based) out of `steps`.

    Linear warm-up over `warmup` updates to `optim.lr`, then the cosine, the line or the constant of
    `optim.schedule` down to `optim.min_lr`, reached at the last update.
    """
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    if optim.schedule == "constant":
        return optim.lr
    progress = min(1.0, (step - warmup) / max(1, steps - 1 - warmup))
    share = 0.5 * (1 + math.cos(math.pi * progress)) if optim.schedule == "cosine" else 1 - progress
    return optim.min_lr + (optim.lr - optim.min_lr) * share


def clip(parameters: list[nn.Parameter], limit: float, stages: dist.ProcessGroup | None) -> Tensor:
    """Scale the gradients of a stage so that the norm over all stages is at most `limit`.

    Args:
        stages: the ranks whose parameters belong to the same model; None: only this one.

    Returns:
        () the global norm before.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    if stages is not None:
        squares = norm.square()
        dist.all_reduce(squares, group=stages)
        norm = squares.sqrt()
    nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm
