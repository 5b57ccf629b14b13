"""`make gpu-check`: the tests that need a CUDA device, then a short alternated benchmark beside timm; writes a record.

Needs no network and no MLflow. Without a CUDA device it says so and exits 0.
"""

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
ROUNDS = 7


def measure(name: str, batch: int) -> bench.Record:
    """Our steps in bf16, plain and with selective recomputation, alternated with timm's where that is installed."""
    settings = bench_model.Settings(
        name, True, batch, recompute=("none", "selective"), rounds=ROUNDS, device="cuda", stride="expansion"
    )
    try:
        bench_model.check(settings)
    except InputError as error:
        print(f"{error}: measured alone")
        return bench_model.measure(replace(settings, against_timm=False))
    return bench_model.measure(settings)


def main() -> int:
    """Tests, then benchmark, then the record."""
    if not torch.cuda.is_available():
        print("gpu-check: no CUDA device on this machine; nothing was checked")
        return 0
    tests = ["-m", "pytest", "--import-mode=importlib", "-q", "-rs", "-m", "gpu", str(ROOT / "tests/gpu")]
    done = subprocess.run([sys.executable, *tests], cwd=ROOT, check=False, stdout=subprocess.PIPE, text=True)
    print(done.stdout)
    code, said = done.returncode, done.stdout.strip().splitlines()
    samples: dict[str, list[float]] = {}
    # pytest's own count, so that a road test skipped for want of a package does not read as passed
    summary: dict[str, Any] = {"tests": said[-1] if said else f"pytest said nothing, exit code {code}"}
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
    return code


if __name__ == "__main__":
    sys.exit(main())
