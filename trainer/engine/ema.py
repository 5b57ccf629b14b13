"""The exponential moving average of the weights, held in the same pieces as the optimizer's state.

No rank holds more of the average than of AdamW's moments, and no weight is gathered to keep it up to date.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from trainer.engine.deepspeed_fragments import Fragment

AVERAGE = "ema/"  # before the names of averaged buffers, in checkpoints


class WeightAverage:
    """Averages of this rank's fp32 fragments and of BatchNorm's running statistics.

    Attributes:
        decay: the largest share kept per update. Early on less is kept, (1 + n) / (10 + n) after n updates, so that
            the average of a short run is not of its initial weights.
        buffers: averages of the running statistics, by name; equal on all ranks.
    """

    def __init__(
        self,
        decay: float,
        fragments: list[Fragment],
        model: nn.Module,
        room: Callable[[Tensor], Tensor] = torch.clone,
    ) -> None:
        """Begin with the weights as they are.

        Args:
            decay: see the class.
            fragments: what this rank holds of the weights.
            model: with the running statistics.
            room: gives a copy of a fragment's values a place.
        """
        self.decay = decay
        self._values = [fragment.value for fragment in fragments]
        self._means = [room(value) for value in self._values]
        self._place = {fragment.name: (fragment.offset, number) for number, fragment in enumerate(fragments)}
        assert len(self._place) == len(fragments), "one fragment per parameter and rank"
        self._live = running_statistics(model)
        self.buffers = {name: buffer.clone() for name, buffer in self._live.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after `step` updates."""
        weight = 1.0 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._means, self._values, weight)
        if self.buffers:  # a stage of a pipeline may be without BatchNorm
            torch._foreach_lerp_(list(self.buffers.values()), list(self._live.values()), weight)

    def beside(self, fragment: Fragment) -> Fragment:
        """The fragment with its average among the moments, as "ema", for saving and restoring."""
        offset, number = self._place[fragment.name]
        low = fragment.offset - offset
        mean = self._means[number][low : low + fragment.value.numel()]
        return replace(fragment, moments={**fragment.moments, "ema": mean})

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Exchange averages and fragments; the caller publishes the fragments inside and afterwards."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        pairs: list[tuple[Tensor, Tensor]] = list(zip(self._values, self._means, strict=True))
        pairs += [(self._live[name], mean) for name, mean in self.buffers.items()]
        for value, mean in pairs:
            kept = value.clone()
            value.copy_(mean)
            mean.copy_(kept)


def running_statistics(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that are state (BatchNorm's), not what can be computed again."""
    names = model.state_dict(keep_vars=True).keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in names}
