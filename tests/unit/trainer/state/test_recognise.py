"""A network is known by the names and shapes of its tensors; where they do not tell, that is said."""

import pytest

from configs import resolve
from configs.errors import InputError
from models import interop, spec
from models.card import Card
from trainer.state.recognise import card_of


def shapes(name: str, resolution: tuple[int, int] = (224, 224), classes: int = 9) -> dict[str, tuple[int, ...]]:
    return interop.shapes(Card(spec.get(name), resolution, classes))


@pytest.fixture(autouse=True)
def _known_networks_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one that another test's file may have added."""
    monkeypatch.delitem(spec.SPECS, "parity", raising=False)


@pytest.mark.parametrize(
    ("name", "resolution"),
    [("coatnet0", (224, 224)), ("coatnet0", (160, 96)), ("coatnet5", (512, 512)), ("coatnet-nano", (32, 32))],
)
def test_a_network_is_known_with_its_resolution(name: str, resolution: tuple[int, int]) -> None:
    card = card_of(shapes(name, resolution), "file")
    assert card is not None
    assert (card.spec.name, card.resolution, card.classes) == (name, resolution, 9)


def test_what_the_shapes_do_not_tell_is_asked_for() -> None:
    found = shapes("coatnet3", (32, 32))
    with pytest.raises(InputError, match=r"may be coatnet3, coatnet3-dagger, whose tensors are alike.*--recipe"):
        card_of(found, "file")
    card = card_of(found, "file", resolve.load("coatnet3-in21k-224"))
    assert card is not None
    assert (card.spec.name, card.spec.stride, card.resolution) == ("coatnet3", "expansion", (32, 32))
    with pytest.raises(InputError, match="not those of coatnet2 in coatnet2-in1k-224"):
        card_of(found, "file", resolve.load("coatnet2-in1k-224"))


def test_others_are_none() -> None:
    assert card_of({"embed.weight": (5, 7)}, "file") is None
    found = shapes("coatnet-nano", (32, 32))
    assert card_of({**found, "more": (3,)}, "file") is None
    assert card_of({name: shape for name, shape in found.items() if ".s2." not in name}, "file") is None
    assert card_of({**found, "blocks.s0.0.conv1.weight": (17, 3, 3, 3)}, "file") is None
