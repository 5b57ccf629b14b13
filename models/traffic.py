"""Operations of every block, forward and backward: their arithmetic and the bytes they move. No torch.

What a roofline needs (`trainer/roofline.py`). An operation takes as long as its arithmetic or its bytes, whichever is
longer. The bytes are those of tensors read and written, each once for every pass over it, in three styles:

eager     every operation by itself, as torch calls them in `models.blocks`
compiled  torch.compile: point-wise operations fused with each other and with the reductions behind them
bound     what hand-written kernels could reach: norms, GELU and squeeze-excite inside the convolutions beside them, and
          an attention kernel that adds up the gradient of the relative bias itself

Counted as everything else is: from the spec alone, all residual branches computed. The counts of an MBConv block agree
with reference measurements of how often its expanded map is touched: 49 passes eager, 31 compiled, 17 bound.
tests/unit/models/test_traffic.py has them.

B: samples, C: channels of the output, P: positions of the output, H: attention heads.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

from models.activations import Attention, Device, Dtype, Setting
from models.cost import Cost, Weight, count
from models.design import BlockSpec, Kind, Resolution, Spec, Stride
from models.operations import BlockTraffic, Both, Operation, Style, Work


@dataclass(frozen=True)
class _At(Setting):
    """What operations depend on beside the shapes of their block."""

    style: Style
    drops: bool  # stochastic depth scales the residual branches
    weights: dict[str, Weight]

    def of(self, eager: Both, compiled: Both, bound: Both) -> Both:
        """The bytes of so many values in the style that is asked for."""
        forward, backward = {"eager": eager, "compiled": compiled, "bound": bound}[self.style]
        return self.size * forward, self.size * backward


def traffic(
    spec: Spec,
    resolution: Resolution = 224,
    *,
    style: Style = "eager",
    dtype: Dtype = "bf16",
    attention: Attention = "auto",
    device: Device = "cuda",
    stride: Stride | None = None,
    classes: int = 1000,
    drops: bool = False,
) -> tuple[BlockTraffic, ...]:
    """The operations of every block of `spec` in the order of the forward pass.

    Args:
        spec: the network as data.
        resolution: pixels; (height, width) where not square.
        style: see the top of this file.
        dtype: of the activations.
        attention: as in `models.attention.attend`; "auto" is explicit on a CPU and sdpa on CUDA.
        device: where it runs.
        stride: which MBConv convolution down-samples; None: the spec's own.
        classes: outputs of the classifier.
        drops: whether stochastic depth scales the residual branches.

    Raises:
        InputError: a resolution that the network's total stride does not divide.
    """
    placed = stride or spec.stride
    counts: Cost = count(spec, resolution, placed, classes)
    found = []
    for block, cost in zip(spec.blocks(resolution), counts.blocks, strict=True):
        weights = {weight.path: weight for weight in cost.weights}
        at = _At(1, dtype, attention, device, placed, classes, style, drops, weights)
        operations = _OPERATIONS[block.kind](spec, block, at)
        if style != "eager":
            operations = [_one_kernel(operation) for operation in operations]
        found.append(BlockTraffic(block.name, block.stage, tuple(operations)))
    return tuple(found)


def _one_kernel(operation: Operation) -> Operation:
    """Of compiled code every operation is one kernel a pass, but for the two products behind a map's two gradients."""
    return operation._replace(calls=(1, 2 if operation.work in ("matrix", "window", "product") else 1))


