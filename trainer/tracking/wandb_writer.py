"""A run's figures as an offline W&B run, for `wandb sync runs/NAME/wandb`; touches no network."""

import os
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path

from configs import resolve
from configs.schema import Run
from trainer.tracking.destination import Line, Mark, Position


class WandbWriter:
    """Keeps one whole offline run in `wandb/` of the run folder.

    W&B cannot add to an offline run: of two folders with one id the later replaces the earlier when they are synced
    (wandb issues 3841, 4624), and a killed writer loses what W&B still held in memory. So every session writes all
    lines from the first on into a folder of its own, and deletes the older folders of the same id when it is whole.
    """

    def __init__(self, folder: Path, run: Run, position: Position) -> None:
        os.environ["WANDB_X_DISABLE_STATS"] = "true"  # they would be the writer's own, and ask a metadata server
        os.environ["WANDB_ERROR_REPORTING"] = "false"  # reports to the vendor
        os.environ["WANDB_CACHE_DIR"] = str((folder / "wandb").resolve())  # not the user's home
        import wandb

        self.start = Mark()
        self._folder, self._position = folder, position
        if "id" not in position.own:
            position.save(Mark(), id=secrets.token_hex(4))
        self._delete_all_but(position.own.get("whole", ""))
        settings = wandb.Settings(
            silent=True, console="off", disable_git=True, disable_code=True, reinit="finish_previous"
        )
        self._wandb_run = wandb.init(
            mode="offline",
            dir=folder,
            id=position.own["id"],
            project=run.tracking.experiment,
            name=folder.name,
            config={**resolve.flat(run), "config": resolve.digest(run)},
            settings=settings,
        )
        # The same step may come twice, after a resume from an older save: W&B wants its own steps to rise.
        self._wandb_run.define_metric("*", step_metric="step")

    def take(self, lines: Sequence[Line], upto: Mark) -> None:
        """Hand the lines to W&B; nothing is safe before `finish`."""
        for line in lines:
            self._wandb_run.log({"step": line.step, "_timestamp": line.time, **line.values}, step=line.number)

    def finish(self, upto: Mark) -> None:
        """Close the offline run, as failed unless the training is finished, and delete what it replaces."""
        name = Path(self._wandb_run.dir).parent.name
        self._wandb_run.finish(exit_code=0 if (self._folder / "done").exists() else 1)
        self._position.save(upto, whole=name)
        self._delete_all_but(name)

    def _delete_all_but(self, kept: str) -> None:
        for path in (self._folder / "wandb").glob(f"offline-run-*-{self._position.own['id']}"):
            if path.name != kept:
                shutil.rmtree(path)
