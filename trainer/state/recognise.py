"""Which CoAtNet a set of tensors is, by their names and shapes."""

from collections.abc import Mapping

from configs.errors import InputError
from configs.schema import Run
from models import interop, spec
from models.card import Card
from models.design import Spec
from models.resize import is_table

Shapes = Mapping[str, tuple[int, ...]]
CLASSIFIER = interop.CLASSIFIER + "weight"


def card_of(shapes: Shapes, where: str, run: Run | None = None) -> Card | None:
    """The card of the network that has exactly these tensors; None if their names are no CoAtNet's.

    Args:
        where: for messages.
        run: a recipe that says which network it is; None: of those known by name.

    Raises:
        InputError: the recipe's network has others; or several networks have these.
    """
    candidates = [spec.of(run.model)] if run is not None else list(spec.SPECS.values())
    blocks = {name.rsplit(".", name.count(".") - 2)[0] for name in shapes if name.count(".") >= 3}
    found = []
    for candidate in candidates if CLASSIFIER in shapes else ():
        pixels = _resolution(candidate, shapes)
        if pixels is not None and blocks == {block.name for block in candidate.blocks(pixels)}:
            card = Card(candidate, pixels, shapes[CLASSIFIER][0])
            found += [card] if interop.shapes(card) == dict(shapes) else []
    if run is not None and not found:
        raise InputError(f"{where}: its tensors are not those of {candidates[0].name} in {run.recipe}")
    if len(found) > 1:
        names = ", ".join(card.spec.name for card in found)
        raise InputError(f"{where}: may be {names}, whose tensors are alike; say which with --recipe RECIPE")
    return found[0] if found else None


def _resolution(candidate: Spec, shapes: Shapes) -> tuple[int, int] | None:
    """The (height, width) in pixels at which a network has the first relative-bias table here; None if it cannot.

    Without any table the network is the same at all resolutions: the smallest is as good as another.
    """
    smallest = (candidate.total_stride, candidate.total_stride)
    tables = [name for name in shapes if is_table(name)]  # (heads, 2 rows - 1, 2 columns - 1)
    if not tables:
        return smallest
    block = next((block for block in candidate.blocks(smallest) if tables[0].startswith(block.name + ".")), None)
    if block is None or len(shapes[tables[0]]) != 3:
        return None
    total = candidate.total_stride
    _, rows, columns = shapes[tables[0]]
    height, width = (rows + 1) // 2 * (total // block.grid[0]), (columns + 1) // 2 * (total // block.grid[1])
    return None if height % total or width % total else (height, width)
