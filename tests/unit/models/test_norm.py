"""Our BatchNorm against torch's: one group, several groups, groups across real processes, recomputation, commit."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models import norm
from models.norm import BatchNorm

CHANNELS = 6
ROOT = Path(__file__).parents[3]


def pair(dtype: torch.dtype = torch.float64) -> tuple[BatchNorm, nn.BatchNorm2d]:
    """Our layer and torch's with the same random weights and running statistics."""
    torch.manual_seed(3)
    theirs = nn.BatchNorm2d(CHANNELS, eps=1e-3, momentum=0.2, dtype=torch.float64)
    for tensor in (theirs.weight.data, theirs.bias.data, theirs.running_mean, theirs.running_var):
        assert tensor is not None
        tensor.uniform_(0.5, 2.0)
    ours = BatchNorm(CHANNELS, momentum=0.2).to(dtype)
    ours.load_state_dict({name: value for name, value in theirs.state_dict().items() if name in ours.state_dict()})
    return ours, theirs.to(dtype)


def picture(batch: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, CHANNELS, 5, 4, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 3 + 1


def close(a: Tensor | None, b: Tensor | None, tolerance: float = 1e-12) -> bool:
    return a is not None and b is not None and torch.allclose(a, b, rtol=tolerance, atol=tolerance)


def test_one_group_is_torch_with_gradients_and_running_statistics() -> None:
    ours, theirs = pair()
    for step in range(3):
        x, x_theirs = picture(8, step).requires_grad_(), picture(8, step).requires_grad_()
        y, y_theirs = ours(x), theirs(x_theirs)
        (y**3).sum().backward()
        (y_theirs**3).sum().backward()
        norm.commit(ours)
        assert close(y, y_theirs)
        assert close(x.grad, x_theirs.grad)
    assert close(ours.weight.grad, theirs.weight.grad)
    assert close(ours.bias.grad, theirs.bias.grad)
    assert close(ours.running_mean, theirs.running_mean)
    assert close(ours.running_var, theirs.running_var)
    assert close(ours.eval()(picture(4, 9)), theirs.eval()(picture(4, 9)))


def test_one_group_is_normalised_as_it_lies() -> None:
    # A split of one part would cost a copy of the whole gradient in the backward pass.
    ours, _ = pair()
    x = picture(4).requires_grad_()
    node = ours.train()(x).grad_fn
    assert node is not None
    assert node.next_functions[0][0].variable is x


@pytest.mark.parametrize("passes", [1, 3])
def test_groups_of_one_rank_are_separate_layers_and_average(passes: int) -> None:
    ours, theirs = pair()
    norm.configure(ours, group=4)
    theirs.momentum = 1.0
    before, means, variances = ours.running_mean.clone(), [], []
    for step in range(passes):
        x = picture(8, step)
        y = ours(x)
        for part in range(2):
            group = slice(4 * part, 4 * part + 4)
            assert close(y[group], theirs(x[group]))
            assert theirs.running_mean is not None
            assert theirs.running_var is not None
            means.append(theirs.running_mean.clone())
            variances.append(theirs.running_var.clone())
    assert torch.equal(ours.running_mean, before)
    var_before = ours.running_var.clone()
    norm.commit(ours)
    assert close(ours.running_mean, 0.8 * before + 0.2 * torch.stack(means).mean(0))
    assert close(ours.running_var, 0.8 * var_before + 0.2 * torch.stack(variances).mean(0))


def test_recomputation_counts_once_and_changes_nothing() -> None:
    ours, _ = pair()
    plain, _ = pair()
    x = picture(8).requires_grad_()
    y: Tensor = checkpoint(ours, x, use_reentrant=False, context_fn=lambda: (torch.enable_grad(), norm.recomputing()))
    torch.autograd.backward((y**3).sum())
    expected = plain(picture(8))
    assert torch.equal(y, expected)
    assert ours.pending[-1] == 1
    norm.commit(ours)
    norm.commit(plain)
    assert torch.equal(ours.running_mean, plain.running_mean)
    with norm.recomputing():
        assert torch.equal(ours(picture(8)), expected)
    assert not ours.pending.any()


def test_bf16_has_float32_statistics_and_keeps_dtype_and_layout() -> None:
    ours, _ = pair(torch.float32)
    exact, _ = pair()
    x = (picture(16, dtype=torch.float32) + 30).bfloat16().to(memory_format=torch.channels_last)
    y = ours(x)
    assert y.dtype == torch.bfloat16
    assert y.is_contiguous(memory_format=torch.channels_last)
    expected = exact(x.double())
    assert torch.allclose(ours.pending.double(), exact.pending, rtol=1e-5)
    assert torch.allclose(y.double(), expected, rtol=2**-7, atol=2**-7)
    ours.bfloat16().running_mean.data = ours.running_mean.float()
    ours.running_var.data = ours.running_var.float()
    assert ours(x).dtype == torch.bfloat16


def test_statistics_in_waiting_are_no_part_of_the_state() -> None:
    ours, _ = pair()
    ours(picture(8))
    assert set(ours.state_dict()) == {"weight", "bias", "running_mean", "running_var"}


def test_refuses_ragged_groups_and_uneven_commits() -> None:
    ours, _ = pair()
    norm.configure(ours, group=3)
    with pytest.raises(ValueError, match="8 samples is not made of whole groups of 3"):
        ours(picture(8))
    two = nn.ModuleList([pair()[0], pair()[0]])
    with pytest.raises(RuntimeError, match="equally many groups"):
        norm.commit(two)
    two[0](picture(8))
    with pytest.raises(RuntimeError, match="equally many groups"):
        norm.commit(two)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, NDArray[np.float64]]]:
    """What each of two gloo processes computes on its half of a batch, in float64 and in bfloat16."""
    folder = tmp_path_factory.mktemp("ranks")
    _, theirs = pair()
    source, rendezvous = folder / "batch.npz", str(folder / "rendezvous")
    np.savez(source, allow_pickle=False, x=picture(8, 1).numpy(), dy=picture(8, 2).numpy(), **weights(theirs))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    script, targets = str(Path(__file__).with_name("norm_rank.py")), [folder / f"rank{rank}.npz" for rank in range(2)]
    running = [
        subprocess.Popen([sys.executable, script, str(rank), rendezvous, str(source), str(target)], env=environment)
        for rank, target in enumerate(targets)
    ]
    assert [process.wait(timeout=120) for process in running] == [0, 0]
    return [dict(np.load(target, allow_pickle=False)) for target in targets]


