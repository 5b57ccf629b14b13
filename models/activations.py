"""Bytes that every block keeps for the backward pass, counted from the spec alone. No torch.

What an operation keeps is what autograd's node of it saves, eager, unless its formula says otherwise. A tensor that two
operations keep counts once: it is named, and a block's names form one dictionary. Weights are not counted, but the bf16
copies that autocast makes of them are: autograd keeps them until the backward pass (the engine turns autocast's own
cache off, so that nothing else does). A block's input counts with the block, its output with the next one.

Recomputation: "none" keeps everything; "full" keeps the block's input; "selective" keeps what the convolutions, linear
layers and the attention put out, and makes the cheap operations between them again, segment by segment.

B: samples, C: channels of the output, N: positions of the output, H: attention heads.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Literal

from models.design import BlockSpec, Kind, Resolution, Spec, Stride

Dtype = Literal["fp32", "bf16"]  # bf16: autocast over fp32 parameters
Recompute = Literal["none", "selective", "full"]
Attention = Literal["auto", "explicit", "sdpa", "flex"]
Device = Literal["cpu", "cuda"]
Bytes = dict[str, int]  # by the name of the tensor inside its block

INPUT = "input"


@dataclass(frozen=True)
class BlockBytes:
    """One block of the flat list, under the network's own name for it.

    Attributes:
        saved: bytes between the forward and the backward pass, of the whole batch.
        inside: bytes that come on top while this block is recomputed, at their peak; 0 where nothing is.
        boundary: bytes of the block's output for one picture: what a cut of a pipeline behind it sends.
    """

    name: str
    stage: str
    saved: int
    inside: int
    boundary: int


@dataclass(frozen=True)
class Segment:
    """Operations of a block that selective recomputation repeats together, or not at all.

    Attributes:
        kept: what autograd keeps of them when they run plainly.
        source: what a checkpoint around them keeps instead; None: they always run plainly.
    """

    kept: Bytes
    source: Bytes | None = None


@dataclass(frozen=True)
class Setting:
    """What the bytes of a block depend on beside its shapes."""

    batch: int
    dtype: Dtype
    attention: Attention
    device: Device
    stride: Stride
    classes: int

    @property
    def size(self) -> int:
        """Bytes of one value of an activation."""
        return 2 if self.dtype == "bf16" else 4

    @property
    def exact_size(self) -> int:
        """Bytes of one value that a LayerNorm takes and puts out: autocast runs it in fp32 on CUDA, not on a CPU."""
        return 4 if self.device == "cuda" else self.size

    def values(self, positions: int, channels: int) -> int:
        """Bytes of an activation of the whole batch."""
        return self.size * self.batch * positions * channels

    def cast(self, weights: int) -> int:
        """Bytes of autocast's copy of so many weights."""
        return 2 * weights if self.dtype == "bf16" else 0


def activations(
    spec: Spec,
    resolution: Resolution = 224,
    *,
    batch: int = 1,
    dtype: Dtype = "bf16",
    recompute: Recompute = "none",
    attention: Attention = "auto",
    device: Device = "cpu",
    stride: Stride | None = None,
    classes: int = 1000,
) -> tuple[BlockBytes, ...]:
    """The bytes of every block of `spec` in the order of the forward pass.

    Checked against autograd on a CPU by tests/numerics/test_saved_bytes.py. Not measured: everything that differs on
    CUDA, i.e. the fused attention kernels and autocast's fp32 LayerNorm.

    Args:
        spec: the network as data.
        resolution: pixels; (height, width) where not square.
        batch: B, pictures of one forward pass.
        dtype: of the activations.
        recompute: see the top of this file.
        attention: as in `models.attention.attend`; "auto" is explicit on a CPU and sdpa on CUDA.
        device: where it runs.
        stride: which MBConv convolution down-samples; None: the spec's own.
        classes: outputs of the classifier.

    Raises:
        InputError: a resolution that the network's total stride does not divide.
    """
    at = Setting(batch, dtype, attention, device, stride or spec.stride, classes)
    found = []
    for block in spec.blocks(resolution):
        # Pictures come in fp32, all else in the dtype of the convolution or linear layer before it.
        entering = batch * prod(block.grid_in) * block.width_in * (4 if block.width_in == 3 else at.size)
        segments = _SEGMENTS[block.kind](spec, block, at)
        saved, inside = _reduce(segments, entering, recompute)
        leaving = classes if block.kind == "head" else prod(block.grid) * block.width
        found.append(BlockBytes(block.name, block.stage, saved, inside, leaving * at.size))
    return tuple(found)


def peak(blocks: tuple[BlockBytes, ...]) -> int:
    """Bytes of activations at the peak of a pass: all that is saved, and the inside of the largest block."""
    return sum(block.saved for block in blocks) + max(block.inside for block in blocks)


