"""A whole run in days, devices, energy and money, from the seconds of one step; with the failures to expect. No torch.

Failures: Kokolis et al. (arXiv 2410.21680) found one in 7.9 hours of jobs of 1,024 GPUs; that many device-hours lie
between two on the average here too. What a failure costs is assumed: `NOTICED` and `RESTARTED` seconds, a save that
stands still while the state is copied to the host and is then written at `WRITTEN` bytes/s for each machine.
"""

from dataclasses import dataclass

from configs.schema import Cluster
from trainer.cost.ledger import HOUR, Holding, Ledger
from trainer.health.ettr import Costs, foretell
from trainer.planning.machines import Machines
from trainer.planning.rates import Rates
from trainer.state.interval import between

BETWEEN = 7.9 * HOUR * 1024  # device-seconds from one failure to the next
NOTICED, RESTARTED = 60.0, 300.0
WRITTEN = 2e9


@dataclass(frozen=True)
class Job:
    """What a run has to do, whatever its layout.

    Attributes:
        multiply_adds: of one picture's forward pass.
        parameters: of the network.
        steps: optimizer steps.
        batch: pictures of a step.
        averages: whether averaged weights are kept too.
    """

    multiply_adds: int
    parameters: int
    steps: int
    batch: int
    averages: bool


@dataclass(frozen=True)
class Outlook:
    """A whole run on certain machines.

    Attributes:
        step: seconds of a step.
        images_per_second: while it trains.
        seconds: from start to end, failures and saves included.
        failures: expected.
        interval: seconds between two saves.
        ratio: expected share of the time that trains.
        ledger: model FLOPs, device-hours, energy at the devices' full power, money.
    """

    step: float
    images_per_second: float
    seconds: float
    failures: float
    interval: float
    ratio: float
    ledger: Ledger

    @property
    def days(self) -> float:
        """From start to end."""
        return self.seconds / (24 * HOUR)


def outlook(job: Job, step: float, machines: Machines, rates: Rates, wish: Cluster) -> Outlook:
    """The run at `step` seconds a step; prices and power as the run's `cluster` has them, else the device's.

    MFU counts the time that trains, failures and saves apart, as a run's own figure does.
    """
    count, device = machines.devices, machines.device
    mtbf = BETWEEN / count
    state = (4 * 4 if job.averages else 3 * 4) * job.parameters
    costs = Costs(NOTICED, RESTARTED, state / count / rates.host, state / (WRITTEN * machines.nodes))
    interval = max(between(costs.stall, costs.write, mtbf), step)
    ratio = max(foretell(costs, mtbf), 0.01)
    trains = job.steps * step
    held = Holding(device.name, device.peak, wish.price or None, wish.currency, wish.watts or device.watts)
    held.seconds = count * trains / ratio
    ledger = Ledger(job.multiply_adds, held, images=job.steps * job.batch)
    return Outlook(step, job.batch / step, trains / ratio, trains / ratio / mtbf, interval, ratio, ledger)
