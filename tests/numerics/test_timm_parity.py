"""Ours is the same function as timm's, by mapped weights: outputs, all gradients, running statistics.

timm packs queries, keys and values head by head, writes linear layers as 1x1 convolutions, and its bias table is
(offsets, heads). It can express CoAtNet-0..-5.
"""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from timm.models.maxxvit import MaxxVit, MaxxVitCfg, MaxxVitConvCfg, MaxxVitTransformerCfg
from torch import Tensor

from models import coatnet, norm, spec
from models.coatnet import CoAtNet
from models.spec import Spec, Stride

MBCONV = {
    "norm_in": "pre_norm",
    "expand": "conv1_1x1",
    "norm_expand": "norm1",
    "depthwise": "conv2_kxk",
    "norm_depthwise": "norm2",
    "squeeze": "se.fc1",
    "excite": "se.fc2",
    "project": "conv3_1x1",
    "shortcut": "shortcut.expand",
}
TRANSFORMER = {
    "norm_attention": "norm1",
    "attention.qkv": "attn.qkv",
    "attention.projection": "attn.proj",
    "attention": "attn.rel_pos",
    "shortcut": "shortcut.expand",
    "norm_feed": "norm2",
    "widen": "mlp.fc1",
    "narrow": "mlp.fc2",
}
WHOLE = {
    "blocks.s0.0.conv1": "stem.conv1",
    "blocks.s0.0.norm": "stem.norm1",
    "blocks.s0.0.conv2": "stem.conv2",
    "blocks.head.0.norm": "head.norm",
    "blocks.head.0.hidden": "head.pre_logits.fc",
    "blocks.head.0.classifier": "head.fc",
}

EXPRESSIBLE = [f"coatnet{size}" for size in range(6)]


def peer(which: Spec, stride: Stride, resolution: int) -> MaxxVit:
    """The peer: timm's model of the same function."""
    config = MaxxVitCfg(
        embed_dim=tuple(stage.width for stage in which.stages[1:]),
        depths=tuple(stage.depth for stage in which.stages[1:]),
        block_type=("C", "C", "T", "T"),
        stem_width=which.stages[0].width,
        stem_bias=True,
        head_hidden_size=which.stages[-1].width,
        conv_cfg=MaxxVitConvCfg(
            stride_mode="1x1" if stride == "expansion" else "dw", pool_type="max2", norm_eps=1e-3, act_layer="gelu_tanh"
        ),
        transformer_cfg=MaxxVitTransformerCfg(
            dim_head=which.head_size, pool_type="max2", rel_pos_type="bias", norm_eps=1e-5, act_layer="gelu_tanh"
        ),
    )
    return MaxxVit(config, img_size=resolution, num_classes=11)


def mapped(tensors: dict[str, Tensor], which: Spec) -> Iterator[tuple[str, Tensor]]:
    """Our parameters, buffers or gradients under timm's names and in its shapes."""
    for name, tensor in tensors.items():
        path, leaf = name.rpartition(".")[::2]
        stage = path.split(".")[1]
        if stage in ("s0", "head"):
            yield f"{WHOLE[path]}.{leaf}", tensor
            continue
        _, _, index, inner = path.split(".", 3)
        block = f"stages.{int(stage[1]) - 1}.blocks.{index}"
        if stage in ("s1", "s2"):
            yield f"{block}.{MBCONV[inner]}.{leaf}", tensor
            continue
        target = f"{block}.{TRANSFORMER[inner]}"
        if inner == "norm_attention" and index == "0":
            target += ".norm"
        if leaf == "table":
            yield f"{target}.relative_position_bias_table", tensor.flatten(1).T
            continue
        if inner == "attention.qkv":
            heads = which.stages[int(stage[1])].width // which.head_size
            rest = tensor.shape[1:]
            tensor = tensor.view(3, heads, -1, *rest).transpose(0, 1).reshape(-1, *rest)
        yield f"{target}.{leaf}", tensor[..., None, None] if tensor.dim() == 2 else tensor


