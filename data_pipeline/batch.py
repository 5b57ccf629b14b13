"""What the stream hands to the trainer: one micro-batch.

Shape suffixes: B samples, C colours, H height, W width, L labels of a sample (padded), 4 box edges.
"""

from dataclasses import dataclass, fields, replace

import torch


@dataclass(frozen=True, eq=False)
class Batch:
    """One micro-batch of one rank."""

    images_BCHW: torch.Tensor  # uint8 RGB
    labels: torch.Tensor  # int64; (B,) for single labels, (B, L) padded with -1 for many
    seeds_B: torch.Tensor  # int64, `order.sample_seed`
    indices_B: torch.Tensor  # int64, global sample index over the run; in evaluation the index in the split
    valid_B: torch.Tensor  # bool; False marks repeats that pad the last batches of an evaluation
    keys: list[str]
    kept_B: torch.Tensor | None = None  # float32, the sample's own share in its mixture; None: no mixing
    boxes_B4: torch.Tensor | None = None  # int64 (top, left, bottom, right), cutmix; all 0 where mixed by mixup
    weights_BL: torch.Tensor | None = None  # float32, of soft labels, 0 to 1; None: every label counts whole

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on `device`; copies from pinned memory do not wait."""
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in self._tensors().items()}
        return replace(self, **moved)  # type: ignore[arg-type]

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory, for fast copies to a GPU; called by torch's DataLoader."""
        pinned = {name: tensor.pin_memory() for name, tensor in self._tensors().items()}
        return replace(self, **pinned)  # type: ignore[arg-type]

    def _tensors(self) -> dict[str, torch.Tensor]:
        """The fields that hold a tensor, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
