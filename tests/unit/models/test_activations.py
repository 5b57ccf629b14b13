"""Bytes kept for the backward pass: single blocks counted by hand, and what recomputation must save."""

from dataclasses import replace
from itertools import pairwise

import pytest

from configs.errors import InputError
from models import spec
from models.activations import BlockBytes, Dtype, Recompute, activations, peak

ALL = ("coatnet0", "coatnet1", "coatnet2", "coatnet3", "coatnet4", "coatnet5", "coatnet6", "coatnet7")


def named(name: str, blocks: tuple[BlockBytes, ...]) -> BlockBytes:
    return next(block for block in blocks if block.name == name)


def total(name: str, recompute: Recompute, resolution: int = 224, dtype: Dtype = "bf16") -> int:
    blocks = activations(spec.get(name), resolution, batch=64, dtype=dtype, recompute=recompute)
    return sum(block.saved for block in blocks)


def test_an_mbconv_block_by_hand() -> None:
    # coatnet0 s1.1 at 224 px: 96 channels on 56 x 56, 384 hidden, 24 squeezed; nothing down-samples, no shortcut.
    places, width, hidden, squeezed = 56 * 56, 96, 384, 24
    batch = 3
    maps = places * (2 * width + 7 * hidden)  # input, normed; 3 each around two GELUs, and the scaled one
    small = 2 * hidden + 2 * squeezed
    statistics = 16 * (width + hidden + hidden)
    block = named("blocks.s1.1", activations(spec.get("coatnet0"), 224, batch=batch, dtype="fp32"))
    assert block.saved == 4 * batch * (maps + small) + statistics
    assert block.boundary == 4 * places * width
    copies = 2 * (2 * width * hidden + 9 * hidden + 2 * hidden * squeezed)
    block = named("blocks.s1.1", activations(spec.get("coatnet0"), 224, batch=batch, dtype="bf16"))
    assert block.saved == 2 * batch * (maps + small) + statistics + copies


def test_a_transformer_block_by_hand_in_every_mode() -> None:
    # coatnet0 s3.1 at 224 px: 196 tokens of 384 channels, 12 heads.
    tokens, width, heads, batch = 196, 384, 12, 5
    row, scores = 4 * batch * tokens * width, 4 * batch * heads * tokens * tokens
    statistics = 2 * 2 * 4 * batch * tokens
    found = {
        kind: named("blocks.s3.1", activations(spec.get("coatnet0"), 224, batch=batch, dtype="fp32", recompute=kind))
        for kind in ("none", "selective", "full")
    }
    # input, normed, q, k, v, attended, its sum, normed, 4 before and 4 after GELU
    everything = 16 * row + scores + statistics
    assert (found["none"].saved, found["none"].inside) == (everything, 0)
    # input, q, k, v, the weights, attended, the sum, 4 before GELU; the largest segment is the half with GELU
    assert found["selective"].saved == 10 * row + scores
    assert found["selective"].inside == 4 * row
    assert (found["full"].saved, found["full"].inside) == (row, everything - row)


def test_peak_is_all_that_is_saved_and_the_largest_inside() -> None:
    blocks = (BlockBytes("a", "s", 5, 7, 1), BlockBytes("b", "s", 3, 9, 1))
    assert peak(blocks) == 5 + 3 + 9


@pytest.mark.parametrize("name", ALL)
def test_recomputation_keeps_less(name: str) -> None:
    fused = {
        kind: sum(b.saved for b in activations(spec.get(name), 224, batch=64, recompute=kind, device="cuda"))
        for kind in ("none", "selective", "full")
    }
    assert fused["selective"] <= 0.47 * fused["none"]
    assert fused["full"] <= 0.2 * fused["selective"]
    # Written out, the matrices of attention weights stay in every mode but "full".
    assert total(name, "selective") <= (0.55 if name == "coatnet0" else 0.62) * total(name, "none")
    assert total(name, "full") <= 0.2 * total(name, "selective")


def test_the_boundary_is_the_next_block_s_input() -> None:
    blocks = activations(spec.get("coatnet7"), (256, 192), batch=2, dtype="bf16", recompute="full")
    for before, after in pairwise(blocks):
        assert after.saved == 2 * before.boundary
    assert blocks[0].saved == 2 * 4 * 3 * 256 * 192  # pictures are fp32
    assert blocks[-1].boundary == 2 * 1000


def test_fused_attention_keeps_no_matrix_of_weights() -> None:
    saved = {
        kind: sum(b.saved for b in activations(spec.get("coatnet5"), 512, batch=8, attention=kind, device="cuda"))
        for kind in ("explicit", "sdpa", "flex", "auto")
    }
    assert saved["auto"] == saved["sdpa"]
    assert saved["flex"] < saved["sdpa"] < 0.6 * saved["explicit"]


def test_auto_is_explicit_on_a_cpu() -> None:
    found = spec.get("coatnet0")
    assert activations(found, attention="auto") == activations(found, attention="explicit")
    assert activations(found, attention="auto") != activations(found, attention="sdpa")


def test_layer_norm_in_fp32_on_cuda_costs_more() -> None:
    found = replace(spec.get("coatnet0"), conv_norm="layer")
    here, there = (activations(found, batch=8, attention="explicit", device=device) for device in ("cpu", "cuda"))
    for block, other in zip(here, there, strict=True):
        assert (other.saved > block.saved) == (block.stage != "s0"), block.name


def test_a_resolution_that_the_stride_does_not_divide_is_refused() -> None:
    with pytest.raises(InputError, match="multiple of 32"):
        activations(spec.get("coatnet0"), 100)
