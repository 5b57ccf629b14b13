"""What of this machine bears on a run, with what to do about it: versions, devices, collectives, builds."""

import importlib.metadata
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from configs.finding import Finding
from configs.schema import Run
from trainer.launch import free_port, launch, with_rooms
from trainer.machine import environment
from trainer.machine.devices import peak_of

FLOOR = 0.4  # of a GPU's peak in bf16: what a healthy one surpasses in a large matrix product
UNLIKE = 0.7  # of the node's median GPU, where the peak is not known
SIDE = 8192  # of the matrices
DEEPSPEED_OPS = {"async_io": "--parallel.offload nvme"}  # AdamW on the host is torch's, which needs no building


def versions() -> list[Finding]:
    """The packages that the trainer needs, beside the versions that it was run with."""
    from packaging.requirements import Requirement

    try:
        wanted = importlib.metadata.requires("coatnet") or []
    except importlib.metadata.PackageNotFoundError:
        wanted = []
    bad = []
    for requirement in map(Requirement, wanted):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            have = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            have = ""
        if not have or not requirement.specifier.contains(have, prereleases=True):
            bad.append(f"{requirement.name} {have or 'missing'} (needs {requirement.specifier})")
    found = environment.versions()
    said = ", ".join(f"{name} {found[name]}" for name in ("python", "torch", "deepspeed", "numpy", "mlflow"))
    if bad:
        advice = "pip install -e . (or -c requirements.lock for the tested versions)"
        return [Finding("versions", "bad", f"{said}; {', '.join(bad)}", advice)]
    return [Finding("versions", "good", said)]


def devices() -> list[Finding]:
    """The GPUs of this machine, or its processor."""
    if not torch.cuda.is_available():
        gpus = Path("/proc/driver/nvidia/gpus")
        if gpus.exists() and any(gpus.iterdir()):
            said = f"the driver has GPUs, but torch {torch.__version__} sees none"
            return [Finding("devices", "bad", said, "a torch for this driver's CUDA; CUDA_VISIBLE_DEVICES unset")]
        said = f"no GPU; {len(os.sched_getaffinity(0))} cores of {environment.cpu_model()}"
        return [Finding("devices", "note", said, "runs go to the processor: fit for demos and tests")]
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        said = f"GPU {index}: {properties.name}, {total / 2**30:.0f} GiB, {free / 2**30:.0f} GiB of it free"
        if not torch.cuda.is_bf16_supported():
            found.append(Finding("devices", "warning", said + ", no bf16", "--precision.dtype fp32"))
        elif free < 0.9 * total:
            found.append(Finding("devices", "warning", said, "another program holds memory there: nvidia-smi"))
        else:
            found.append(Finding("devices", "good", said))
    return found


def matmul_speed(index: int) -> float:
    """FLOP/s of GPU `index` in products of large bf16 matrices."""
    device = torch.device("cuda", index)
    left, right = (torch.randn(SIDE, SIDE, dtype=torch.bfloat16, device=device) for _ in range(2))
    seconds = []
    for number in range(12):
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        torch.matmul(left, right)  # 1.1e12 FLOP: a launch is nothing beside it
        torch.cuda.synchronize(device)
        if number > 1:
            seconds.append(time.perf_counter() - began)
    return 2.0 * SIDE**3 / statistics.median(seconds)


def matmuls() -> list[Finding]:
    """The speed of every GPU beside what such a GPU can do."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = [torch.cuda.get_device_name(index) for index in range(count)]
    return judge_matmuls([matmul_speed(index) for index in range(count)], [peak_of(name) for name in names])


def judge_matmuls(speeds: list[float], peaks: list[float | None]) -> list[Finding]:
    """What the speeds of a node's GPUs say of each.

    Args:
        speeds: FLOP/s.
        peaks: of the same GPUs, None where not known.
    """
    found = []
    for index, (speed, peak) in enumerate(zip(speeds, peaks, strict=True)):
        floor = FLOOR * peak if peak else UNLIKE * statistics.median(speeds)
        share = f", {speed / peak:.0%} of its peak" if peak else ""
        said = f"GPU {index}: {speed / 1e12:.0f} TFLOP/s in bf16{share}"
        if speed < floor:
            advice = f"below {floor / 1e12:.0f}: look at clocks and heat (nvidia-smi -q -d PERFORMANCE)"
            found.append(Finding("matmul", "bad", said, advice))
        else:
            found.append(Finding("matmul", "good", said))
    return found


def local_world() -> int:
    """Ranks that a check starts here: one per GPU, two on a processor."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 2