def _map(
    at: _At, path: str, positions_in: float, positions: float, work: Work = "matrix", again: bool = False,
    moved: tuple[Both, Both, Both] | None = None,
) -> list[Operation]:  # fmt: skip
    """A convolution or linear map with its bias, and autocast's copies of its weights.

    Args:
        positions_in: values that it reads in the forward pass.
        positions: outputs for each row of its kernel, from which the multiply-adds follow.
        moved: values moved, if not the plain ones: reads the input and writes the output; backward both once for each
            of the two gradients, and the output's once more for that of the bias.
    """
    kernel, bias = at.weights[f"{path}.weight"], at.weights.get(f"{path}.bias")
    outputs = positions * (bias.elements if bias else kernel.elements)
    flops = 2.0 * kernel.elements * positions
    plain = (positions_in + outputs, 2.0 * (positions_in + outputs) + (outputs if bias else 0))
    eager, compiled, bound = moved or (plain, plain, plain)
    narrow = at.dtype == "bf16"
    size = 2 if narrow else 4
    product = Operation(
        path, work, (flops, 2 * flops), at.of(eager, compiled, bound),
        (size * kernel.elements, 2 * size * kernel.elements), (1, 2 + bool(bias)), again,
    )  # fmt: skip
    if not narrow:
        return [product]
    elements = kernel.elements + (bias.elements if bias else 0)
    copies = Operation(f"{path} copies", "weights", fixed=(6.0 * elements, 6.0 * elements), calls=(1 + bool(bias),) * 2)
    return [product, copies]


def _batch_norm(at: _At, name: str, values: float, follows: bool) -> Operation:
    """Statistics, then scale and shift; backward two sums, then the gradient.

    Args:
        follows: a GELU follows, with which a compiler fuses all but the statistics and the gradient.
    """
    compiled = (values, 3 * values) if follows else (3 * values, 6 * values)
    bound = (0.0, 0.0) if follows else (values, 3 * values)
    return Operation(name, "norm", moved=at.of((3 * values, 5 * values), compiled, bound), calls=(8, 1), again=True)


def _layer_norm(at: _At, name: str, values: float) -> Operation:
    """Under autocast on CUDA in fp32, with a copy before and behind; backward the weights' gradients are one pass more.

    Compiled, it takes in the sum of the two branches before it.
    """
    eager = (2 * values, 5 * values)
    if at.exact_size != at.size:
        wide = at.exact_size / at.size
        eager = ((2 + 4 * wide) * values, (2 + 7 * wide) * values)
    moved = at.of(eager, (2 * values, 4 * values), (2 * values, 4 * values))
    return Operation(name, "norm", moved=moved, calls=(3, 3) if at.exact_size != at.size else (1, 1), again=True)


def _gelu(at: _At, name: str, values: float, in_conv: bool) -> Operation:
    """Eager a pass of its own. In an MBConv compiled code makes scale, shift and GELU one."""
    compiled = (2 * values, 2 * values) if in_conv else (2 * values, 3 * values)
    bound = (0.0, 0.0) if in_conv else (values, values)
    return Operation(name, "gelu", moved=at.of((2 * values, 3 * values), compiled, bound), again=True)


def _join(at: _At, name: str, values: float) -> Operation:
    """The sum of the two branches, and in the backward pass that of their gradients."""
    scaled = 2 * values if at.drops else 0.0
    moved = at.of((3 * values + scaled, 3 * values + scaled), (3 * values, values), (values, values))
    return Operation(name, "elementwise", moved=moved, calls=(1 + at.drops, 1 + at.drops))


def _pool(at: _At, name: str, values_in: float, values: float) -> Operation:
    """Max pool with int64 indices, which compiled code keeps in a byte."""
    index = 8 / at.size if at.style == "eager" else 1 / at.size
    moved = values_in + (1 + index) * values, 2 * values_in + (1 + index) * values
    return Operation(name, "elementwise", moved=at.of(moved, moved, moved), calls=(1, 2))


def _stem(spec: Spec, block: BlockSpec, at: _At) -> list[Operation]:
    """Two convolutions with norm and GELU between them."""
    positions, values = prod(block.grid), float(prod(block.grid) * block.width)
    pictures = prod(block.grid_in) * block.width_in
    first = (pictures + values, pictures + 2 * values)  # the pictures have no gradient
    return [
        *_map(at, "conv1", pictures, positions, "window", moved=(first, first, first)),
        _batch_norm(at, "norm", values, follows=True),
        _gelu(at, "gelu", values, in_conv=True),
        *_map(at, "conv2", values, positions, "window"),
    ]


