"""How fast a device really is at each kind of work: assumed from its data sheet, or measured and kept. No torch.

`coatnet bench step` measures and writes ~/.config/coatnet/rates/DEVICE-DTYPE-STYLE-ATTENTION-RANKS.json; whatever it
did not measure stays assumed, and is shown as that. The assumptions are shares of the data sheet: 0.80 of the peak for
large products and 0.90 of the bandwidth (both measured by others on an H100: 798 TFLOP/s, 3.0 TB/s), attention kernels
at 0.12 (explicit), 0.18 (SDPA with a bias) and 0.35 (FlexAttention) of the peak, 0.80 of links and networks. `SHARE` is
what a sum of such kernels comes to: eager blocks of CoAtNet-0 and -3 took an H200 2.1 and 1.9 times as long as that sum
(record planner-cuda); of compiled ones nobody measured any.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from configs.errors import InputError
from models.activations import Attention, Dtype
from models.operations import WORKS, Style, Work
from trainer.machine.devices import Device

MATH: tuple[Work, ...] = ("matrix", "window", "product")
PRODUCTS: dict[Attention, float] = {"explicit": 0.12, "sdpa": 0.18, "flex": 0.35}
# By ZeRO stage, of DeepSpeed 0.19: gradients added up in fp32 (12), laid into buckets (8) and taken out (8); under
# ZeRO-3 weights gathered in bf16 and laid out. Read from its source, to be measured.
HOOKS = (1e-5, 3e-5, 4e-5, 1e-4)
COPIES = (12.0, 12.0, 28.0, 32.0)
SETTLING = (28.0, 32.0, 12.0, 8.0)
SHARE: dict[Style, float] = {"eager": 0.5, "compiled": 0.7, "bound": 1.0}
# Seconds of a GPU's host for a kernel: assumed, where a slow one took 4.3e-5 with its eager kernels.
LAUNCH: dict[Style, float] = {"eager": 2e-5, "compiled": 5e-6, "bound": 0.0}
STEP = 2e-3  # seconds of a GPU's host at the end of a step; assumed
CORE_FLOPS = 1e11  # assumed of a processor's core
DISK = 5e9  # bytes/s of a local NVMe disk


@dataclass(frozen=True)
class Rates:
    """Of one device, dtype and style of computing.

    Attributes:
        attention: the form in which it was computed.
        ranks: processes that shared the machine, which matters on a processor.
        forward, backward: by kind of work: FLOP/s of those in `MATH`, bytes/s of the others.
        call: seconds of a kernel whatever it does.
        launch: seconds of the host for a kernel, while the device is at work on earlier ones; 0 on a processor, whose
            `call` has them.
        step: seconds of the host for a step whatever there is to do; 0 on a processor.
        update: bytes/s of AdamW, and of what DeepSpeed copies.
        hooks: seconds of the host for one weight and micro-batch, by ZeRO stage.
        copies: bytes that DeepSpeed moves for each element and micro-batch, by ZeRO stage.
        settling: bytes that it moves for each element at the end of a step, by ZeRO stage.
        wire: bytes/s that leave a rank for others of its machine; in a collective, over the busiest link.
        network: bytes/s that leave a rank for other machines.
        latency, hop: seconds of a collective, and more for each machine but the first.
        host, disk: bytes/s one way to the host's memory and to a local disk.
        overlap: share of the backward pass behind which traffic can hide where the engine lets it.
        share: of a step in which kernels run as counted.
        alone: on a processor how much faster a rank computes while the others of its machine wait, since cores share
            what they have; 1 on a GPU.
        measured: names of the fields that were measured; the others are assumed.
    """

    device: str
    dtype: Dtype
    style: Style
    attention: str
    ranks: int
    forward: Mapping[Work, float]
    backward: Mapping[Work, float]
    call: float
    launch: float
    step: float
    update: float
    hooks: tuple[float, ...]
    copies: tuple[float, ...]
    settling: tuple[float, ...]
    wire: float
    network: float
    latency: float
    hop: float
    host: float
    disk: float
    overlap: float
    share: float
    alone: float = 1.0
    measured: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Of the file that keeps them."""
        return f"{self.device}-{self.dtype}-{self.style}-{self.attention}-{self.ranks}.json"

    @property
    def origin(self) -> str:
        """Where they come from, for people."""
        if not self.measured:
            return "assumed from the data sheet; `coatnet bench step` on such a device measures them"
        left = [name for name in _FITTED if name not in self.measured and getattr(self, name)]
        return "measured" + (f"; assumed: {', '.join(left)}" if left else "")

    def write(self, folder: Path) -> Path:
        """Write them into a folder; returns the file."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / self.name
        aside = path.with_suffix(f".{os.getpid()}")
        aside.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        return aside.replace(path)


# Those that a measurement could replace; `latency` comes with `wire`, `hop` with `network`, `call` with the blocks.
_FITTED = ("forward", "backward", "launch", "step", "update", "hooks", "copies", "settling", "wire", "latency",
           "network", "hop", "host", "disk", "overlap")  # fmt: skip


def assumed(device: Device, dtype: Dtype, style: Style, ranks: int, attention: Attention, nic: float) -> Rates:
    """What to expect of a device that nobody has measured.

    Args:
        ranks: processes on the machine, of a processor; else 0.
        attention: the form in which it is computed; "auto" is explicit on a processor, SDPA on a GPU.
        nic: bytes/s of network for each device.
    """
    on_host = device.on_host
    peak = device.peak or CORE_FLOPS * max(1.0, device.bandwidth / 10e9)
    if dtype == "fp32" and not on_host:
        peak /= 2  # TF32
    form = attention if attention != "auto" else "explicit" if on_host else "sdpa"
    matrix = 0.8 * peak
    each: dict[Work, float] = dict.fromkeys(WORKS, 0.9 * device.bandwidth)
    each |= {"matrix": matrix, "window": matrix / 2, "product": PRODUCTS[form] * peak}
    return Rates(
        device=device.name, dtype=dtype, style=style, attention=form, ranks=ranks, forward=each, backward=each,
        call=2e-6, launch=0.0 if on_host else LAUNCH[style], step=0.0 if on_host else STEP,
        update=0.9 * device.bandwidth,
        hooks=HOOKS, copies=COPIES, settling=SETTLING, wire=0.8 * device.link, network=0.8 * nic,
        latency=25e-6, hop=5e-6, host=0.8 * device.host, disk=DISK, overlap=0.0 if on_host else 0.6,
        share=0.9 if on_host else SHARE[style],
    )  # fmt: skip


def folder() -> Path:
    """Where measured rates are kept."""
    return Path.home() / ".config" / "coatnet" / "rates"


def of(
    device: Device, dtype: Dtype, style: Style, ranks: int, attention: Attention, nic: float, place: Path | None = None
) -> Rates:
    """The measured rates of such a device where there are some, else what is assumed of it.

    On a processor those of as many ranks on the machine. Where the network was not measured, `nic` decides.

    Args:
        place: the folder with files of rates; None: the user's own.

    Raises:
        InputError: a file that cannot be read.
    """
    plain = assumed(device, dtype, style, ranks, attention, nic)
    path = (folder() if place is None else place) / plain.name
    if not path.is_file():
        return plain
    found = read(path)
    return found if "network" in found.measured else replace(found, network=plain.network)


def read(path: Path) -> Rates:
    """Rates from a file of `Rates.write`.

    Raises:
        InputError: it is something else.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        names = [field.name for field in fields(Rates)]
        if sorted(content) != sorted(names) or not all(
            set(content[way]) == set(WORKS) for way in ("forward", "backward")
        ):
            raise ValueError("its fields are not those of this version")
        numbers = [*content["forward"].values(), *content["backward"].values(), content["wire"], content["update"]]
        if not all(isinstance(value, int | float) and value > 0 for value in numbers):
            raise ValueError("a rate is not a positive number")
        rows = {name: tuple(content[name]) for name in ("hooks", "copies", "settling", "measured")}
        return Rates(**{**content, **rows})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path}: no file of rates ({error}); `coatnet bench step` writes it anew") from None