def _reduce(segments: tuple[Segment, ...], entering: int, recompute: Recompute) -> tuple[int, int]:
    """(saved, inside) of a block whose input has `entering` bytes."""
    everything = _merge(*(segment.kept for segment in segments))
    if recompute == "none":
        return sum(everything.values()), 0
    if recompute == "full":
        everything.pop(INPUT, None)
        return entering, sum(everything.values())
    saved = _merge(*(segment.kept if segment.source is None else segment.source for segment in segments))
    again = [segment.kept for segment in segments if segment.source is not None]
    # One segment at a time is made again, and gone when the next one is.
    inside = max((sum(size for name, size in kept.items() if name not in saved) for kept in again), default=0)
    return sum(saved.values()), inside


def _merge(*parts: Bytes) -> Bytes:
    """One dictionary of them all: equal names are the same tensor."""
    return {name: size for part in parts for name, size in part.items()}


def _picture(block: BlockSpec, at: Setting) -> Bytes:
    """What the first convolution keeps of the pictures: autocast's copy, or themselves."""
    name = "picture in bf16" if at.dtype == "bf16" else INPUT
    return {name: at.values(prod(block.grid_in), block.width_in)}


def _batch_norm(name: str, width: int) -> Bytes:
    """BatchNorm keeps its input, which the caller counts, mean and deviation, and the two buffers of our read-out."""
    return {f"{name} statistics": 4 * 4 * width}


def _layer_norm(name: str, source: str, positions: int, width: int, at: Setting) -> Bytes:
    """LayerNorm keeps its input, on CUDA under autocast as a copy in fp32, and mean and deviation of each position."""
    exact = at.exact_size != at.size
    kept = {f"{source} in fp32" if exact else source: at.exact_size * at.batch * positions * width}
    return kept | {f"{name} statistics": 2 * 4 * at.batch * positions}


def _stem(spec: Spec, block: BlockSpec, at: Setting) -> tuple[Segment, ...]:
    """Two convolutions, each keeping its input; GELU keeps its input too."""
    taps, width = spec.kernel**2, block.width
    map_BCN = at.values(prod(block.grid), width)
    first = _picture(block, at) | {"conv1 weights": at.cast(taps * block.width_in * width)}
    second = {"conv1": map_BCN} | _batch_norm("norm", width)
    second |= {"norm": map_BCN, "gelu": map_BCN, "conv2 weights": at.cast(taps * width * width)}
    return Segment(first), Segment(second)


def _patches(spec: Spec, block: BlockSpec, at: Setting) -> tuple[Segment, ...]:
    """One convolution."""
    weights = block.stride**2 * block.width_in * block.width
    return (Segment(_picture(block, at) | {"conv weights": at.cast(weights)}),)


def _mbconv(spec: Spec, block: BlockSpec, at: Setting) -> tuple[Segment, ...]:
    """Expansion, depthwise convolution, squeeze-excite with projection, and the identity branch."""
    hidden, squeezed = spec.expansion * block.width, int(spec.se_ratio * block.width)
    positions_in, positions = prod(block.grid_in), prod(block.grid)
    expanded = positions if at.stride == "expansion" else positions_in

    def norm(name: str, source: str, places: int, width: int) -> Bytes:
        if spec.conv_norm == "layer":
            return _layer_norm(name, source, places, width, at)
        return {source: at.values(places, width)} | _batch_norm(name, width)

    entered = {INPUT: at.values(positions_in, block.width_in)}
    expand = norm("norm_in", INPUT, positions_in, block.width_in)
    expand |= {"norm_in": entered[INPUT], "expand weights": at.cast(block.width_in * hidden)}
    # What a LayerNorm in fp32 puts out, GELU takes and puts out in fp32; a convolution keeps a copy in bf16.
    exact = at.exact_size // at.size if spec.conv_norm == "layer" else 1
    wide_in, wide = at.values(expanded, hidden), at.values(positions, hidden)
    depthwise = norm("norm_expand", "expand", expanded, hidden)
    depthwise |= {"norm_expand": exact * wide_in, "gelu 1": wide_in}
    depthwise |= {"depthwise weights": at.cast(spec.kernel**2 * hidden)}
    project = norm("norm_depthwise", "depthwise", positions, hidden) | {
        "norm_depthwise": exact * wide,  # GELU's input
        "gelu 2": exact * wide,  # the scaling keeps both its factors; the mean over space keeps nothing
        "squeeze and excite": 2 * at.values(1, hidden) + 2 * at.values(1, squeezed),  # mean, SiLU in and out, sigmoid
        "scaled": wide,
        "se and project weights": at.cast(2 * hidden * squeezed + hidden * block.width),
    }
    return (
        Segment(expand, entered),
        Segment(depthwise, {"expand": wide_in}),
        Segment(project, {"depthwise": wide}),
        Segment(_shortcut(block, at)),
    )


