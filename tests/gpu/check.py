"""`make gpu-check`: the tests that need a CUDA device, then a short alternated benchmark beside timm; writes a record.

Needs no network and no MLflow. Without a CUDA device it says so and exits 0.
"""

import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from configs.errors import InputError  # noqa: E402
from trainer.bench import model as bench_model  # noqa: E402
from trainer.bench import record as bench  # noqa: E402
from trainer.machine import environment  # noqa: E402

MODELS = {"coatnet0": 128, "coatnet3": 64, "coatnet5": 32}  # name: images per step
COMPILED = ("coatnet3",)  # translating takes a minute
ROUNDS = 7
# Files of tests that may share the GPU, several at once where pytest-xdist is there; the others measure.
TOGETHER, ALONE = ("test_checkpoint.py", "test_network.py", "test_road.py"), ("test_doctor.py", "test_energy.py")


def measure(name: str, batch: int) -> bench.Record:
    """Our steps in bf16, plain and with selective recomputation, alternated with timm's where that is installed."""
    settings = bench_model.Settings(
        name, True, batch, recompute=("none", "selective"), rounds=ROUNDS, device="cuda", stride="expansion",
        compiled=("ours",) if name in COMPILED else (),
    )  # fmt: skip
    try:
        bench_model.check(settings)
    except InputError as error:
        print(f"{error}: measured alone")
        return bench_model.measure(replace(settings, against_timm=False))
    return bench_model.measure(settings)


def test(files: tuple[str, ...], *words: str) -> tuple[int, str]:
    """Run these tests and print what pytest says; its exit code and last line."""
    command = [sys.executable, "-m", "pytest", "--import-mode=importlib", "-q", "-rs", "-m", "gpu", *words]
    command += [str(ROOT / "tests" / "gpu" / file) for file in files]
    done = subprocess.run(command, cwd=ROOT, check=False, stdout=subprocess.PIPE, text=True)
    print(done.stdout, flush=True)
    said = done.stdout.strip().splitlines()
    return done.returncode, said[-1] if said else f"pytest said nothing, exit code {done.returncode}"


def main() -> int:
    """Tests, then benchmark, then the record."""
    if not torch.cuda.is_available():
        print("gpu-check: no CUDA device on this machine; nothing was checked")
        return 0
    several = ("-n", "6", "--dist", "worksteal") if importlib.util.find_spec("xdist") else ()
    results = [test(TOGETHER, *several), test(ALONE)]
    samples: dict[str, list[float]] = {}
    # pytest's own count, so that a road test skipped for want of a package does not read as passed
    summary: dict[str, Any] = {"tests": "; ".join(said for _, said in results)}
    for name, batch in MODELS.items():
        found = measure(name, batch)
        samples |= {f"{name} {case}": seconds for case, seconds in found.samples.items()}
        summary |= {f"{name} {key}": value for key, value in found.summary.items()}
        for case, held in found.config["held bytes"].items():
            summary[f"{name} {case} bytes held"] = f"{held / found.config['counted bytes'][case]:.3f}x the formula"
        torch.cuda.empty_cache()
    record = bench.Record(
        name="gpu-check",
        command="make gpu-check",
        facts=environment.facts(torch.cuda.get_device_name()),
        config={"resolution": 224, "precision": "bf16 autocast", "batch": MODELS},
        unit="seconds per step",
        samples=samples,
        summary=summary,
    )
    print(f"wrote {record.write(ROOT / 'tests' / 'records')}")
    for key, value in summary.items():
        print(f"{key}: {value}")
    return max(code for code, _ in results)


if __name__ == "__main__":
    sys.exit(main())
