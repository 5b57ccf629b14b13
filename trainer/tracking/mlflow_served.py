"""The code of a model that MLflow serves: encoded pictures in, classes and probabilities out.

`trainer/tracking/mlflow_model.py` copies this file, with the rooms it imports, into the model's folder, and MLflow runs
it there ("models from code"). The weights are a safetensors file beside it; nothing is a pickle.
"""

import base64
import warnings
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import torch
from mlflow.pyfunc.model import PythonModel

from configs.schema import Augment
from data_pipeline import augment, decode
from models import interop

TOP = 5  # classes named where the caller does not say
PIXELS = 100_000_000  # a larger picture is refused, not decoded
BATCH = 32  # pictures in one pass


# MLflow takes only hints of its own kinds for a schema, and says so; the model's signature is the schema here.
warnings.filterwarnings("ignore", message=".*Type hint")


class Classifier(PythonModel):
    """Names the classes of pictures: the same pixels and the same network as the run's own evaluation."""

    def load_context(self, context: Any) -> None:
        """Load the weights; called once by MLflow."""
        path = Path(context.artifacts["weights"])
        self._model, self._card = interop.load_model(path), interop.read(path).card
        seen = self._card.preprocessing
        crop = "resize" if seen.crop == "squash" else "random"
        self._view = Augment(crop=crop, eval_crop=seen.eval_crop, mean=seen.mean, std=seen.std)  # type: ignore[arg-type]

    def predict(self, context: Any, model_input: Any, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Classify.

        Args:
            context: MLflow's.
            model_input: a table with a column `image` of JPEG, PNG or WebP files' bytes, or their base64.
            params: `top`: how many classes are named for each picture.

        Returns:
            For each picture `label` and `probability` of the likeliest class, and lists of the `top` likeliest.
        """
        pictures = [_bytes(value) for value in model_input["image"]]
        top = min(int((params or {}).get("top", TOP)), self._card.classes)
        rows = []
        for first in range(0, len(pictures), BATCH):
            chances = self._chances(pictures[first : first + BATCH])
            for values, numbers in zip(*(found.tolist() for found in chances.topk(top, dim=-1)), strict=True):
                rows.append(([self._name(number) for number in numbers], values))
        table = {
            "label": [names[0] for names, _ in rows],
            "probability": [values[0] for _, values in rows],
            "labels": [names for names, _ in rows],
            "probabilities": [values for _, values in rows],
        }
        return pd.DataFrame(table)

    @torch.inference_mode()
    def _chances(self, pictures: list[bytes]) -> torch.Tensor:
        """Probabilities, (B, classes)."""
        size = self._card.resolution[0]
        views = [augment.eval_view(decode.decode(data, PIXELS), size, self._view) for data in pictures]
        mean, std = (torch.tensor(values).view(3, 1, 1) * 255 for values in (self._view.mean, self._view.std))
        logits: torch.Tensor = self._model((torch.stack(views).float() - mean) / std).float()
        return logits.sigmoid() if self._card.loss == "sigmoid" else logits.softmax(dim=-1)

    def _name(self, number: int) -> str:
        """A class's name, or its number where the names are not known."""
        return self._card.labels[number] if self._card.labels else str(number)


def _bytes(value: Any) -> bytes:
    """An encoded picture from a cell of the table."""
    return base64.b64decode(value) if isinstance(value, str) else bytes(value)


mlflow.models.set_model(Classifier())
