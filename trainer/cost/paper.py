"""What the paper's own runs cost: the rows of its table 5, in TPUv3-core-days of pre-training. No torch.

Source: arXiv 2106.04803 v2, table 5; images of the JFT-300M rows are its 14 epochs of 300 million (table 10). How many
images the JFT-3B rows saw is not published, nor at which resolution the rivals were trained.
"""

from dataclasses import dataclass

from configs.errors import unknown
from models import cost, spec
from trainer.cost.ledger import DAY, P_REF

EPOCHS_OF_JFT_300M = 4_200_000_000


@dataclass(frozen=True)
class Row:
    """One pre-training run of table 5.

    Attributes:
        name: as `coatnet cost --against` takes it.
        title: as the paper calls it.
        core_days: TPUv3-core-days.
        model: a name of `coatnet models`; empty: not one of ours.
        resolution: pixels, of the pre-training.
        images: trained on; 0: not published.
    """

    name: str
    title: str
    core_days: float
    model: str = ""
    resolution: int = 224
    images: int = 0

    @property
    def multiply_adds(self) -> int:
        """Of one image's forward pass; 0 where the network is not ours to count."""
        return cost.count(spec.get(self.model), self.resolution).multiply_adds if self.model else 0

    @property
    def model_flops(self) -> float | None:
        """F = 6 M N; None where the images are not published."""
        return 6.0 * self.multiply_adds * self.images if self.model and self.images else None

    @property
    def utilisation(self) -> float | None:
        """u_ref of this row: its model FLOPs over what its cores could have done."""
        return self.model_flops / (self.core_days * DAY * P_REF) if self.model_flops else None


def _ours(model: str, title: str, data: str, images: int = 0) -> Row:
    """A row of one of our models, whose core-days its spec holds."""
    core_days = spec.get(model).published.core_days
    assert core_days is not None, f"{model} is not in table 5"
    name = f"{model}-{data.lower().replace('-', '')}-224"
    return Row(name, f"{title}, {data}", core_days, model, 224, images)


ROWS = {
    row.name: row
    for row in (
        _ours("coatnet3-dagger", "CoAtNet-3 dagger", "JFT-300M", EPOCHS_OF_JFT_300M),
        _ours("coatnet4", "CoAtNet-4", "JFT-300M", EPOCHS_OF_JFT_300M),
        _ours("coatnet5", "CoAtNet-5", "JFT-300M", EPOCHS_OF_JFT_300M),
        _ours("coatnet6", "CoAtNet-6", "JFT-3B"),
        _ours("coatnet7", "CoAtNet-7", "JFT-3B"),
        Row("vit-l16-jft300m", "ViT-L/16, JFT-300M", 680),
        Row("vit-h14-jft300m", "ViT-H/14, JFT-300M", 2_500),
        Row("nfnet-f4plus-jft300m", "NFNet-F4+, JFT-300M", 1_860),
        Row("vit-g14-jft3b", "ViT-G/14, JFT-3B (more than)", 30_000),
    )
}


def row(name: str) -> Row:
    """The row of that name.

    Raises:
        InputError: there is none, with the closest names.
    """
    if name not in ROWS:
        raise unknown("row of the paper's table 5", name, ROWS)
    return ROWS[name]


def row_of(model: str) -> Row | None:
    """The row of a model's pre-training, None where the paper has none."""
    named = model.removesuffix("-table12")  # the same model under its printed width
    return next((row for row in ROWS.values() if row.model in (model, named)), None)
