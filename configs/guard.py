"""What is watched while a run trains, and what follows: a section of `configs/schema.py`."""

from dataclasses import dataclass
from typing import Literal

from configs.errors import at_least, in_range, require

Act = Literal["continue", "skip", "rollback", "stop"]  # skip: the update is left out; see trainer/health/guard.py


@dataclass(frozen=True)
class Guard:
    """What is watched while a run trains, and what is done about it; `trainer/health/judge.py` has the rules."""

    nonfinite: Act = "skip"  # loss or gradient; its update is left out in any case
    spike: Act = "continue"  # of the loss
    explosion: Literal["continue", "rollback", "stop"] = "continue"  # of the gradient's norm
    divergence: Literal["continue", "rollback", "stop"] = "stop"
    drift: Literal["continue", "rollback", "stop"] = "rollback"  # between replicas; goes back, but skips no data
    slow_rank: Literal["continue", "stop"] = "continue"
    input_bound: Literal["continue", "stop"] = "continue"
    budget: int = 10  # skips or rollbacks for one kind within `budget_steps`; one more stops the run
    budget_steps: int = 10_000
    rollback_steps: int = 10  # back to the newest good checkpoint so many steps or more before the bad batch
    skip_batches: int = 20  # data left out after a rollback: from `rollback_steps` before the bad batch on
    window: int = 128  # healthy steps that a loss or a norm is held against; none is judged before a quarter of them
    spike_z: float = 10.0  # robust z-score of a loss
    explosion_z: float = 10.0  # robust z-score of a norm's logarithm
    divergence_factor: float = 2.0  # of the best loss
    divergence_steps: int = 100  # in a row above it
    nonfinite_steps: int = 5  # in a row that make a run count as diverged
    drift_every: int = 100  # steps between two comparisons of the replicas; 0: none
    slow_factor: float = 1.3  # of the median rank's compute time, three steps running
    input_share: float = 0.5  # of the time spent waiting for data, over 50 steps

    @property
    def reach(self) -> int:
        """How many steps before the newest checkpoint a rollback may want one."""
        immediate = (self.nonfinite, self.spike, self.explosion)
        lasting = max(self.divergence_steps, self.nonfinite_steps)
        return max(
            self.rollback_steps if "rollback" in immediate else 0,
            self.rollback_steps + lasting if self.divergence == "rollback" else 0,
            self.drift_every if self.drift == "rollback" else 0,
        )

    def __post_init__(self) -> None:
        for name in ("budget", "rollback_steps", "drift_every"):
            at_least(f"guard.{name}", getattr(self, name), 0)
        for name in ("budget_steps", "divergence_steps", "nonfinite_steps"):
            at_least(f"guard.{name}", getattr(self, name), 1)
        at_least("guard.window", self.window, 8)
        least = self.rollback_steps + 1
        rule = "must reach from guard.rollback_steps before the bad batch over the bad one"
        require(self.skip_batches >= least, "guard.skip_batches", self.skip_batches, rule, least)
        for name in ("spike_z", "explosion_z", "divergence_factor", "slow_factor"):
            at_least(f"guard.{name}", getattr(self, name), 1.0)
        in_range("guard.input_share", self.input_share, 0.0, 1.0)
