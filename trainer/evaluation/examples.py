"""What an evaluation shows of single pictures and of single classes, for the report of a run."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from configs.schema import Run
from data_pipeline.batch import Batch
from trainer.cluster import Member
from trainer.health.evidence import gathered
from trainer.tracking.track import EXAMPLES

SHOWN = 12  # pictures drawn at random, and so many that the network was most sure of and wrong about
RANKED = 3  # classes named for each picture
WORST = 100  # classes
SIDE = 128  # pixels of a picture that is kept
SPREAD = 2654435761  # Knuth's multiplier: a fixed draw over the split, the same at any number of ranks

Found = tuple[float, dict[str, Any]]


class Examples:
    """Collects over the batches of one evaluation on one rank; `result` brings the ranks together.

    Attributes:
        precisions: (classes,) average precision of each class, NaN where it has no sample; None where pictures have
            one label: what counts is then the share of a class's pictures whose first guess was right.
    """

    def __init__(self, run: Run, classes: int) -> None:
        self._sigmoid = run.optim.loss == "sigmoid"
        self._seen, self._hits = torch.zeros(2, classes, dtype=torch.int64).unbind()
        self.precisions: Tensor | None = None
        self._drawn: list[Found] = []
        self._wrong: list[Found] = []

    def take(self, batch: Batch, logits: Tensor, wanted: Tensor) -> None:
        """Take one batch.

        Args:
            batch: as it was loaded.
            logits: (B, classes).
            wanted: (B, classes), positive where a label is.
        """
        scores = logits.sigmoid() if self._sigmoid else logits.softmax(dim=-1)
        chances_BR, ranked_BR = (top.cpu() for top in scores.topk(min(RANKED, scores.shape[1]), dim=-1))
        positive = wanted.cpu() > 0
        right_B = positive.gather(1, ranked_BR[:, :1])[:, 0]
        valid_B = batch.valid_B.cpu()
        self._seen += positive[valid_B].sum(0)
        self._hits += (positive & right_B[:, None])[valid_B].sum(0)
        for row in valid_B.nonzero().flatten().tolist():
            index = int(batch.indices_B[row])
            draw, sure = index * SPREAD % (1 << 32) / (1 << 32), float(chances_BR[row, 0])
            place = {
                "index": index,
                "key": batch.keys[row],
                "labels": positive[row].nonzero().flatten().tolist(),
                "top": list(zip(ranked_BR[row].tolist(), chances_BR[row].tolist(), strict=True)),
                "right": bool(right_B[row]),
                "picture": None,
            }
            self._drawn.append((draw, place))
            if not right_B[row]:
                self._wrong.append((-sure, place))
        self._drawn, self._wrong = _first(self._drawn), _first(self._wrong)
        self._keep_pictures(batch)

    def _keep_pictures(self, batch: Batch) -> None:
        """Encode those of the batch's pictures that are among the first now, as they were looked at."""
        if not batch.images_BCHW[0].numel():  # a stage of a pipeline that has the labels only
            return
        rows = {index: row for row, index in enumerate(batch.indices_B.tolist())}
        for _, place in self._drawn + self._wrong:
            if place["picture"] is None and place["index"] in rows:
                place["picture"] = thumbnail(batch.images_BCHW[rows[place["index"]]])

    def result(self, member: Member) -> dict[str, Any]:
        """What all ranks have. A collective call."""
        counts = torch.stack([self._seen, self._hits])
        dist.all_reduce(counts, group=member.control)
        seen, hits = counts.double()
        shares = hits / seen if self.precisions is None else self.precisions
        known = (seen > 0).nonzero().flatten()
        worst = known[shares[known].argsort(stable=True)][:WORST]
        every = gathered((self._drawn, self._wrong), member)
        drawn, wrong = (_first([found for lists in every for found in lists[kind]]) for kind in (0, 1))
        return {
            "score": "top-1" if self.precisions is None else "average precision",
            "classes": len(known),
            "worst": [[int(number), int(seen[number]), float(shares[number])] for number in worst],
            "drawn": [place for _, place in drawn],
            "wrong": [place for _, place in wrong],
        }

    def write(self, folder: Path, step: int, member: Member) -> None:
        """Write what all ranks have into the run's folder, on the first rank. A collective call."""
        found = {"step": step, **self.result(member)}
        if member.first:
            (folder / EXAMPLES).write_text(json.dumps(found))


def thumbnail(pixels_CHW: Tensor) -> str:
    """A picture as a small JPEG in base64."""
    picture = Image.fromarray(pixels_CHW.permute(1, 2, 0).contiguous().numpy())
    picture.thumbnail((SIDE, SIDE))
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=85)
    return base64.b64encode(out.getvalue()).decode("ascii")


def _first(found: list[Found]) -> list[Found]:
    """The first few, in order; equal ones by their index."""
    return sorted(found, key=lambda pair: (pair[0], pair[1]["index"]))[:SHOWN]
