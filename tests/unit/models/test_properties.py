"""What holds for the networks whatever their weights: symmetries, every resolution, and how little they need."""

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from configs.errors import InputError
from models import coatnet, cost, norm, spec
from models.attention import Backend, RelativeAttention, attend
from models.coatnet import CoAtNet
from models.spec import Resolution, Spec, Stride

ROOT = Path(__file__).resolve().parents[3]
NANO = spec.get("coatnet-nano")
# The third stage of -6 and -7 has convolutions too.
SPLIT = replace(
    spec.get("coatnet7"),
    stages=tuple(replace(s, width=s.width // 32, depth=min(s.depth, 2)) for s in spec.get("coatnet7").stages),
    head_size=8,
)
# Pixels that a value of the last convolution stage can see to each side: 3 of the stem, 4, 8 and 16 of each block.
REACH = {NANO.name: 3 + 4 + 2 * 8, SPLIT.name: 3 + 2 * 4 + 2 * 8 + 2 * 16}


def made(which: Spec = NANO, resolution: Resolution = 64, stride: Stride | None = None) -> CoAtNet:
    """In float64, with no weight or running statistic at its initial value."""
    model = coatnet.build(which, resolution=resolution, classes=10, stride=stride)
    coatnet.initialise(model, 0, "cpu")
    model.double()
    torch.manual_seed(0)
    for name, tensor in model.state_dict().items():
        if tensor.dim() == 1:
            tensor += torch.rand_like(tensor).sub(0.0 if name.endswith("var") else 0.5).mul(0.4)
        else:
            tensor.normal_(0.0, 0.3 if name.endswith("table") else tensor[0].numel() ** -0.5)
    return model


def pictures(batch: int, height: int = 64, width: int = 64) -> Tensor:
    return torch.randn(batch, 3, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def close(ours: Tensor, theirs: Tensor) -> bool:
    return ours.shape == theirs.shape and bool(torch.allclose(ours, theirs, rtol=0, atol=1e-11))


def convolved(model: CoAtNet, x: Tensor) -> list[Tensor]:
    """The feature map after every block up to the first that is not convolutional."""
    found = []
    for _, block in model.flat:
        x = block(x)
        if x.dim() != 4:
            break
        found.append(x)
    return found


@pytest.mark.parametrize("stride", ["expansion", "depthwise"])
@pytest.mark.parametrize("which", [NANO, SPLIT])
@torch.no_grad()
def test_convolution_stages_follow_a_translation_by_the_total_stride(which: Spec, stride: Stride) -> None:
    # A patch on an empty picture, so far inside that neither it nor its copy meets the padding: squeeze-excite's means
    # over the picture then stay the same, and what is translated is exact, away from the borders.
    reach, down, right = REACH[which.name], 32, 64
    near = -(-2 * reach // 32) * 32
    height, width = 2 * near + 32 + down, 2 * near + 32 + right
    model = made(which, (height, width), stride).eval()
    first, second = torch.zeros(2, 1, 3, height, width, dtype=torch.float64).unbind(0)
    first[..., near : near + 32, near : near + 32] = pictures(1, 32, 32)
    second[..., near + down : near + down + 32, near + right : near + right + 32] = pictures(1, 32, 32)
    maps = list(zip(convolved(model, first), convolved(model, second), strict=True))
    assert len(maps) == sum(stage.block == "mbconv" and stage.depth for stage in which.stages) + 1
    for here, there in maps:
        step = height // here.shape[2]
        edge, rows, columns = -(-reach // step), down // step, right // step
        before = here[..., edge : here.shape[2] - edge - rows, edge : here.shape[3] - edge - columns]
        after = there[..., edge + rows : there.shape[2] - edge, edge + columns : there.shape[3] - edge]
        assert close(before, after)
        spots = before.flatten(2).std(2)
        assert float(spots.min()) > 1e-4  # every channel shows the patch
        assert not close(before, there[..., edge : edge + before.shape[2], edge : edge + before.shape[3]])


@pytest.mark.parametrize("training", [True, False])
def test_a_permuted_batch_gives_permuted_logits_and_gradients(training: bool) -> None:
    model = made(SPLIT).train(training)
    order = torch.tensor([2, 0, 3, 1])
    factors = torch.rand(len(model.drop_rates), 4, dtype=torch.float64)
    plain, mixed = pictures(4).requires_grad_(), pictures(4)[order].requires_grad_()
    logits, permuted = model(plain, factors), model(mixed, factors[:, order])
    assert close(permuted, logits[order])
    assert not close(permuted, logits)
    torch.autograd.backward([logits.square().sum(), permuted.square().sum()])
    assert plain.grad is not None
    assert mixed.grad is not None
    assert close(mixed.grad, plain.grad[order])


def test_groups_of_normalisation_permute_as_wholes() -> None:
    model = made()
    norm.configure(model, group=2)
    logits = model(pictures(4))
    assert close(model(pictures(4)[[3, 2, 0, 1]]), logits[[3, 2, 0, 1]])
    assert not close(model(pictures(4)[[0, 2, 1, 3]]), logits[[0, 2, 1, 3]])


@pytest.mark.parametrize("backend", ["explicit", "sdpa"])
def test_attention_has_no_order_but_that_of_its_bias(backend: Backend) -> None:
    q, k, v = torch.randn(3, 2, 4, 12, 8, dtype=torch.float64).unbind(0)
    bias = torch.randn(4, 12, 12, dtype=torch.float64)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(2))
    y = attend(q, k, v, bias, backend)
    permuted = bias[:, order][:, :, order]
    assert close(attend(q[:, :, order], k[:, :, order], v[:, :, order], permuted, backend), y[:, :, order])
    assert not close(attend(q[:, :, order], k[:, :, order], v[:, :, order], bias, backend), y[:, :, order])
    # The keys alone: the sum over them does not change.
    assert close(attend(q, k[:, :, order], v[:, :, order], bias[:, :, order], backend), y)


@pytest.mark.parametrize("axis", [1, 2])
def test_a_mirrored_grid_is_a_mirrored_table(axis: int) -> None:
    layer = RelativeAttention(12, 16, 8, (3, 4)).double()
    assert layer.table is not None
    torch.nn.init.normal_(layer.table)
    x = torch.randn(2, 3, 4, 12, dtype=torch.float64)
    y = layer(x.flatten(1, 2)).view(2, 3, 4, 16).flip(axis)
    mirrored = x.flip(axis).flatten(1, 2)
    assert not close(layer(mirrored).view_as(y), y)
    layer.table.data = layer.table.data.flip(axis)
    assert close(layer(mirrored).view_as(y), y)


sides = st.integers(1, 5).map(lambda count: 32 * count)


@given(height=sides, width=sides)
@settings(max_examples=12, deadline=None)
@torch.no_grad()
def test_every_multiple_of_32_is_a_resolution(height: int, width: int) -> None:
    model = made(resolution=(height, width))
    for training in (True, False):
        logits = model.train(training)(pictures(2, height, width))
        assert logits.shape == (2, 10)
        assert logits.isfinite().all()
    assert (
        sum(weight.numel() for weight in model.parameters()) == cost.count(NANO, (height, width), None, 10).parameters
    )


@given(side=st.integers(-100, 700).filter(lambda side: side < 1 or side % 32), other=sides, first=st.booleans())
@settings(max_examples=50, deadline=None)
def test_any_other_side_is_refused_with_the_nearest_valid(side: int, other: int, first: bool) -> None:
    with pytest.raises(InputError, match=r"must be a positive multiple of 32.*nearest valid: \d+$") as refused:
        coatnet.build(NANO, resolution=(side, other) if first else (other, side), classes=10)
    nearest = int(str(refused.value).rsplit(" ", 1)[1])
    assert nearest % 32 == 0
    assert nearest >= 32
    assert abs(nearest - side) <= 16 or nearest == 32


@torch.no_grad()
def test_permuted_classes_permute_the_logits() -> None:
    model = made().eval()
    logits = model(pictures(3))
    order = torch.randperm(10, generator=torch.Generator().manual_seed(3))
    classifier = model.get_submodule("blocks.head.0.classifier")
    for parameter in classifier.parameters():
        parameter.copy_(parameter[order])
    assert close(model(pictures(3)), logits[:, order])
    assert not close(logits, logits[:, order])


def test_all_eight_models_are_built_and_counted_in_seconds() -> None:
    started = time.process_time()
    for size in range(8):
        which = spec.get(f"coatnet{size}")
        model = coatnet.build(which, resolution=224, classes=1000)
        built = sum(weight.numel() for weight in model.parameters())
        assert built == cost.count(which, 224).parameters
    assert time.process_time() - started < 5


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_coatnet7_in_bf16_runs_in_10_gib() -> None:
    code = """
import resource, torch
from models import coatnet, spec
model = coatnet.build(spec.get("coatnet7"), resolution=224, classes=1000).to(torch.bfloat16)
coatnet.initialise(model, 0, "cpu")
with torch.no_grad():
    logits = model.eval()(torch.randn(1, 3, 224, 224, dtype=torch.bfloat16))
assert logits.dtype == torch.bfloat16 and logits.isfinite().all() and logits.any()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # ru_maxrss is in KiB; the weights alone are 4.6 GiB.
    assert 4.5 * 2**20 < int(done.stdout) < 10 * 2**20
