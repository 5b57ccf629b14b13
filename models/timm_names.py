"""Our networks in timm's terms: which of them timm can express, by which arguments, and the names of the tensors.

timm packs queries, keys and values head by head, writes linear layers as 1x1 convolutions, and its relative-bias table
is (offsets, heads). Its stages all have stride 2 (`timm.models.maxxvit`, release 1.0.31). timm is not imported here.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from configs.errors import InputError
from models.design import Spec
from models.resize import is_table

COUNTER = "num_batches_tracked"  # torch's BatchNorm buffer, which ours does not need

_WHOLE = {
    "stem.conv1": "stem.conv1",
    "stem.norm": "stem.norm1",
    "stem.conv2": "stem.conv2",
    "head.norm": "head.norm",
    "head.hidden": "head.pre_logits.fc",
    "head.classifier": "head.fc",
}
_MBCONV = {
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
_TRANSFORMER = {
    "norm_attention": "norm1",
    "attention": "attn.rel_pos",
    "attention.qkv": "attn.qkv",
    "attention.projection": "attn.proj",
    "shortcut": "shortcut.expand",
    "norm_feed": "norm2",
    "widen": "mlp.fc1",
    "narrow": "mlp.fc2",
}


class Place(NamedTuple):
    """Where timm has one of our tensors.

    Attributes:
        heads: of a packed qkv, else 0.
        convolved: a linear weight that timm has as a 1x1 convolution.
    """

    name: str
    heads: int = 0
    convolved: bool = False


def obstacles(spec: Spec) -> list[str]:
    """What timm has no expression for in a spec; empty where it can express it."""
    found = [f"{stage.name} of {stage.block}" for stage in spec.stages if stage.block == "patches"]
    if not found and spec.stages[0].block != "stem":
        found.append(f"{spec.stages[0].block} as the first stage")
    found += [f"stride {stage.stride} of {stage.name}" for stage in spec.stages if stage.stride not in (2, 16)]
    if spec.relative_bias == "post":
        found.append("relative bias after the softmax")
    if spec.conv_norm != "batch":
        found.append("LayerNorm in MBConv beside BatchNorm in the stem")
    if spec.kernel != 3:
        found.append(f"kernel {spec.kernel} in the stem")
    found += [
        f"hidden width {spec.expansion * stage.width} of {stage.name}, no multiple of 8"
        for stage in spec.stages
        if stage.block == "mbconv" and spec.expansion * stage.width % 8
    ]
    return found


def architecture(spec: Spec) -> str:
    """The registered timm model whose arguments `arguments` changes: the namesake, or the smallest."""
    family = spec.name.removesuffix("-dagger")
    known = {f"coatnet{size}": f"coatnet_{size}_224" for size in range(6)}
    return known.get(family, "coatnet_0_224")


def arguments(spec: Spec, resolution: tuple[int, int]) -> dict[str, Any]:
    """Keyword arguments with which `timm.create_model(architecture(spec), ...)` is the same function. All of JSON.

    Raises:
        InputError: timm has no such network; see `obstacles`.
    """
    found = obstacles(spec)
    if found:
        raise InputError(f"timm cannot express {spec.name}: {'; '.join(found)}; export it as --format safetensors")
    stages = spec.stages[1:]
    return {
        "img_size": list(resolution),
        "embed_dim": [stage.width for stage in stages],
        "depths": [stage.depth for stage in stages],
        "block_type": ["C" if stage.block == "mbconv" else "T" for stage in stages],
        "stem_width": spec.stages[0].width,
        "stem_bias": True,
        "head_hidden_size": stages[-1].width,
        "conv_expand_ratio": float(spec.expansion),
        "conv_attn_ratio": spec.se_ratio,
        "conv_stride_mode": "1x1" if spec.stride == "expansion" else "dw",
        "conv_pool_type": "max2",
        "conv_norm_eps": 1e-3,
        "conv_act_layer": "gelu_tanh",
        "transformer_dim_head": spec.head_size,
        "transformer_expand_ratio": float(spec.expansion),
        "transformer_pool_type": "max2",
        "transformer_rel_pos_type": "bias" if spec.relative_bias == "pre" else "none",
        "transformer_norm_eps": 1e-5,
        "transformer_act_layer": "gelu_tanh",
    }


def place(name: str, spec: Spec) -> Place:
    """Where timm has our tensor `name`."""
    path, _, leaf = name.rpartition(".")
    _, stage_name, index, inner = path.split(".", 3)
    if stage_name == "head":
        return Place(f"{_WHOLE[f'head.{inner}']}.{leaf}")
    number = [stage.name for stage in spec.stages].index(stage_name)
    stage = spec.stages[number]
    if stage.block == "stem":
        return Place(f"{_WHOLE[f'stem.{inner}']}.{leaf}")
    block = f"stages.{number - 1}.blocks.{index}"
    if stage.block == "mbconv":
        return Place(f"{block}.{_MBCONV[inner]}.{leaf}")
    target = f"{block}.{_TRANSFORMER[inner]}"
    if inner == "norm_attention" and index == "0":
        target += ".norm"  # followed by the pool, in one Sequential
    if is_table(name):
        return Place(f"{target}.relative_position_bias_table")
    heads = stage.width // spec.head_size if inner == "attention.qkv" else 0
    return Place(f"{target}.{leaf}", heads, convolved=leaf == "weight" and "norm" not in inner)


def to_timm(tensors: Mapping[str, Tensor], spec: Spec) -> dict[str, Tensor]:
    """Our tensors under timm's names, in its shapes, with the counters of its BatchNorm: its whole state."""
    moved: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        there = place(name, spec)
        if is_table(name):
            tensor = tensor.flatten(1).T
        elif there.heads:
            rest = tensor.shape[1:]
            tensor = tensor.reshape(3, there.heads, spec.head_size, *rest).transpose(0, 1).reshape(-1, *rest)
        moved[there.name] = (tensor[..., None, None] if there.convolved else tensor).contiguous()
        if name.endswith("running_var"):
            moved[there.name.replace("running_var", COUNTER)] = torch.zeros((), dtype=torch.int64)
    return moved


def from_timm(
    tensors: Mapping[str, Tensor], spec: Spec, wanted: Mapping[str, tuple[int, ...]], where: str
) -> dict[str, Tensor]:
    """timm's tensors under our names and in our shapes, in float32.

    Args:
        wanted: our names and shapes.
        where: the file, for messages.

    Raises:
        InputError: a tensor that is missing, left over or of a size that does not fit, by timm's name.
    """
    left = {name: tensor for name, tensor in tensors.items() if not name.endswith(COUNTER)}
    moved = {}
    for name, shape in wanted.items():
        there = place(name, spec)
        tensor = left.pop(there.name, None)
        if tensor is None:
            raise InputError(f"{where}: has no tensor {there.name} ({name}); it is not a whole {spec.name}")
        if tensor.numel() != math.prod(shape):
            raise InputError(
                f"{where}: {there.name} has shape {tuple(tensor.shape)}, which is no {shape} ({name}); the file does "
                f"not belong to its description"
            )
        if is_table(name):
            tensor = tensor.T
        elif there.heads:
            rest = shape[1:]
            tensor = tensor.reshape(there.heads, 3, spec.head_size, *rest).transpose(0, 1)
        moved[name] = tensor.reshape(shape).float().contiguous()
    if left:
        raise InputError(f"{where}: tensor {min(left)} belongs to no {spec.name}; {len(left)} are left over")
    return moved
