"""CoAtNet-5 at its real size with weights and AdamW's state on a disk, beside the same steps in memory; CoAtNet-7.

    python tests/benchmarks/offload.py [--side SIDE ...] [--out FOLDER]

Writes the record `offload` to FOLDER, tests/records unless it is given; sides that are not named keep what an earlier
record there has. Takes half an hour on two cores, 16 GB of memory, and 42 GB of a disk that takes direct I/O; what to
install: README, Offload.
"""

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from tests.parallel import offload  # noqa: E402
from trainer.bench import record as bench  # noqa: E402
from trainer.machine import environment  # noqa: E402

SIDES = {
    "real size, disk": f"{offload.REAL} {offload.ON_DISK}",
    "real size, memory": f"{offload.REAL} {offload.IN_MEMORY}",
    "same widths, disk": f"{offload.SMALL} {offload.ON_DISK}",
    "same widths, memory": f"{offload.SMALL} {offload.IN_MEMORY}",
    "CoAtNet-7, disk": f"--model.name coatnet7 {offload.REAL} {offload.ON_DISK}",  # does it start, and take a step
}
CONFINED = f"{offload.LIMIT >> 30} GiB by the kernel" if offload.Room.possible() else "no limit"


def summarise(found: dict[str, offload.Trained]) -> dict[str, str]:
    """Memory, time and how far the losses are apart."""
    summary = {}
    for size in ("real size", "same widths"):
        disk, memory = found[f"{size}, disk"], found[f"{size}, memory"]
        apart = max(abs(a - b) for a, b in zip(disk.losses, memory.losses, strict=True))
        summary[size] = (
            f"{disk.peak / 2**30:.1f} GiB of memory at most and {disk.disk / 1e9:.1f} GB on the disk, in memory "
            f"{memory.peak / 2**30:.1f} GiB; {max(disk.seconds):.0f} s a step, {max(memory.seconds):.0f} s in memory; "
            f"losses of {len(disk.losses)} steps within {apart:.1g} of each other, from {disk.losses[0]:.4f} to "
            f"{disk.losses[-1]:.4f}"
        )
    seven = found["CoAtNet-7, disk"]
    summary["CoAtNet-7"] = f"one step in {seven.peak / 2**30:.1f} GiB of memory, {seven.disk / 1e9:.1f} GB on the disk"
    return summary


def walked(words: str, scratch: Path, steps: int, confined: bool) -> offload.Trained:
    """The steps of one side; the one that has to fit is held to its memory, where root can."""
    if not (confined and offload.Room.possible()):
        return offload.trained(words, scratch, steps)
    with offload.Room(offload.LIMIT) as room:
        return offload.trained(words, scratch, steps, room)


def kept(folder: Path) -> dict[str, offload.Trained]:
    """What an earlier record has."""
    path = folder / "offload.json"
    samples = bench.read(path).samples if path.exists() else {}
    found = {}
    for side, values in samples.items():
        steps = (len(values) - 2 + 1) // 3  # losses, norms, seconds of all steps but the first
        times = values[2 * steps : -2]
        found[side] = offload.Trained(
            values[:steps], values[steps : 2 * steps], int(values[-2]), int(values[-1]), times
        )
    return found


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", choices=SIDES, nargs="+", default=list(SIDES))
    parser.add_argument("--out", type=Path, default=ROOT / "tests" / "records", help="folder of the record")
    wanted = parser.parse_args()
    found = kept(wanted.out)
    for side in wanted.side:
        with tempfile.TemporaryDirectory() as scratch:
            steps = 1 if side.startswith("CoAtNet-7") else offload.STEPS
            found[side] = walked(SIDES[side], Path(scratch), steps, side == "real size, disk")
        print(side, found[side], flush=True)
    record = bench.Record(
        name="offload",
        command="python tests/benchmarks/offload.py",
        facts=environment.facts("cpu"),
        config={"common": offload.COMMON, **SIDES, "real size, disk, held to": CONFINED},
        unit="losses of the steps, norms of gradients, seconds of each but the first, bytes of memory, of the disk",
        samples={
            side: [*one.losses, *one.norms, *one.seconds, float(one.peak), float(one.disk)]
            for side, one in found.items()
        },
        summary=summarise(found) if found.keys() == SIDES.keys() else {"not whole": ", ".join(found)},
    )
    print(record.summary)
    print(record.write(wanted.out))


if __name__ == "__main__":
    main()
