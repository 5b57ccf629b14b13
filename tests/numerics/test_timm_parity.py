"""Ours is the same function as timm's, by mapped weights in float64: outputs, all gradients, running statistics.

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
    return MaxxVit(config, img_size=resolution, num_classes=11).double()


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


def twins(which: Spec, stride: Stride, resolution: int) -> tuple[CoAtNet, MaxxVit]:
    """Ours and timm's with the same random weights and running statistics, momentum 0.1."""
    ours = coatnet.build(which, resolution=resolution, classes=11, stride=stride, norm_momentum=0.1)
    coatnet.initialise(ours, 0, "cpu")
    ours.double()
    torch.manual_seed(0)
    for name, tensor in (*ours.named_parameters(), *ours.named_buffers()):
        if not tensor.is_floating_point():
            continue
        spread = tensor[0].numel() ** -0.5 if tensor.dim() > 1 and "table" not in name else 0.3
        centre = 1.0 if tensor.dim() == 1 and name.endswith(("weight", "var")) else 0.0
        tensor.data = centre + spread * torch.rand_like(tensor).mul(2).sub(1)
    theirs = peer(which, stride, resolution)
    missing, unexpected = theirs.load_state_dict(dict(mapped(ours.state_dict(), which)), strict=False)
    assert not unexpected
    assert all(name.endswith("num_batches_tracked") for name in missing)
    return ours, theirs


def agree(ours: Tensor, theirs: Tensor) -> bool:
    ours, theirs = ours.detach(), theirs.detach()
    return float((ours - theirs).abs().max()) <= 1e-10 * max(1.0, float(theirs.abs().max()))


SMALL = replace(
    spec.get("coatnet0"),
    stages=tuple(replace(stage, width=stage.width // 2) for stage in spec.get("coatnet0").stages),
)


@pytest.mark.parametrize("stride", ["expansion", "depthwise"])
def test_training_and_evaluation_agree(stride: Stride) -> None:
    ours, theirs = twins(SMALL, stride, 64)
    x = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    assert agree(ours.eval()(x), theirs.eval()(x))
    logits, expected = ours.train()(x), theirs.train()(x)
    assert agree(logits, expected)
    weights = torch.randn_like(logits)
    (logits * weights).sum().backward()
    (expected * weights).sum().backward()
    gradients = {name: weight.grad for name, weight in ours.named_parameters() if weight.grad is not None}
    reference = {name: weight.grad for name, weight in theirs.named_parameters() if weight.grad is not None}
    moved = dict(mapped(gradients, SMALL))
    assert moved.keys() == reference.keys()
    for name, gradient in moved.items():
        assert agree(gradient, reference[name]), name
    norm.commit(ours)
    buffers = dict(theirs.named_buffers())
    for name, value in mapped({k: v for k, v in ours.state_dict().items() if "running" in k}, SMALL):
        assert agree(value, buffers[name]), name


def test_coatnet0_at_224_agrees() -> None:
    ours, theirs = twins(spec.get("coatnet0"), "expansion", 224)
    x = torch.randn(1, 3, 224, 224, dtype=torch.float64)
    with torch.no_grad():
        assert agree(ours.eval()(x), theirs.eval()(x))
