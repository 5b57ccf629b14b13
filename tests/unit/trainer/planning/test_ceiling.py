"""The ceilings of an H100 beside an independent count of the same rooflines, model by model."""

import pytest

from models import spec
from trainer.machine import devices
from trainer.planning.ceiling import Ceiling, ceiling, text

H100 = devices.DEVICES["h100"]
# images/s: eager, compiled, bound, compiled with every block made again; compiled at 512 px. Counted by hand, with the
# same head sizes, widths and 21,841 classes, at 790 TFLOP/s and 3.0 TB/s.
COUNTED = {
    "coatnet3": (1118, 1606, 2329, 1186, 253),
    "coatnet4": (664, 963, 1392, 712, 146),
    "coatnet5": (417, 530, 694, 393, 82),
    "coatnet6": (315, 351, 415, 262, 52),
    "coatnet7": (200, 219, 251, 163, 34),
}


def of(name: str, resolution: int = 224) -> Ceiling:
    return ceiling(spec.get(name), resolution, 21841, H100, 64 if resolution == 224 else 16)


@pytest.mark.parametrize("name", COUNTED)
def test_ceilings_are_those_counted_by_hand(name: str) -> None:
    """That count had the stem at the rate of other products, no weights and no LayerNorm in fp32: ours are lower."""
    eager, compiled, bound, again, large = COUNTED[name]
    found = of(name)
    assert 0.89 * eager < found.images_per_second("eager") < 1.02 * eager
    assert 0.91 * compiled < found.images_per_second("compiled") < compiled
    assert 0.87 * bound < found.images_per_second("bound") < bound
    assert found.images_per_second("compiled", recompute=True) == pytest.approx(again, rel=0.04)
    assert 0.9 * large < of(name, 512).images_per_second("compiled") < large


def test_time_goes_where_it_was_counted_to_go() -> None:
    """Shares of the compiled step at 224 px, in percent: S0, S1, S2, S3 (MBConv, Transformer), S4."""
    for name, shares in {"coatnet3": (8, 21, 29, 39, 4), "coatnet7": (1, 4, 4, 5, 85, 2)}.items():
        seconds = of(name).seconds["compiled"]
        whole = sum(seconds.values())
        for (stage, part), expected in zip(list(seconds.items())[:-1], shares, strict=True):
            assert 100 * part / whole == pytest.approx(expected, abs=4), stage


def test_the_table_has_every_stage() -> None:
    shown = text(of("coatnet7"))
    for stage in ("s0", "s1", "s2", "s3a", "s3b", "s4", "head"):
        assert f"\n{stage} " in f"\n{shown}"
    assert "upper bounds" in shown
