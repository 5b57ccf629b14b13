"""Views, RandAugment, mixing and targets."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import InputError
from configs.schema import Augment
from data_pipeline.augment import check_mixing, draw_mixing, eval_view, prepare, targets, train_view
from data_pipeline.batch import Batch
from data_pipeline.randaugment import NAMES, OPERATIONS


def noise(height: int, width: int) -> torch.Tensor:
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def batch_of(size: int, augment: Augment, labels: torch.Tensor | None = None, side: int = 16) -> Batch:
    mixing = draw_mixing([100 * slot for slot in range(size)], side, augment)
    return Batch(
        images_BCHW=torch.stack([noise(side, side).roll(slot, -1) for slot in range(size)]),
        labels=torch.arange(size) % 5 if labels is None else labels,
        seeds_B=torch.arange(size),
        indices_B=torch.arange(size),
        valid_B=torch.ones(size, dtype=torch.bool),
        keys=[""] * size,
        kept_B=mixing[0] if mixing else None,
        boxes_B4=mixing[1] if mixing else None,
    )


@given(height=st.integers(1, 90), width=st.integers(1, 90), seed=st.integers(0, 2**63 - 1))
@settings(max_examples=60, deadline=None)
def test_a_view_is_a_function_of_its_seed(height: int, width: int, seed: int) -> None:
    augment = Augment(randaugment_layers=2, randaugment_magnitude=15)
    image = noise(height, width)
    torch.manual_seed(1)
    first = train_view(image, 32, augment, seed)
    torch.manual_seed(2)
    assert torch.equal(first, train_view(image, 32, augment, seed))
    assert first.shape == (3, 32, 32)
    assert first.dtype == torch.uint8
    assert eval_view(image, 32, augment).shape == (3, 32, 32)


def test_seeds_give_different_views() -> None:
    views = [train_view(noise(64, 64), 32, Augment(), seed) for seed in range(8)]
    assert len({view.numpy().tobytes() for view in views}) == 8


def test_whole_picture_and_flip() -> None:
    image = noise(32, 32)
    plain = Augment(crop="resize", flip=False)
    assert torch.equal(train_view(image, 32, plain, 5), image)
    flipped = [torch.equal(train_view(image, 32, Augment(crop="resize"), seed), image.flip(-1)) for seed in range(100)]
    assert 30 < sum(flipped) < 70


def test_crops_cover_the_stated_share_of_the_area() -> None:
    columns = torch.zeros(3, 100, 100, dtype=torch.uint8)
    columns[:] = torch.arange(100, dtype=torch.uint8)
    spans = []
    for seed in range(60):
        view = train_view(columns, 64, Augment(crop_scale=(0.25, 0.25), crop_ratio=(1.0, 1.0), flip=False), seed)
        spans.append(int(view.max()) - int(view.min()))
    assert min(spans) >= 47  # a quarter of the area is half the side
    assert max(spans) <= 51


def test_evaluation_keeps_the_stated_centre() -> None:
    ramp = torch.zeros(3, 64, 200, dtype=torch.uint8)
    ramp[:] = torch.arange(200, dtype=torch.uint8)
    view = eval_view(ramp, 32, Augment(eval_crop=0.5))
    assert abs(int(view[0, 16, 0]) - 84) <= 2  # 32 of 64 columns around the middle, 100
    assert abs(int(view[0, 16, -1]) - 115) <= 2
    whole = eval_view(ramp, 32, Augment(crop="resize"))
    assert int(whole[0, 0, 0]) < 10
    assert int(whole[0, 0, -1]) > 190


def test_a_line_of_pixels_does_not_explode() -> None:
    assert eval_view(noise(1, 50_000), 32, Augment()).shape == (3, 32, 32)


@pytest.mark.parametrize("name", NAMES)
def test_every_operation_changes_a_picture_and_is_pure(name: str) -> None:
    image = (noise(24, 24) * 0.86).to(torch.uint8) + 20
    kept = image.clone()
    for level in (-1.0, -0.4, 0.3, 1.0):
        once, again = OPERATIONS[name](image, level), OPERATIONS[name](image, level)
        assert once.shape == image.shape
        assert once.dtype == torch.uint8
        assert torch.equal(once, again)
        assert torch.equal(image, kept)
        assert name == "identity" or not torch.equal(once, image)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("autocontrast", "equalize")])
def test_magnitude_zero_changes_nothing(name: str) -> None:
    image = noise(24, 24).clamp(max=254)
    assert torch.equal(OPERATIONS[name](image, 0.0), image)


def test_operations_at_known_values() -> None:
    image = torch.full((3, 24, 24), 200, dtype=torch.uint8)
    assert set(OPERATIONS["posterize"](image, 1.0).flatten().tolist()) == {192}  # 4 bits left
    assert set(OPERATIONS["solarize"](image, -0.5).flatten().tolist()) == {55}  # inverted above 127.5
    assert set(OPERATIONS["brightness"](image, -1.0).flatten().tolist()) == {20}
    moved = OPERATIONS["translate_x"](image, 1.0)
    assert (moved[0, 0] == 128).sum() == int(150 / 331 * 24)


@pytest.mark.parametrize("alphas", [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
@pytest.mark.parametrize("smoothing", [0.1, 0.0])
def test_mixed_targets_sum_to_one(alphas: tuple[float, float], smoothing: float) -> None:
    augment = Augment(mixup_alpha=alphas[0], cutmix_alpha=alphas[1])
    rows = targets(batch_of(8, augment), 5, smoothing, "softmax")
    assert rows.shape == (8, 5)
    assert torch.allclose(rows.sum(1), torch.ones(8), atol=1e-6)
    assert (rows > smoothing / 5 + 1e-6).sum() > 8  # some rows hold two classes


def test_mixup_blends_pairs() -> None:
    augment = Augment(mixup_alpha=0.8, mean=(0.001, 0.001, 0.001), std=(1.0, 1.0, 1.0))
    batch = batch_of(4, augment)
    assert batch.kept_B is not None
    plain = prepare(batch_of(4, Augment(mean=augment.mean, std=augment.std)), augment, torch.float32, False)
    mixed = prepare(batch, augment, torch.float32, False)
    for slot in range(4):
        share = float(batch.kept_B[slot])
        assert torch.allclose(mixed[slot], share * plain[slot] + (1 - share) * plain[slot ^ 1], atol=1e-5)
    rows = targets(batch, 5, 0.0, "softmax")
    assert torch.allclose(rows[2, 2], batch.kept_B[2])
    assert torch.allclose(rows[2, 3], 1 - batch.kept_B[2])


def test_cutmix_pastes_exactly_the_share_it_claims() -> None:
    augment = Augment(cutmix_alpha=1.0)
    images = torch.stack([torch.full((3, 16, 16), slot, dtype=torch.uint8) for slot in range(40)])
    mixed_in = 0
    for first in range(0, 40, 2):
        mixing = draw_mixing([first, first + 1], 16, augment)
        assert mixing is not None
        own = images[first : first + 2]
        batch = Batch(own, torch.tensor([0, 1]), torch.zeros(2), torch.zeros(2), torch.ones(2), ["", ""], *mixing)
        x = prepare(batch, Augment(mean=(0.001,) * 3, std=(1.0,) * 3), torch.float64, False)
        pasted = (x[0, 0] - x[0, 0].min() > 1e-4).double().mean() if x[0, 0].std() > 0 else torch.tensor(0.0)
        assert math.isclose(float(pasted), 1 - float(mixing[0][0]), abs_tol=1e-6)
        mixed_in += float(pasted) > 0
    assert mixed_in > 10


def test_sigmoid_targets_of_many_labels() -> None:
    batch = batch_of(2, Augment(), labels=torch.tensor([[0, 3, -1], [-1, -1, -1]]))
    assert targets(batch, 4, 0.0, "sigmoid").tolist() == [[1, 0, 0, 1], [0, 0, 0, 0]]
    smooth = targets(batch, 4, 1e-4, "sigmoid")
    assert torch.allclose(smooth[0], torch.tensor([1 - 5e-5, 5e-5, 5e-5, 1 - 5e-5]))
    assert targets(batch, 4, 0.0, "softmax")[0].tolist() == [0.5, 0, 0, 0.5]


def test_softmax_smoothing_without_mixing() -> None:
    rows = targets(batch_of(2, Augment()), 5, 0.1, "softmax")
    assert torch.allclose(rows[1], torch.tensor([0.02, 0.92, 0.02, 0.02, 0.02]))


def test_prepare_normalises_and_lays_out() -> None:
    x = prepare(batch_of(2, Augment()), Augment(), torch.bfloat16, channels_last=True)
    assert x.dtype == torch.bfloat16
    assert x.is_contiguous(memory_format=torch.channels_last)
    expected = (batch_of(2, Augment()).images_BCHW[1, 2, 3, 4] / 255 - 0.406) / 0.225
    assert abs(float(x[1, 2, 3, 4]) - float(expected)) < 0.02
    both = [prepare(batch_of(2, Augment()), Augment(), torch.float32, channels_last=last) for last in (True, False)]
    assert torch.equal(*both)
    plain = batch_of(2, Augment()).images_BCHW.float()
    for colour, (mean, std) in enumerate(zip(Augment.mean, Augment.std, strict=True)):
        torch.testing.assert_close(both[0][:, colour], (plain[:, colour] / 255 - mean) / std)


def test_odd_micro_batches_are_refused_with_mixing_only() -> None:
    check_mixing(Augment(), [(0, 3)])
    check_mixing(Augment(mixup_alpha=0.8), [(0, 4), (8, 12)])
    with pytest.raises(InputError, match=r"parallel\.micro_batch = 3: mixup and cutmix pair"):
        check_mixing(Augment(mixup_alpha=0.8), [(0, 3), (3, 6)])