def _patches(spec: Spec, block: BlockSpec, at: _At) -> list[Operation]:
    """One convolution."""
    return _map(at, "conv", prod(block.grid_in) * block.width_in, prod(block.grid), "window")


def _mbconv(spec: Spec, block: BlockSpec, at: _At) -> list[Operation]:
    """Expansion, depthwise convolution, squeeze-excite, projection, and the identity branch."""
    hidden, squeezed = spec.expansion * block.width, int(spec.se_ratio * block.width)
    positions_in, positions = prod(block.grid_in), prod(block.grid)
    expanded = positions if at.stride == "expansion" else positions_in
    entering, leaving = float(positions_in * block.width_in), float(positions * block.width)
    wide_in, wide = float(expanded * hidden), float(positions * hidden)
    layer = spec.conv_norm == "layer"

    def norm(name: str, values: float, follows: bool) -> Operation:
        return _layer_norm(at, name, values) if layer else _batch_norm(at, name, values, follows)

    plain = (entering + wide_in, 2 * (entering + wide_in))
    narrow = (wide + leaving, 2 * (wide + leaving) + leaving)
    spread = (wide_in + wide, 2 * (wide_in + wide))
    taps = 2.0 * spec.kernel**2 * wide
    kernel = at.size * spec.kernel**2 * hidden
    moved = at.of(spread, spread, spread)
    depthwise = Operation("depthwise", "depthwise", (taps, 2 * taps), moved, (kernel, 2 * kernel), (1, 2))
    gated = 2.0 * (2 * hidden * squeezed)
    weights = 2.0 * hidden * squeezed * at.size
    squeeze = Operation("squeeze and excite", "matrix", (gated, 2 * gated), fixed=(weights, 2 * weights), calls=(8, 14))
    mean = at.of((wide, 2 * wide), (wide, 0.0), (wide, 0.0))
    scale = at.of((2 * wide, 6 * wide), (2 * wide, 2 * wide), (0.0, 2 * wide))
    return [
        norm("norm_in", entering, False),
        *_map(at, "expand", entering, expanded, moved=(plain, plain, (plain[0], 2 * entering + 4 * wide_in))),
        norm("norm_expand", wide_in, True),
        _gelu(at, "gelu 1", wide_in, in_conv=True),
        depthwise,
        norm("norm_depthwise", wide, True),
        # Of the second GELU compiled code writes nothing: the mean and the scaling make it again.
        _gelu(at, "gelu 2", wide, in_conv=True)._replace(
            moved=at.of((2 * wide, 3 * wide), (0.0, 2 * wide), (0.0, 0.0))
        ),
        Operation("mean", "elementwise", moved=mean, calls=(2, 3), again=True),
        squeeze._replace(again=True),
        Operation("scale", "elementwise", moved=scale, calls=(1, 4), again=True),
        *_map(at, "project", wide, positions, moved=(narrow, narrow, narrow)),
        *_shortcut(block, at),
        _join(at, "sum", leaving),
    ]


def _shortcut(block: BlockSpec, at: _At) -> list[Operation]:
    """The identity branch: max pool where the grid halves, a linear map where the width changes."""
    pooled = float(prod(block.grid) * block.width_in)
    found = [_pool(at, "pool", prod(block.grid_in) * block.width_in, pooled)] if block.stride > 1 else []
    return found + (_map(at, "shortcut", pooled, prod(block.grid)) if "shortcut.weight" in at.weights else [])


def _transformer(spec: Spec, block: BlockSpec, at: _At) -> list[Operation]:
    """Attention and the feed-forward part, each with its norm and its sum."""
    positions_in, positions = prod(block.grid_in), prod(block.grid)
    entering, tokens = float(positions_in * block.width_in), float(positions * block.width)
    pooled, wide = float(positions * block.width_in), spec.expansion * tokens
    pool = [_pool(at, "pool of tokens", entering, pooled)._replace(again=True)] if block.stride > 1 else []
    return [
        _layer_norm(at, "norm_attention", entering),
        *pool,
        *_map(at, "attention.qkv", pooled, positions),
        *_attention(spec, block, at),
        *_map(at, "attention.projection", tokens, positions),
        *_shortcut(block, at),
        _join(at, "first sum", tokens),
        _layer_norm(at, "norm_feed", tokens),
        *_map(at, "widen", tokens, positions),
        _gelu(at, "gelu", wide, in_conv=False),
        *_map(at, "narrow", wide, positions),
        _join(at, "second sum", tokens),
    ]