def twins(
    which: Spec, stride: Stride | None, resolution: int, dtype: torch.dtype = torch.float64
) -> tuple[CoAtNet, MaxxVit]:
    """Ours and timm's with the same random weights and running statistics, momentum 0.1."""
    ours = coatnet.build(which, resolution=resolution, classes=11, stride=stride, norm_momentum=0.1, device="cpu")
    ours.to(dtype)
    torch.manual_seed(0)
    state = ours.state_dict()
    for name, tensor in state.items():
        spread = tensor[0].numel() ** -0.5 if tensor.dim() > 1 and "table" not in name else 0.3
        centre = 1.0 if tensor.dim() == 1 and name.endswith(("weight", "var")) else 0.0
        tensor.uniform_(centre - spread, centre + spread)
    theirs = peer(which, stride or which.stride, resolution).to(dtype)
    missing, unexpected = theirs.load_state_dict(dict(mapped(state, which)), strict=False)
    assert not unexpected
    assert all(name.endswith("num_batches_tracked") for name in missing)
    return ours, theirs


def agree(ours: Tensor, theirs: Tensor, tolerance: float = 1e-10) -> bool:
    ours, theirs = ours.detach(), theirs.detach()
    assert ours.shape == theirs.shape
    # What is zero but for rounding, as the gradient of a bias before a norm, counts as zero.
    return float((ours - theirs).abs().max()) <= tolerance * (0.01 + float(theirs.abs().max()))


def small(name: str) -> Spec:
    """A paper model at its own depth with narrow stages and heads of 8 channels."""
    which = spec.get(name)
    stages = tuple(replace(stage, width=stage.width // 8) for stage in which.stages)
    return replace(which, stages=stages, head_size=8)


@pytest.mark.parametrize("stride", ["expansion", "depthwise"])
@pytest.mark.parametrize("name", EXPRESSIBLE)
def test_training_and_evaluation_agree(name: str, stride: Stride) -> None:
    which = small(name)
    ours, theirs = twins(which, stride, 64)
    x = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    assert agree(ours.eval()(x), theirs.eval()(x))
    logits, expected = ours.train()(x), theirs.train()(x)
    assert agree(logits, expected)
    weights = torch.randn_like(logits)
    (logits * weights).sum().backward()
    (expected * weights).sum().backward()
    gradients = {path: weight.grad for path, weight in ours.named_parameters() if weight.grad is not None}
    reference = {path: weight.grad for path, weight in theirs.named_parameters() if weight.grad is not None}
    moved = dict(mapped(gradients, which))
    assert moved.keys() == reference.keys()
    for path, gradient in moved.items():
        assert agree(gradient, reference[path]), path
    norm.commit(ours)
    buffers = dict(theirs.named_buffers())
    statistics = dict(mapped({k: v for k, v in ours.state_dict().items() if "running" in k}, which))
    assert statistics.keys() == {path for path in buffers if "running" in path}
    for path, value in statistics.items():
        assert agree(value, buffers[path]), path


def evaluated_at_its_size(name: str, resolution: int, dtype: torch.dtype, tolerance: float) -> None:
    """The unchanged paper model, one picture."""
    ours, theirs = twins(spec.get(name), None, resolution, dtype)
    x = torch.randn(1, 3, resolution, resolution, dtype=dtype)
    with torch.no_grad():
        assert agree(ours.eval()(x), theirs.eval()(x), tolerance)


def test_coatnet0_at_224_agrees() -> None:
    evaluated_at_its_size("coatnet0", 224, torch.float64, 1e-10)


@pytest.mark.parametrize("name", ["coatnet1", "coatnet2"])
def test_true_sizes_agree(name: str) -> None:
    evaluated_at_its_size(name, 64, torch.float64, 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype", "tolerance"),
    [("coatnet3", torch.float64, 1e-10), ("coatnet4", torch.float64, 1e-10), ("coatnet5", torch.float32, 1e-4)],
)
def test_the_largest_sizes_agree(name: str, dtype: torch.dtype, tolerance: float) -> None:
    # In float64 two copies of -5 would take 11 GB.
    evaluated_at_its_size(name, 64, dtype, tolerance)
