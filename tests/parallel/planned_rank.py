"""One rank of a real run (`trainer.train`) that notes what it takes: seconds, its size, and at its end what it holds.

    python -m tests.parallel.planned_rank RUN.json     (RANK, WORLD_SIZE, MASTER_* set)

The trainer itself is untouched: its step is called as ever, and looked at from outside. In the last step the live
tensors are weighed as in `held_worker`; everything else was noted before, so that the weighing is in no other figure.
Writes RUN's folder/planned-rank-00000.json.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed  # noqa: F401  # before anything is measured: libraries are not what is planned
from torch import Tensor

from tests.parallel import held_worker
from trainer import train
from trainer.bench.held_bytes import Storages

KEPT = ("weights", "master", "moments", "average")


def sizes(device: str) -> dict[str, int]:
    """Bytes of this process, now and at most so far: resident, of which some come from files; on a GPU of torch's.

    There "used" is all that the GPU has given away, the context of CUDA and kernels' code included.
    """
    if device == "cuda":
        free, whole = torch.cuda.mem_get_info()
        return {
            "now": torch.cuda.memory_reserved(), "most": torch.cuda.max_memory_reserved(),
            "allocated": torch.cuda.max_memory_allocated(), "used": whole - free,
        }  # fmt: skip
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    names = {"now": "VmRSS", "most": "VmHWM", "files": "RssFile"}
    return {name: int(lines[line].split()[0]) * 1024 for name, line in names.items()}


def busy_machine() -> tuple[float, float]:
    """Seconds in which the machine's cores did something, and in which others had them that are not in it (steal)."""
    fields = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    user, nice, system, _, _, irq, soft, steal = fields
    tick = os.sysconf("SC_CLK_TCK")
    return (user + nice + system + irq + soft) / tick, steal / tick


class Watch:
    """Stands between the loop and the step."""

    def __init__(self, path: Path) -> None:
        content = json.loads(path.read_text())
        self._last = int(content["steps"])
        self._out = path.parent
        self._step: Any = train.__dict__["train_step"]
        self._device = content["cluster"]["device"]
        self.base = sizes(self._device)
        self.steps: list[dict[str, float]] = []
        self.sizes: list[dict[str, int]] = []

    def step(self, engine: Any, *arguments: Any) -> Any:
        """One optimizer step, noted."""
        number = len(self.steps) + 1
        if number == self._last:
            return self._weigh(engine, arguments)
        machine, stolen = busy_machine()
        wall, own, thread = time.perf_counter(), time.process_time(), time.thread_time()
        result = self._step(engine, *arguments)
        float(result.loss)
        took = {
            "wall": time.perf_counter() - wall, "process": time.process_time() - own,
            "thread": time.thread_time() - thread, "waited": result.waited,
        }  # fmt: skip
        after, lost = busy_machine()
        self.steps.append({**took, "machine": after - machine, "stolen": lost - stolen})
        self.sizes.append(sizes(self._device))
        return result

    def _weigh(self, engine: Any, arguments: tuple[Any, ...]) -> Any:
        """The last step, in which the live tensors are followed."""
        between = held_worker.weighed(engine)
        peaks = {"whole": 0, "gradients": 0, "activations": 0}
        backward = engine._backward
        kind = engine.member.device.type
        with Storages(kind) as seen:

            def watched(loss: Tensor) -> None:
                state = held_worker.parts(engine)
                alive = seen.alive(engine.model, (tensor for own in state.values() for tensor in own))
                now = {name: sum(held_worker.storages(state[name], kind).values()) for name in ("whole", "gradients")}
                for name, size in (now | {"activations": sum(alive.values())}).items():
                    peaks[name] = max(peaks[name], size)
                backward(loss)

            engine.__dict__["_backward"] = watched
            result = self._step(engine, *arguments)
        found = {
            "rank": engine.member.rank, "stage": engine.member.stage, "base": self.base, "steps": self.steps,
            "sizes": self.sizes, "between": between, "peaks": peaks,
            "states": sum(between[name] for name in KEPT), "gradients": max(peaks["gradients"], between["gradients"]),
        }  # fmt: skip
        path = self._out / f"planned-rank-{engine.member.rank:05d}.json"
        path.write_text(json.dumps(found, indent=1) + "\n")
        return result


if __name__ == "__main__":
    watch = Watch(Path(sys.argv[1]))
    train.__dict__["train_step"] = watch.step
    train.main([sys.argv[1]])
