"""A run's figures as TensorBoard events: one event file for the whole life of a run folder."""

import os
from collections.abc import Sequence
from pathlib import Path

from configs.schema import Run
from trainer.tracking.destination import Line, Mark, Position

FILE = "events.out.tfevents.coatnet"  # TensorBoard reads files with "tfevents" in their name


class TensorBoardWriter:
    """Appends to `tensorboard/` in the run folder, by tensorboard's own record format; needs no torch.

    What a killed writer wrote behind the saved position is cut off and written again, to the same bytes, so a page
    that is open on the file does not notice. Without the file (someone deleted it) all lines are written anew.
    """

    def __init__(self, folder: Path, run: Run, position: Position) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        path = folder / "tensorboard" / FILE
        path.parent.mkdir(exist_ok=True)
        self._position = position
        self._file = path.open("ab")
        safe = position.own.get("bytes", 0)
        whole = 0 < safe <= path.stat().st_size
        self.start = position.mark if whole else Mark()
        self._file.truncate(safe if whole else 0)
        self._file.seek(0, os.SEEK_END)
        self._records = RecordWriter(self._file)
        if not whole:
            first = Event(wall_time=0.0, file_version="brain.Event:2")
            self._records.write(first.SerializeToString())
            self._save(self.start)

    def take(self, lines: Sequence[Line], upto: Mark) -> None:
        """Append one event per line."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        for line in lines:
            values = [Summary.Value(tag=tag, simple_value=value) for tag, value in line.values.items()]
            event = Event(wall_time=line.time, step=line.step, summary=Summary(value=values))
            self._records.write(event.SerializeToString())
        self._save(upto)

    def finish(self, upto: Mark) -> None:
        """Close the file."""
        self._save(upto)
        self._records.close()

    def _save(self, upto: Mark) -> None:
        self._records.flush()
        self._position.save(upto, bytes=self._file.tell())
