"""One of two ranks of `test_norm.py`: RANK RENDEZVOUS INPUT OUTPUT.

Reads the whole batch, takes its own half, and writes what it computed in float64 and in bfloat16.
"""

import sys
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from models import norm


def results(arrays: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Outputs, gradients and running statistics of this rank; the two halves share statistics."""
    layer = norm.BatchNorm(arrays["x"].shape[1], momentum=0.3)
    layer.to(torch.promote_types(dtype, torch.float32))
    with torch.no_grad():
        layer.weight.copy_(arrays["weight"])
        layer.bias.copy_(arrays["bias"])
    x, dy = (arrays[name].to(dtype).chunk(2)[dist.get_rank()] for name in ("x", "dy"))
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    norm.configure(layer, group=len(x), process_group=dist.group.WORLD)
    y = layer(x)
    y.backward(dy)
    with norm.recomputing():
        again = layer(x)
    norm.commit(layer)
    assert x.grad is not None
    assert layer.weight.grad is not None
    assert layer.bias.grad is not None
    assert y.dtype == x.grad.dtype == dtype
    alone = norm.BatchNorm(x.shape[1], momentum=1.0).to(layer.weight.dtype)
    alone(x)
    norm.commit(alone)
    gradients = {"dx": x.grad, "dweight": layer.weight.grad, "dbias": layer.bias.grad}
    running = {"mean": layer.running_mean, "var": layer.running_var, "alone": alone.running_var}
    return {"y": y, "again": again, **running, **gradients}


def main() -> None:
    """Join the other rank, compute, write."""
    rank, rendezvous, source, target = sys.argv[1:]
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=int(rank), world_size=2, timeout=timedelta(seconds=60)
    )
    arrays = {name: torch.from_numpy(value) for name, value in np.load(source, allow_pickle=False).items()}
    found = {
        f"{str(dtype).removeprefix('torch.')}.{name}": tensor.detach().double().numpy()
        for dtype in (torch.float64, torch.bfloat16)
        for name, tensor in results(arrays, dtype).items()
    }
    np.savez(target, allow_pickle=False, **found)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