def _attention(spec: Spec, block: BlockSpec, at: _At) -> list[Operation]:
    """Between the packed queries, keys, values and the projection, in the form that the device takes.

    A fused kernel makes the products again in its backward pass, and writes the gradient of the bias for every picture,
    which is summed over the batch behind it; FlexAttention and the bound add it up inside.
    """
    tokens, values = prod(block.grid), float(prod(block.grid) * block.width)
    heads = block.width // spec.head_size
    pairs = float(heads * tokens * tokens)
    flops = 2.0 * 2 * tokens * tokens * block.width
    backend = at.attention if at.attention != "auto" else "sdpa" if at.device == "cuda" else "explicit"
    biased = spec.relative_bias == "pre"
    found = []
    if spec.relative_bias != "none":
        look_up = 4.0 * pairs * 2, 4.0 * pairs * (3 if biased else 2)
        found.append(Operation("bias", "elementwise", fixed=look_up, calls=(2, 3)))
    if spec.relative_bias == "post":
        plain = (pairs + 2 * values, 2 * (pairs + 2 * values))
        post = at.of(plain, plain, plain)
        found.append(Operation("bias x values", "product", (flops / 2, flops), post, calls=(3, 4)))
    if backend == "explicit":
        return found + _explicit(at, values, pairs, flops, biased)
    outside = 2 * pairs if biased and backend == "sdpa" else 0.0
    fused = at.of((4 * values, 8 * values + outside), (4 * values, 8 * values + outside), (4 * values, 8 * values))
    return [*found, Operation("attention", "product", (flops, 2.5 * flops), fused, calls=(2, 4))]


def _explicit(at: _At, values: float, pairs: float, flops: float, biased: bool) -> list[Operation]:
    """`models.attention._explicit`: copies with the heads in front; the softmax is in fp32 whatever the rest is."""
    wide = 4 / at.size  # fp32 in values
    cast = wide + 1 if at.dtype == "bf16" else 0.0
    products = (2 * pairs + 4 * values, 2 * (2 * pairs + 4 * values))
    copies = (8 * values, 12 * values)
    soft = (2 * wide * pairs, 3 * wide * pairs)
    adds = ((2 * wide if biased else 0.0) * pairs, (wide if biased else 0.0) * pairs)
    casts = (2 * cast * pairs + adds[0], 2 * cast * pairs + adds[1])
    return [
        Operation("copies", "elementwise", moved=at.of(copies, copies, copies), calls=(4, 6)),
        Operation("q.k, weights x v", "product", (flops, 2 * flops), at.of(products, products, products), calls=(2, 4)),
        Operation("casts and bias", "elementwise", moved=at.of(casts, casts, casts), calls=(3, 3)),
        Operation("softmax", "softmax", moved=at.of(soft, soft, soft)),
    ]


def _head(spec: Spec, block: BlockSpec, at: _At) -> list[Operation]:
    """Mean over the grid, norm, two linear maps."""
    values, width = float(prod(block.grid_in) * block.width_in), float(block.width)
    mean = at.of((values, values), (values, values), (values, values))
    return [
        Operation("mean", "elementwise", moved=mean),
        _layer_norm(at, "norm", width),
        *_map(at, "hidden", width, 1),
        *_map(at, "classifier", width, 1),
    ]


_OPERATIONS: dict[Kind, Callable[[Spec, BlockSpec, _At], list[Operation]]] = {
    "stem": _stem,
    "patches": _patches,
    "mbconv": _mbconv,
    "transformer": _transformer,
    "head": _head,
}
