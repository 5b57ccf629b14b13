"""The operations of blocks: their arithmetic is the network's, their bytes are those counted by hand elsewhere."""

from dataclasses import replace
from math import prod
from typing import Any

import pytest

from models import cost, spec
from models.operations import STYLES, BlockTraffic, Style
from models.traffic import traffic

ARITHMETIC = ("matrix", "window", "product", "depthwise")


def block_of(name: str, block: str, **asked: Any) -> BlockTraffic:
    return next(found for found in traffic(spec.get(name), **asked) if found.name == block)


@pytest.mark.parametrize("name", ["coatnet0", "coatnet3-dagger", "coatnet6", "C-T-T-T", "ViT_rel"])
@pytest.mark.parametrize("changes", [{}, {"relative_bias": "post"}, {"conv_norm": "layer"}])
@pytest.mark.parametrize("style", STYLES)
def test_the_arithmetic_is_that_of_the_counted_multiply_adds(name: str, changes: dict[str, Any], style: Style) -> None:
    found = replace(spec.get(name), **changes)
    counts = cost.count(found, 224, classes=7).blocks
    for block, counted in zip(traffic(found, 224, style=style, classes=7, device="cpu"), counts, strict=True):
        forward = sum(one.flops[0] for one in block.operations if one.work in ARITHMETIC)
        assert forward == 2 * counted.multiply_adds, block.name
        for one in block.operations:  # two gradients, and a fused attention kernel makes its products again
            assert one.flops[1] in (2 * one.flops[0], 2.5 * one.flops[0])


@pytest.mark.parametrize(("style", "passes"), [("eager", 49), ("compiled", 31), ("bound", 17)])
def test_an_mbconv_block_touches_its_expanded_map_so_often(style: Style, passes: int) -> None:
    """How often each style reads or writes the map of 4 C channels, forward and backward."""
    block = block_of("coatnet3", "blocks.s1.1", style=style)
    narrow, wide = 56 * 56 * 192 * 2, 56 * 56 * 768 * 2
    # What moves beside it are maps of C channels: norm, both sides of two convolutions, the sum.
    beside = {"eager": 8 + 3 + 3 + 1 + 6, "compiled": 9 + 3 + 3 + 1 + 4, "bound": 4 + 3 + 3 + 1 + 2}[style]
    assert block.moved == pytest.approx(passes * wide + beside * narrow, rel=0.02)


@pytest.mark.parametrize(
    ("name", "stage", "megabytes"),
    [
        ("coatnet3", "s0", (102, 78, 58)), ("coatnet3", "s1", (583, 388, 217)), ("coatnet3", "s2", (800, 520, 273)),
        ("coatnet5", "s2", (2119, 1374, 717)), ("coatnet7", "s3a", (714, 465, 246)),
        ("coatnet3", "s3", (803, 494, 358)), ("coatnet7", "s3b", (6524, 4050, 2963)),
    ],
)  # fmt: skip
def test_stages_move_about_what_was_counted_by_hand(name: str, stage: str, megabytes: tuple[int, ...]) -> None:
    """An independent count at head size 32; its eager attention writes the matrix of weights, ours on CUDA does not."""
    narrow_heads = replace(spec.get(name), head_size=32)
    for style, expected in zip(STYLES, megabytes, strict=True):
        blocks = traffic(narrow_heads, style=style, classes=21841)
        moved = sum(block.moved for block in blocks if block.stage == stage) / 1e6
        fewer = style == "eager" and stage in ("s3", "s3b")
        assert moved == pytest.approx(expected, rel=0.17 if fewer else 0.2 if style == "bound" else 0.12), style
        assert not fewer or moved < expected


def test_what_depends_on_the_run_shows() -> None:
    plain = block_of("coatnet0", "blocks.s3.1", device="cuda")
    assert block_of("coatnet0", "blocks.s3.1", device="cuda", drops=True).moved > plain.moved
    tokens, heads = 196, 12
    explicit = block_of("coatnet0", "blocks.s3.1", device="cuda", attention="explicit")
    assert explicit.moved - plain.moved > 20 * heads * tokens**2  # passes over the matrix of weights
    flex = block_of("coatnet0", "blocks.s3.1", device="cuda", attention="flex")
    assert plain.moved - flex.moved == 2 * 2 * heads * tokens**2  # the gradient of the bias, picture by picture
    half, full = (block_of("coatnet0", "blocks.s1.1", dtype=dtype) for dtype in ("bf16", "fp32"))
    assert full.moved == 2 * half.moved
    kinds = [{one.work for one in block.operations} for block in (half, full)]
    assert kinds[0] - kinds[1] == {"weights"}  # only autocast copies weights


def test_weights_move_once_a_pass_whatever_the_batch() -> None:
    block = block_of("coatnet0", "blocks.s4.1", dtype="bf16")
    counted = next(one for one in cost.count(spec.get("coatnet0")).blocks if one.name == "blocks.s4.1")
    maps = sum(weight.elements for weight in counted.weights if weight.kind == "map" and weight.decays)
    read = sum(one.fixed[0] for one in block.operations if one.work == "matrix")
    assert read == 2 * maps
    copied = sum(one.fixed[0] for one in block.operations if one.work == "weights")
    assert copied == 6 * sum(weight.elements for weight in counted.weights if weight.kind == "map")


def test_compiled_code_has_fewer_kernels() -> None:
    calls = {
        style: sum(sum(one.calls) for one in block_of("coatnet3", "blocks.s1.1", style=style).operations)
        for style in STYLES
    }
    assert calls["eager"] == pytest.approx(75, rel=0.15)  # as an eager step launches them
    assert calls["compiled"] < 0.6 * calls["eager"]
    assert prod(calls.values()) > 0