def weights(theirs: nn.BatchNorm2d) -> dict[str, NDArray[np.float64]]:
    return {"weight": theirs.weight.detach().numpy(), "bias": theirs.bias.detach().numpy()}


@pytest.mark.parametrize(("dtype", "tolerance", "statistics"), [("float64", 1e-10, 1e-10), ("bfloat16", 2**-6, 1e-5)])
def test_two_processes_are_one_group(
    ranks: list[dict[str, NDArray[np.float64]]], dtype: str, tolerance: float, statistics: float
) -> None:
    _, theirs = pair()
    theirs.reset_running_stats()
    theirs.momentum = 0.3
    x, dy = (picture(8, seed).to(getattr(torch, dtype)).double() for seed in (1, 2))
    y = theirs(x.requires_grad_())
    y.backward(dy)
    first, second = ({name: torch.from_numpy(value) for name, value in rank.items()} for rank in ranks)
    for name, whole in (("y", y), ("dx", x.grad)):
        joined = torch.cat([first[f"{dtype}.{name}"], second[f"{dtype}.{name}"]])
        assert close(joined, whole, tolerance), name
    for name, parameter in (("dweight", theirs.weight), ("dbias", theirs.bias)):
        assert close(first[f"{dtype}.{name}"] + second[f"{dtype}.{name}"], parameter.grad, tolerance), name
    for name, running in (("mean", theirs.running_mean), ("var", theirs.running_var)):
        assert torch.equal(first[f"{dtype}.{name}"], second[f"{dtype}.{name}"]), name
        assert close(first[f"{dtype}.{name}"], running, statistics), name
    assert torch.equal(first[f"{dtype}.again"], first[f"{dtype}.y"])


def test_groups_of_separate_ranks_are_averaged(ranks: list[dict[str, NDArray[np.float64]]]) -> None:
    halves = torch.stack([half.var((0, 2, 3)) for half in picture(8, 1).chunk(2)])
    first, second = (torch.from_numpy(rank["float64.alone"]) for rank in ranks)
    assert torch.equal(first, second)
    assert close(first, halves.mean(0))
    assert not close(first, halves[0], 1e-3)