def collectives(world: int, variables: dict[str, str] | None = None) -> list[Finding]:
    """An all-reduce over `world` ranks of this machine, and with those of others where `variables` name them."""
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    with tempfile.TemporaryDirectory(prefix="coatnet-doctor-") as place:
        out, logs = Path(place) / "links.json", Path(place) / "logs"
        code = launch(["trainer.machine.links", str(out)], world, logs, free_port(), backend == "gloo", more=variables)
        if code or not out.exists():
            tails = [log.read_text(errors="replace").splitlines()[-1:] for log in sorted(logs.glob("*.log"))]
            why = next((lines[0] for lines in tails if lines), "no word")
            advice = "NCCL_DEBUG=INFO tells more" if backend == "nccl" else "GLOO_SOCKET_IFNAME names the interface"
            return [Finding("collectives", "bad", f"{backend} over {world} ranks fails: {why}", advice)]
        found = json.loads(out.read_text(encoding="ascii"))
    said = f"{backend} over {found['ranks']} ranks, all-reduce {found['all'] / 1e9:.2f} GB/s"
    findings = [Finding("collectives", "good" if found["ranks"] > 1 else "note", said)]
    if found["pairs"]:
        speeds = [speed for *_, speed in found["pairs"]]
        said = f"{len(speeds)} pairs of nodes, {min(speeds) / 1e9:.2f} to {max(speeds) / 1e9:.2f} GB/s"
        mine = found["node"] in found["slow"]
        advice = "leave this node out; look at its cable, port and NIC" if mine else ""
        said += ", this node is slow with all of its partners" if mine else ""
        findings.append(Finding("links", "bad" if mine else "good", said, advice))
    return findings


def builds(run: Run | None = None) -> list[Finding]:
    """What compiles or was compiled: DeepSpeed's operators, FFCV, torch.compile.

    Args:
        run: whose settings make a build necessary; None: none is.
    """
    found = [_deepspeed_ops(run), _ffcv(run)]
    compiler = shutil.which("c++") or shutil.which("g++")
    wanted = run is not None and run.parallel.compile
    if compiler:
        found.append(Finding("torch.compile", "good", f"{compiler} is there"))
    else:
        advice = "install g++, or leave --parallel.compile out"
        found.append(Finding("torch.compile", "bad" if wanted else "note", "no C++ compiler", advice))
    return found


def _deepspeed_ops(run: Run | None) -> Finding:
    """DeepSpeed's compiled operators, of which only offloading to a disk needs one."""
    code = (
        "import json, os, sys, contextlib\n"
        "with contextlib.redirect_stdout(sys.stderr):\n"
        "    from deepspeed.git_version_info import installed_ops\n"
        "    from deepspeed.ops.op_builder.all_ops import ALL_OPS\n"
        f"    names = {tuple(DEEPSPEED_OPS)}\n"
        "    told = {n: [bool(installed_ops.get(n)), bool(ALL_OPS[n].is_compatible(verbose=False))] for n in names}\n"
        "print(json.dumps(told))\n"
    )
    done = _python(code)
    if done.returncode:
        return Finding("DeepSpeed", "bad", _last(done.stderr), "pip install 'deepspeed>=0.19,<0.20'")
    told = json.loads(done.stdout)
    offload = run.parallel.offload if run is not None else "none"
    wanted = ("async_io",) if offload == "nvme" else ()
    states = {(True, True): "built", (False, True): "not built", (False, False): "not built and cannot be here"}
    said = ", ".join(f"{name} {states[built, built or able]}" for name, (built, able) in told.items())
    missing = [name for name in wanted if not told[name][0]]
    hopeless = [name for name in missing if not told[name][1]]
    if hopeless:
        advice = "apt-get install g++ libaio-dev python3-dev, or take --parallel.offload cpu"
        return Finding("DeepSpeed ops", "bad", said, advice)
    if missing:
        advice = "compiled at the first start, for minutes; DS_BUILD_AIO=1 pip install deepspeed does it before"
        return Finding("DeepSpeed ops", "warning", said, advice)
    needs = "; ".join(f"{name} is for {flag}" for name, flag in DEEPSPEED_OPS.items())
    return Finding("DeepSpeed ops", "good", f"{said}; {needs}")


def _ffcv(run: Run | None) -> Finding:
    """FFCV, which only .beton files need."""
    wanted = run is not None and ".beton" in run.data.path
    spec = importlib.util.find_spec("ffcv")
    advice = "apt-get install libturbojpeg0-dev libopencv-dev pkg-config g++, then pip install -e '.[ffcv]'"
    if spec is None or spec.origin is None:
        return Finding("FFCV", "bad" if wanted else "note", "not installed; only .beton files need it", advice)
    done = _python("import ffcv; print(ffcv.__version__)")
    if done.returncode:
        return Finding("FFCV", "bad" if wanted else "warning", f"cannot be imported: {_last(done.stderr)}", advice)
    return Finding("FFCV", "good", done.stdout.strip())


def _python(code: str) -> "subprocess.CompletedProcess[str]":
    """A few lines in a Python of their own: what they import may write, compile or crash."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=with_rooms(), capture_output=True, text=True, timeout=300, check=False)


def _last(text: str) -> str:
    """The last line that says something."""
    return next((line for line in reversed(text.strip().splitlines()) if line.strip()), "no word")
