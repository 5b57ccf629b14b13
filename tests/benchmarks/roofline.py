"""The roofline of one H100 for CoAtNet-3 to -7, beside an independent count of it, and what makes the difference.

    python tests/benchmarks/roofline.py [FOLDER]

Nothing is measured: a computation, whose record is dated so that the figures on other pages have a source. Two counts
at 790 TFLOP/s and 3.0 TB/s, at 224 and 512 pixels: ours (`models.traffic`), and one made by hand before it. Taken away
one after the other: the stem's convolutions at half the rate of other products; weights, their copies in bf16 and their
gradients, which move once a pass; LayerNorm in fp32 under autocast on CUDA, with its copies; then the networks as that
count had them, with heads of 32 channels throughout and CoAtNet-6 with the S4 of table 12. What is left is the count of
maps; eager, the attention, which that count had between the explicit form, which writes its matrix of weights, and
SDPA; and of what is made again, that ours stops before a block's last map.
"""

import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from models import spec  # noqa: E402
from models.activations import Attention  # noqa: E402
from models.design import Spec  # noqa: E402
from models.operations import STYLES, Style  # noqa: E402
from models.traffic import traffic  # noqa: E402
from trainer.bench import record as bench  # noqa: E402
from trainer.machine import devices, environment  # noqa: E402
from trainer.planning import rates  # noqa: E402
from trainer.planning.ceiling import Ceiling, ceiling  # noqa: E402
from trainer.planning.roofline import of_block  # noqa: E402

H100 = devices.DEVICES["h100"]
CLASSES = 21841
SIZES = {224: 64, 512: 16}  # pixels and pictures of a pass
BY_HAND = {  # images/s: eager, compiled, bound, compiled with every block made again
    "coatnet3": {224: (1118, 1606, 2329, 1186), 512: (139, 253, 384, 188)},
    "coatnet4": {224: (664, 963, 1392, 712), 512: (78, 146, 223, 109)},
    "coatnet5": {224: (387, 528, 694, 392), 512: (46, 82, 114, 61)},
    "coatnet6": {224: (275, 355, 423, 265), 512: (30, 53, 69, 40)},
    "coatnet7": {224: (176, 218, 251, 163), 512: (20, 34, 42, 25)},
}
SHARES_BY_HAND = {  # percent of the compiled step: S0, S1, S2, S3 of MBConv, S3 of Transformer blocks, S4
    "coatnet3": {224: (8, 21, 29, 0, 39, 4), 512: (6, 17, 24, 0, 49, 4)},
    "coatnet4": {224: (5, 12, 34, 0, 46, 3), 512: (4, 10, 27, 0, 57, 2)},
    "coatnet5": {224: (3, 9, 27, 0, 59, 2), 512: (2, 7, 22, 0, 67, 2)},
    "coatnet6": {224: (2, 5, 4, 5, 83, 2), 512: (1, 4, 3, 4, 86, 1)},
    "coatnet7": {224: (1, 4, 4, 5, 85, 2), 512: (1, 3, 3, 4, 88, 2)},
}


def by_hand(name: str) -> Spec:
    """The network as the count by hand had it."""
    return replace(spec.get("coatnet6-table12" if name == "coatnet6" else name), head_size=32)


def images_without(
    network: Spec,
    size: int,
    style: Style,
    stem: bool = True,
    weights: bool = True,
    exact: bool = True,
    explicit: bool = False,
) -> tuple[float, float]:
    """Images/s with some of the differences taken away, and with every block made again."""
    form: Attention = "explicit" if explicit else "flex" if style == "bound" else "sdpa"
    speed = replace(rates.assumed(H100, "bf16", style, 0, form, 1.0), call=0.0)
    if stem:
        ways = {
            way: {**getattr(speed, way), "window": getattr(speed, way)["matrix"]} for way in ("forward", "backward")
        }
        speed = replace(speed, forward=ways["forward"], backward=ways["backward"])
    seconds = again = 0.0
    for block in traffic(
        network, size, style=style, attention=form, classes=CLASSES, device="cpu" if exact else "cuda"
    ):
        kept = block.operations
        if weights:
            kept = tuple(one._replace(fixed=(0.0, 0.0)) for one in kept if one.work != "weights")
        found = of_block(replace(block, operations=kept), speed, SIZES[size])
        seconds += found.forward + found.backward
        again += found.full
    return SIZES[size] / seconds, SIZES[size] / (seconds + again)