def _shortcut(block: BlockSpec, at: Setting) -> Bytes:
    """The identity branch: max pool keeps its input and int64 indices, the linear map its input."""
    kept: Bytes = {}
    if block.stride > 1:
        kept[INPUT] = at.values(prod(block.grid_in), block.width_in)
        kept["pool indices"] = 8 * at.batch * prod(block.grid) * block.width_in
    if block.width_in != block.width:
        kept["pooled" if block.stride > 1 else INPUT] = at.values(prod(block.grid), block.width_in)
        kept["shortcut weights"] = at.cast(block.width_in * block.width)
    return kept


def _transformer(spec: Spec, block: BlockSpec, at: Setting) -> tuple[Segment, ...]:
    """Norm and queries, keys, values; attention with its projection; the two halves of the feed-forward part."""
    positions_in, positions, width = prod(block.grid_in), prod(block.grid), block.width
    hidden = spec.expansion * width
    tokens = at.values(positions, width)
    entered = {INPUT: at.values(positions_in, block.width_in)}
    qkv = _layer_norm("norm_attention", INPUT, positions_in, block.width_in, at)
    if block.stride > 1:  # the pool of the normalised tokens
        qkv["norm_attention"] = at.exact_size * at.batch * positions_in * block.width_in
        qkv["normalised pool indices"] = 8 * at.batch * positions * block.width_in
    qkv["qkv input"] = at.values(positions, block.width_in)
    qkv["qkv weights"] = at.cast(3 * block.width_in * width)
    attention = _attention(spec, block, at)
    projection = {"attended": tokens, "projection weights": at.cast(width * width)}
    widen = _layer_norm("norm_feed", "attention sum", positions, width, at)
    widen |= {"norm_feed": tokens, "widen weights": at.cast(width * hidden)}
    wide = {"widen": at.values(positions, hidden)}
    narrow = wide | {"gelu": wide["widen"], "narrow weights": at.cast(width * hidden)}
    return (
        Segment(qkv, entered),
        Segment(_shortcut(block, at)),
        Segment(attention),
        Segment(projection),
        Segment(widen, {"attention sum": tokens}),
        Segment(narrow, wide),
    )


def _attention(spec: Spec, block: BlockSpec, at: Setting) -> Bytes:
    """What lies between the packed queries, keys, values and the projection.

    Explicit: copies of q, k and v with the heads in front; the softmax its output in fp32, the product with v a copy of
    it in bf16. SDPA on a CPU takes torch's plain path if there is a trained bias before the softmax: the same, all in
    fp32. Fused kernels: q, k, v as they are packed, one fp32 number for each query and head, and SDPA's on CUDA the
    bias with rows of a multiple of 8. A bias after the softmax is one more product with v, whose factors are repeated
    for every sample. The index of the bias is a buffer; the small one-hot matrices of its einsum lookup are left out.
    """
    tokens, heads = prod(block.grid), block.width // spec.head_size
    pairs, head_values = at.batch * heads * tokens * tokens, at.batch * tokens * block.width
    backend = at.attention if at.attention != "auto" else "sdpa" if at.device == "cuda" else "explicit"
    kept: Bytes = {}
    if spec.relative_bias == "post":
        kept = {"repeated bias": at.size * pairs, "v of the bias": at.size * head_values}
    if backend == "explicit":
        kept |= {"q, k, v": 3 * at.size * head_values, "softmax": 4 * pairs, "softmax in bf16": at.cast(pairs)}
        return kept
    if at.device == "cpu" and spec.relative_bias == "pre":
        return {"q, k, v": 3 * 4 * head_values, "softmax": 4 * pairs}
    kept |= {"packed qkv": 3 * at.size * head_values, "log-sum-exp": 4 * at.batch * heads * tokens}
    if spec.relative_bias == "post":
        kept["kernel's output"] = at.size * head_values  # otherwise that is the projection's input
    if spec.relative_bias == "pre" and backend == "sdpa":
        kept["bias"] = at.size * heads * tokens * (-(-tokens // 8) * 8)
    return kept


def _head(spec: Spec, block: BlockSpec, at: Setting) -> tuple[Segment, ...]:
    """The mean keeps nothing; norm and linear layers their inputs; tanh its output, the classifier's input."""
    width = block.width
    kept = _layer_norm("norm", "pooled", 1, width, at)
    kept |= {"norm": at.values(1, width), "tanh": at.values(1, width)}
    return (Segment(kept | {"weights": at.cast(width * (width + at.classes))}),)


_SEGMENTS: dict[Kind, Callable[[Spec, BlockSpec, Setting], tuple[Segment, ...]]] = {
    "stem": _stem,
    "patches": _patches,
    "mbconv": _mbconv,
    "transformer": _transformer,
    "head": _head,
}
