"""`make gpu-check`: the tests that need a CUDA device, then a short alternated benchmark beside timm; writes a record.

Needs no network and no MLflow. Without a CUDA device it says so and exits 0.
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import nn  # noqa: E402

from models import coatnet, cost, norm, spec  # noqa: E402
from trainer import bench, cluster, environment  # noqa: E402

MODELS = {"coatnet0": 128, "coatnet3": 64, "coatnet5": 32}  # name: images per step
ROUNDS, WARMUP, STEPS = 7, 3, 4


def timm_model(name: str) -> nn.Module:
    """timm's expression of the same network, stride in the expansion convolution (COATNET.md section 3)."""
    from timm.models.maxxvit import MaxxVit, MaxxVitCfg, MaxxVitConvCfg, MaxxVitTransformerCfg

    found = spec.get(name)
    stem, *stages = found.stages
    config = MaxxVitCfg(
        embed_dim=tuple(stage.width for stage in stages),
        depths=tuple(stage.depth for stage in stages),
        block_type=("C", "C", "T", "T"),
        stem_width=stem.width,
        stem_bias=True,
        head_hidden_size=stages[-1].width,
        conv_cfg=MaxxVitConvCfg(stride_mode="1x1", pool_type="max2", norm_eps=1e-3),
        transformer_cfg=MaxxVitTransformerCfg(
            dim_head=found.head_size, pool_type="max2", rel_pos_type="bias", norm_eps=1e-5
        ),
    )
    return MaxxVit(config, img_size=224, num_classes=1000)


def our_model(name: str, batch: int) -> nn.Module:
    """Our network of the same name, BatchNorm over the whole batch."""
    model = coatnet.build(spec.get(name), resolution=224, classes=1000)
    coatnet.initialise(model, 0, torch.device("cuda"))
    norm.configure(model, group=batch)
    return model


def stepper(model: nn.Module, batch: int) -> Callable[[], float]:
    """A function that times STEPS training steps (bf16 autocast, channels_last, fused AdamW), seconds per step."""
    model = model.cuda().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    images = torch.randn(batch, 3, 224, 224, device="cuda").to(memory_format=torch.channels_last)
    labels = torch.randint(1000, (batch,), device="cuda")

    def steps() -> float:
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(STEPS):
            with torch.autocast("cuda", torch.bfloat16):
                loss = nn.functional.cross_entropy(model(images).float(), labels)
            torch.autograd.backward(loss)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        return (time.perf_counter() - began) / STEPS

    for _ in range(WARMUP):
        steps()
    return steps


def measure(name: str, batch: int) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Alternated step times of our model and timm's; seconds, and the summary of them."""
    peak = cluster.peak_of(torch.cuda.get_device_name())
    cases = {f"{name} ours": stepper(our_model(name, batch), batch)}
    try:
        cases[f"{name} timm"] = stepper(timm_model(name).to(memory_format=torch.channels_last), batch)
    except ImportError:
        print("timm is not installed: measured alone")
    torch.cuda.reset_peak_memory_stats()
    samples = bench.alternate(cases, ROUNDS)
    ours = statistics.median(samples[f"{name} ours"])
    summary: dict[str, Any] = {f"{name} images/s": round(batch / ours, 1)}
    if peak is not None:
        flops = 6 * cost.count(spec.get(name)).multiply_adds * batch
        summary[f"{name} MFU"] = f"{flops / ours / peak:.1%}"
    if len(samples) == 2:
        ratio = bench.median_ratio(samples[f"{name} timm"], samples[f"{name} ours"])
        summary[f"{name} speed over timm"] = f"{ratio:.2f}x"
    return samples, summary


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
        more_samples, more = measure(name, batch)
        samples |= more_samples
        summary |= more
        torch.cuda.empty_cache()
    record = bench.Record(
        name="gpu-check",
        command="make gpu-check",
        facts=environment.facts(torch.cuda.get_device_name()),
        config={"resolution": 224, "precision": "bf16 autocast", "batch": MODELS, "steps": STEPS},
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
