"""Bytes that a network really holds between its forward and its backward pass, block by block.

Every storage made in the forward pass is followed by a weak reference, and those alive after it are counted: a storage
once, whoever keeps it, checkpoints included. This is the measurement behind `models.activations`.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.coatnet import CoAtNet, RunBlock
from models.norm import BatchNorm

_weak: Callable[[torch.UntypedStorage], Any] = StorageWeakRef  # torch gives it no types


class Storages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows every storage that an operation returns while this is entered.

    Args:
        device: the kind of device whose storages count; "": all.

    Attributes:
        owner: the block at work, under which new storages are noted.
    """

    def __init__(self, device: str = "") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = device
        self.owner = ""
        self._seen: dict[int, tuple[Any, int, str]] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation and note what it returns."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.note(leaf)
        return result

    def note(self, tensor: Tensor) -> None:
        """Follow the storage of `tensor`, unless it is followed already, or is no memory at all."""
        if tensor.device.type == "meta" or self._device not in ("", tensor.device.type):
            return
        storage = tensor.untyped_storage()
        # The weak reference keeps the address from being used again.
        self._seen.setdefault(storage._cdata, (_weak(storage), storage.nbytes(), self.owner))

    def hand_over(self, tensor: Tensor, owner: str) -> None:
        """Note the storage of `tensor` under another block: the one that takes it in."""
        storage = tensor.untyped_storage()
        self._seen[storage._cdata] = _weak(storage), storage.nbytes(), owner

    def alive(self, static: nn.Module, more: Iterable[Tensor] = ()) -> Counter[str]:
        """Bytes by block of the storages that still exist, parameters and buffers of `static` and `more` aside."""
        own = {tensor.untyped_storage()._cdata for tensor in (*static.parameters(), *static.buffers(), *more)}
        found: Counter[str] = Counter()
        for address, (reference, size, owner) in self._seen.items():
            if address not in own and not reference.expired():
                found[owner] += size
        return found


def held_bytes(
    model: CoAtNet,
    batch: int,
    run: RunBlock | None = None,
    autocast: AbstractContextManager[Any] | None = None,
) -> dict[str, int]:
    """Bytes held after a forward pass of `batch` pictures in training mode, by the names of the blocks.

    A block's input counts with the block. What BatchNorm has set aside for the running statistics is forgotten.

    Args:
        model: on its device, in training mode.
        batch: B.
        run: how the blocks are called (`trainer.engine.recompute.run_block`).
        autocast: the context of the forward pass; None: none.
    """
    device = next(model.parameters()).device
    names = {id(block): name for name, block in model.flat}
    following = dict(zip(names.values(), [*list(names.values())[1:], "logits"], strict=True))
    storages = Storages()

    def watched(block: Callable[..., Any], x: Tensor, drop: Tensor | None) -> Tensor:
        storages.owner = names[id(block)]
        output: Tensor = block(x, drop) if run is None else run(block, x, drop)
        storages.hand_over(output, following[storages.owner])
        return output

    with storages, autocast or nullcontext():
        storages.owner = model.flat[0][0]
        # Nothing but the graph behind the loss may keep the pictures and the logits alive.
        pictures = torch.randn(batch, 3, *model.resolution, device=device)
        logits = model(pictures.to(memory_format=torch.channels_last), None, watched)
        storages.owner = "loss"
        loss = logits.sum()
        del pictures, logits
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.pending.zero_()
    found = storages.alive(model)
    del loss
    return {name: found[name] for name in names.values()}
