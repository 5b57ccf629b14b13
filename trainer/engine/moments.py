"""AdamW with both moments in bf16: half their memory, and files of half their size.

The arithmetic is that of torch's fused kernel in fp32, piece by piece, so that no fp32 copy of all moments exists. A
new moment differs from the old by less than bf16 can tell (the second by a thousandth of itself, where neighbours are
up to 1/128 apart), so that rounding to the nearest would leave it where it is for ever. It is rounded up or down by
chance instead, in proportion, and right on the average. The chance is a function of the step and the place in the
tensor: a run that continues repeats itself.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

PIECES = {"cpu": 1 << 16}  # elements at a time, what a core's cache holds; elsewhere
PIECE = 1 << 24
LOW = 0xFFFF  # the bits of an fp32 that bf16 leaves out
MASK = 0xFFFFFFFF


class HalfMoments(torch.optim.AdamW):
    """See the module. Parameters are fp32; ZeRO hands over flat pieces of them.

    Attributes:
        moments: dtype of the state.
        found_inf: () on the device; where it is 1 nothing changes.
    """

    moments = torch.bfloat16
    found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        assert closure is None, "the gradients are there"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(group, parameter)

    def _update(self, group: dict[str, Any], parameter: Tensor) -> None:
        """One parameter, piece by piece."""
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state |= fresh(parameter, self.moments)
        step = state["step"]
        step += 1
        size = PIECES.get(parameter.device.type, PIECE)
        whole = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
        pieces = [value.view(-1).split(size) for value in whole]
        places = torch.arange(min(size, parameter.numel()), device=parameter.device) * 0x9E3779B1
        for number, (values, gradient, first, second) in enumerate(zip(*pieces, strict=True)):
            wide = (first.float(), second.float())
            torch._fused_adamw_(
                [values], [gradient], [wide[0]], [wide[1]], [], [step], amsgrad=False, maximize=False, lr=group["lr"],
                beta1=group["betas"][0], beta2=group["betas"][1], weight_decay=group["weight_decay"], eps=group["eps"],
                grad_scale=None, found_inf=self.found_inf,
            )  # fmt: skip
            chance = noise(places[: len(values)], step, number)
            first.copy_(rounded(wide[0], chance & LOW))
            second.copy_(rounded(wide[1], chance >> 16))
        if self.found_inf is not None:
            step -= self.found_inf


def fresh(parameter: Tensor, moments: torch.dtype) -> dict[str, Tensor]:
    """AdamW's state before its first step. A fused kernel wants the counter beside the parameter."""
    state = {name: torch.zeros_like(parameter, dtype=moments) for name in ("exp_avg", "exp_avg_sq")}
    return {"step": torch.zeros((), dtype=torch.float32, device=parameter.device), **state}


def moments_of(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """Both moments of one tensor, flat; made as AdamW's first step would make them if they are not there yet."""
    state = optimizer.state[parameter]
    if "exp_avg" not in state:
        state |= fresh(parameter, getattr(optimizer, "moments", torch.float32))
    return {name: state[name].view(-1) for name in ("exp_avg", "exp_avg_sq")}


def rounded(value: Tensor, chance: Tensor) -> Tensor:
    """Finite fp32 values as those of bf16 next to them, below or above.

    Args:
        value: (n,) fp32.
        chance: (n,) whole numbers from 0 to LOW: the share of the way from which on a value goes up, from above.
    """
    return ((value.view(torch.int32) + chance.int()) & ~LOW).view(torch.float32)


def noise(places: Tensor, step: Tensor, piece: int) -> Tensor:
    """(n,) int64, as good as random in 0 .. MASK, of a place, the step and the piece alone; waits for no device."""
    mixed = (places + (step.long() * 0x85EBCA6B + piece * 0xC2B2AE35)) & MASK
    for factor in (0x7FEB352D, 0x2C1B3C6D):
        mixed = ((mixed ^ (mixed >> 16)) * factor) & MASK
    return mixed ^ (mixed >> 15)
