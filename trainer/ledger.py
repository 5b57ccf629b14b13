"""What a run cost: model FLOPs, device-hours and the paper's currency, TPUv3-core-days (COATNET.md section 5)."""

from dataclasses import dataclass

P_REF = 61.5e12  # FLOP/s of one TPUv3 core in bf16: 123e12 a chip, two cores a chip
U_REF = 0.30  # share of P_REF that the paper's runs reached (29.8 %, 30.1 %, 37.0 %), one value so that runs compare
DAY = 86400.0


@dataclass
class Ledger:
    """Sums over the life of a run, carried in its checkpoints.

    Attributes:
        multiply_adds: of one image's forward pass.
        images: trained on, each once.
        device_seconds: devices times seconds held.
        peak: dense bf16 FLOP/s of one device, None where unknown.
    """

    multiply_adds: int
    peak: float | None
    images: int = 0
    device_seconds: float = 0.0

    @property
    def model_flops(self) -> float:
        """F = 6 M N: two FLOPs per multiply-add, backward twice the forward; nothing for recomputation."""
        return 6.0 * self.multiply_adds * self.images

    @property
    def core_days_flops(self) -> float:
        """What the same work costs on TPUv3 at the paper's utilisation: F / (86400 P_ref u_ref)."""
        return self.model_flops / (DAY * P_REF * U_REF)

    @property
    def core_days_device(self) -> float | None:
        """The device time in TPUv3 cores of equal peak: (G T / 86400) (P_gpu / P_ref); None for an unknown device."""
        return None if self.peak is None else self.device_seconds / DAY * self.peak / P_REF

    @property
    def mfu(self) -> float | None:
        """Model FLOPs over what the devices could have done in the time they were held."""
        if self.peak is None or self.device_seconds == 0:
            return None
        return self.model_flops / (self.device_seconds * self.peak)

    def metrics(self) -> dict[str, float]:
        """The ledger under the names of DESIGN.md; figures that are not known are left out."""
        values = {
            "cost/device_hours": self.device_seconds / 3600,
            "cost/model_flops": self.model_flops,
            "cost/tpu_v3_core_days_flops": self.core_days_flops,
            "cost/tpu_v3_core_days_device": self.core_days_device,
        }
        return {name: value for name, value in values.items() if value is not None}

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"images": self.images, "device_seconds": self.device_seconds}

    def resume(self, state: dict[str, float]) -> None:
        """Go on from a checkpoint's sums."""
        self.images, self.device_seconds = int(state["images"]), float(state["device_seconds"])

    def summary(self) -> str:
        """Lines for a person, at the end of a run."""
        lines = [
            f"images {self.images:,}   model FLOPs {self.model_flops:.4g}   device-hours "
            f"{self.device_seconds / 3600:.4f}",
            f"TPUv3-core-days: {self.core_days_flops:.4g} by FLOPs at {U_REF:.0%} of peak",
        ]
        if self.core_days_device is not None and self.mfu is not None:
            lines[1] += f", {self.core_days_device:.4g} by device time; MFU {self.mfu:.1%}"
        else:
            lines[1] += "; MFU and device-time equivalent unknown: this device's peak is not in the table"
        return "\n".join(lines)
