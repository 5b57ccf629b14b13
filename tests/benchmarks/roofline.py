"""The roofline of one H100 for CoAtNet-3 to -7, beside an independent count of it, and what makes the difference.

    python tests/benchmarks/roofline.py [FOLDER]

Nothing is measured: a computation, whose record is dated so that the figures on other pages have a source. Two counts
of the same network at 790 TFLOP/s and 3.0 TB/s: ours (`models.traffic`), and one made by hand before it. Taken away one
after the other: the stem's convolutions at half the rate of other products; weights, their copies in bf16 and their
gradients, which move once a pass; LayerNorm in fp32 under autocast on CUDA, with its copies. What is left then is the
count of maps, and eager the attention: by hand the explicit form, which writes its matrix of weights; ours is SDPA.
"""

import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from models import spec  # noqa: E402
from models.activations import Attention  # noqa: E402
from models.operations import STYLES, Style  # noqa: E402
from models.traffic import traffic  # noqa: E402
from trainer.bench import record as bench  # noqa: E402
from trainer.machine import devices, environment  # noqa: E402
from trainer.planning import rates  # noqa: E402
from trainer.planning.ceiling import ceiling  # noqa: E402
from trainer.planning.roofline import of_block  # noqa: E402

H100 = devices.DEVICES["h100"]
CLASSES = 21841
SIZES = {224: 64, 512: 16}  # pixels and pictures of a pass
BY_HAND = {  # images/s at 224 px: eager, compiled, bound; compiled at 512
    "coatnet3": ((1118, 1606, 2329), 253),
    "coatnet4": ((664, 963, 1392), 146),
    "coatnet5": ((417, 530, 694), 82),
    "coatnet6": ((315, 351, 415), 52),
    "coatnet7": ((200, 219, 251), 34),
}


def without(name: str, style: Style, stem: bool, weights: bool, exact: bool) -> float:
    """Images/s at 224 px with some of the differences taken away."""
    form: Attention = "flex" if style == "bound" else "sdpa"
    speed = replace(rates.assumed(H100, "bf16", style, 0, form, 1.0), call=0.0)
    if stem:
        ways = {
            way: {**getattr(speed, way), "window": getattr(speed, way)["matrix"]} for way in ("forward", "backward")
        }
        speed = replace(speed, forward=ways["forward"], backward=ways["backward"])
    seconds = 0.0
    for block in traffic(
        spec.get(name), style=style, attention=form, classes=CLASSES, device="cpu" if exact else "cuda"
    ):
        kept = block.operations
        if weights:
            kept = tuple(one._replace(fixed=(0.0, 0.0)) for one in kept if one.work != "weights")
        found = of_block(replace(block, operations=kept), speed, SIZES[224])
        seconds += found.forward + found.backward
    return SIZES[224] / seconds


def main(folder: Path) -> None:
    """Compute and write."""
    samples: dict[str, list[float]] = {}
    lines = {}
    for name, (hand, large) in BY_HAND.items():
        at = {size: ceiling(spec.get(name), size, CLASSES, H100, batch) for size, batch in SIZES.items()}
        ours = [at[224].images_per_second(style) for style in STYLES]
        for style, mine, theirs in zip(STYLES, ours, hand, strict=True):
            steps = [without(name, style, *flags) for flags in ((True, False, False), (True, True, False), (True,) * 3)]
            samples[f"{name} {style}"] = [mine, *steps, theirs]
        for size, found in at.items():
            for style in STYLES:
                samples[f"{name} {style} by stage at {size}"] = list(found.seconds[style].values())
        again, far = at[224].images_per_second("compiled", recompute=True), at[512].images_per_second("compiled")
        lines[name] = (
            f"{ours[0]:.0f} eager, {ours[1]:.0f} compiled (MFU {at[224].mfu('compiled'):.0%}), {ours[2]:.0f} bound, "
            f"{again:.0f} compiled with every block made again; {far:.0f} compiled at 512 px ({large} by hand)"
        )
    left = {
        style: [abs(values[3] / values[4] - 1) for key, values in samples.items() if key.endswith(style)]
        for style in STYLES
    }
    record = bench.Record(
        name="roofline-h100",
        command="python tests/benchmarks/roofline.py",
        facts=environment.facts("none: computed, of an H100 SXM"),
        config={
            "columns": ["images/s", "stem at the rate of other products", "and no weights", "and LayerNorm in bf16",
                        "by hand"],
            "by stage": "seconds of a picture, forward and backward, from the stem to the head",
            "pictures of a pass": SIZES, "classes": CLASSES,
        },
        unit="images/s of one H100, upper bounds",
        samples=samples,
        summary={**lines, "beside the count by hand": f"{max(left['compiled']):.1%} apart at most compiled and "
                 f"{max(left['bound']):.1%} bound, without what that left out: the stem's slow convolutions, weights, "
                 f"LayerNorm in fp32; eager {max(left['eager']):.1%}, where by hand the attention is explicit"},
    )  # fmt: skip
    print("\n".join(f"{key}: {value}" for key, value in record.summary.items()))
    print(record.write(folder))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "tests" / "records")
