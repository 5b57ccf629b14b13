"""What a device could reach at best with a network, stage by stage, in the three styles of `models.traffic`. No torch.

Upper bounds: kernels alone, each as fast as its arithmetic or its bytes allow at the ceilings that
`trainer.planning.rates` assumes (0.80 of the peak, 0.90 of the bandwidth, attention kernels by form); no launch, no
update, no traffic.
"""

from dataclasses import dataclass, replace

from models.activations import Attention, Dtype
from models.cost import count
from models.design import Resolution, Spec
from models.operations import STYLES, Style
from models.traffic import traffic
from trainer.machine.devices import Device
from trainer.planning import rates, table
from trainer.planning.roofline import Seconds, of_block, total


@dataclass(frozen=True)
class Ceiling:
    """Of one network on one device, a picture's share of a pass of `batch` of them.

    Attributes:
        seconds: by style and stage, of one picture, forward and backward.
        again: by style, more where every block is made again.
        moved: by style and stage, bytes of one picture's activations and their gradients, both ways.
        multiply_adds: by stage, of one picture's forward pass.
    """

    device: Device
    batch: int
    seconds: dict[Style, dict[str, float]]
    again: dict[Style, float]
    moved: dict[Style, dict[str, float]]
    multiply_adds: dict[str, int]

    def images_per_second(self, style: Style, recompute: bool = False) -> float:
        """Of one device."""
        return 1 / (sum(self.seconds[style].values()) + (self.again[style] if recompute else 0.0))

    def mfu(self, style: Style) -> float | None:
        """Model FLOPs over the device's peak."""
        flops = 6 * sum(self.multiply_adds.values())
        return flops * self.images_per_second(style) / self.device.peak if self.device.peak else None


def ceiling(
    spec: Spec, resolution: Resolution, classes: int, device: Device, batch: int, dtype: Dtype = "bf16"
) -> Ceiling:
    """The ceilings of a network; attention is fused, and in the bound adds up its bias's gradient inside."""
    counts = count(spec, resolution, classes=classes)
    seconds: dict[Style, dict[str, float]] = {}
    moved: dict[Style, dict[str, float]] = {}
    again: dict[Style, float] = {}
    for style in STYLES:
        form: Attention = "explicit" if device.on_host else "flex" if style == "bound" else "sdpa"
        speed = replace(rates.assumed(device, dtype, style, 0, form, 1.0), call=0.0, launch=0.0)
        each: dict[str, list[Seconds]] = {}
        bytes_of: dict[str, float] = {}
        for block in traffic(spec, resolution, style=style, dtype=dtype, attention=form, classes=classes,
                             device="cpu" if device.on_host else "cuda"):  # fmt: skip
            each.setdefault(block.stage, []).append(of_block(block, speed, batch))
            bytes_of[block.stage] = bytes_of.get(block.stage, 0.0) + block.moved
        sums = {stage: total(found) for stage, found in each.items()}
        seconds[style] = {stage: (one.forward + one.backward) / batch for stage, one in sums.items()}
        again[style] = sum(one.full for one in sums.values()) / batch
        moved[style] = bytes_of
    by_stage = {stage: multiply_adds for stage, (_, multiply_adds) in counts.by_stage().items()}
    return Ceiling(device, batch, seconds, again, moved, by_stage)


def text(given: Ceiling) -> str:
    """Stages in rows, styles in columns."""
    head = ["stage", "GMAC"]
    for style in STYLES:
        head += [f"{style} MB", "us", "share"]
    rows = [head]
    for stage, multiply_adds in given.multiply_adds.items():
        row = [stage, f"{multiply_adds / 1e9:.2f}"]
        for style in STYLES:
            part = given.seconds[style][stage]
            row += [f"{given.moved[style][stage] / 1e6:,.1f}", f"{part * 1e6:,.1f}",
                    f"{part / sum(given.seconds[style].values()):.0%}"]  # fmt: skip
        rows.append(row)
    told = [
        f"{style}: {given.images_per_second(style):,.0f} images/s, MFU {table.share(given.mfu(style))}; every block "
        f"made again {given.images_per_second(style, recompute=True):,.0f}"
        for style in STYLES
    ]
    note = f"of one picture in passes of {given.batch} on one {given.device.name}, forward and backward; upper bounds"
    return "\n".join([table.columns(rows, (0,)), "", *told, note])
