"""In which order a stage of a pipeline computes its micro-batches and exchanges them with its neighbours. No torch.

A schedule is a list of steps: forward or backward of one micro-batch, or an exchange, a set of transfers that are
started together and waited for together. `trainer.stages.trace` proves that no schedule can wait for itself in a
circle.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Compute:
    """One micro-batch through this stage, forward or backward."""

    kind: Literal["forward", "backward"]
    micro: int


@dataclass(frozen=True)
class Transfer:
    """A tensor between this stage and `peer`: an activation goes to the next stage, its gradient comes back."""

    kind: Literal["send", "receive"]
    what: Literal["activation", "gradient"]
    micro: int
    peer: int


Exchange = tuple[Transfer, ...]
Step = Compute | Exchange


def one_forward_one_backward(stages: int, stage: int, micros: int) -> list[Step]:
    """The steps of `stage` for one optimizer step: 1F1B (Narayanan et al., SC 2021, figure 4).

    A stage computes min(stages - 1 - stage, micros) micro-batches ahead, then one forward and one backward in turn, so
    that it never holds more than stages - stage of them. Where it sends an activation on and waits for a gradient, or
    the other way round, both are one exchange: one after the other, two neighbours could wait for each other.

    Args:
        stages: of the pipeline, at least 1.
        stage: in [0, stages).
        micros: micro-batches of the optimizer step, at least 1.
    """

    def exchange(*transfers: Transfer | None) -> Exchange:
        return tuple(transfer for transfer in transfers if transfer is not None)

    def activation(kind: Literal["send", "receive"], micro: int) -> Transfer | None:
        peer = stage + 1 if kind == "send" else stage - 1
        return Transfer(kind, "activation", micro, peer) if 0 <= peer < stages and micro < micros else None

    def gradient(kind: Literal["send", "receive"], micro: int) -> Transfer | None:
        peer = stage - 1 if kind == "send" else stage + 1
        return Transfer(kind, "gradient", micro, peer) if 0 <= peer < stages else None

    ahead = min(stages - 1 - stage, micros)
    steps: list[Step] = []
    for micro in range(ahead):
        steps += [exchange(activation("receive", micro)), Compute("forward", micro)]
        steps.append(exchange(activation("send", micro)))
    steps.append(exchange(activation("receive", ahead)))
    for micro in range(micros - ahead):
        steps.append(Compute("forward", micro + ahead))
        steps.append(exchange(activation("send", micro + ahead), gradient("receive", micro)))
        steps.append(Compute("backward", micro))
        steps.append(exchange(gradient("send", micro), activation("receive", micro + ahead + 1)))
    for micro in range(micros - ahead, micros):
        steps += [exchange(gradient("receive", micro)), Compute("backward", micro)]
        steps.append(exchange(gradient("send", micro)))
    return [step for step in steps if step != ()]


def in_flight(stages: int, stage: int, micros: int) -> int:
    """Micro-batches whose backward pass is still to come, at most: what a stage must hold."""
    return min(stages - stage, micros)