def shares(found: Ceiling) -> tuple[float, ...]:
    """Percent of the compiled step, in the columns of `SHARES_BY_HAND`."""
    each = found.seconds["compiled"]
    whole = sum(each.values())
    stages = [each.get(stage, 0.0) for stage in ("s0", "s1", "s2")]
    third = [each["s3a"], each["s3b"]] if "s3a" in each else [0.0, each["s3"]]
    return tuple(100 * part / whole for part in (*stages, *third, each["s4"]))


def main(folder: Path) -> None:
    """Compute and write."""
    samples: dict[str, list[float]] = {}
    lines = {}
    between: list[bool] = []
    apart: dict[str, list[float]] = {style: [] for style in (*STYLES, "made again", "shares")}
    for name, sizes in BY_HAND.items():
        at = {size: ceiling(spec.get(name), size, CLASSES, H100, batch) for size, batch in SIZES.items()}
        for size, hand in sizes.items():
            found, key = at[size], f"{name} at {size}"
            for style, theirs in zip(STYLES, hand, strict=False):
                steps = [images_without(spec.get(name), size, style, *flags)[0]
                         for flags in ((True, False, False), (True, True, False), (True,) * 3)]  # fmt: skip
                last, again = images_without(by_hand(name), size, style)
                samples[f"{key} {style}"] = [found.images_per_second(style), *steps, last, theirs]
                apart[style].append(abs(last / theirs - 1))
                samples[f"{key} {style} by stage"] = list(found.seconds[style].values())
                if style == "eager":
                    explicit, _ = images_without(by_hand(name), size, style, explicit=True)
                    samples[f"{key} eager, explicit attention"] = [explicit]
                    between.append(explicit < theirs < last)
                if style == "compiled":
                    samples[f"{key} made again"] = [found.images_per_second(style, recompute=True), again, hand[3]]
                    apart["made again"].append(abs(again / hand[3] - 1))
            ours = shares(found)
            samples[f"{key} shares"], samples[f"{key} shares by hand"] = list(ours), list(SHARES_BY_HAND[name][size])
            apart["shares"] += [abs(one - other) for one, other in zip(ours, SHARES_BY_HAND[name][size], strict=True)]
        best = [at[224].images_per_second(style) for style in STYLES]
        again, far = at[224].images_per_second("compiled", recompute=True), at[512].images_per_second("compiled")
        lines[name] = (
            f"{best[0]:.0f} eager, {best[1]:.0f} compiled (MFU {at[224].mfu('compiled'):.0%}), {best[2]:.0f} bound, "
            f"{again:.0f} compiled with every block made again; {far:.0f} compiled at 512 px ({sizes[512][1]} by hand)"
        )
    record = bench.Record(
        name="roofline-h100",
        command="python tests/benchmarks/roofline.py",
        facts=environment.facts("none: computed, of an H100 SXM"),
        config={
            "columns": ["images/s", "stem at the rate of other products", "and no weights", "and LayerNorm in bf16",
                        "and the networks of the count by hand", "by hand"],
            "made again": ["images/s, compiled", "without what the count by hand left out", "by hand"],
            "by stage": "seconds of a picture, forward and backward, from the stem to the head",
            "shares": "percent of the compiled step: S0, S1, S2, S3 MBConv, S3 Transformer, S4",
            "pictures of a pass": SIZES, "classes": CLASSES,
        },
        unit="images/s of one H100, upper bounds",
        samples=samples,
        summary={
            **lines,
            "beside the count by hand": f"at 224 and 512 px, {max(apart['compiled']):.1%} apart at most compiled and "
            f"{max(apart['bound']):.1%} bound, without what that left out (the stem's slow convolutions, weights, "
            "LayerNorm in fp32) and with its networks (heads of 32, table 12's S4 of CoAtNet-6); made again "
            f"{max(apart['made again']):.1%}, since ours stops before a block's last map; eager it lies between ours "
            f"with the explicit attention and with SDPA in {sum(between)} of {len(between)}; the stages' shares, with "
            f"nothing taken away, {max(apart['shares']):.1f} points",
        },
    )  # fmt: skip
    print("\n".join(f"{key}: {value}" for key, value in record.summary.items()))
    print(record.write(folder))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "tests" / "records")
