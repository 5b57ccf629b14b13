"""A run's weights as a model of MLflow: a folder that `mlflow models serve` serves, and a version in its registry.

The folder holds code (`trainer/tracking/mlflow_served.py` and the rooms it needs), the weights as safetensors with
their card, a signature and an example. MLflow's usual way would be a pickle of the network's object.
"""

import io
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import InputError
from models import interop
from models.card import Card
from trainer.machine.environment import versions

CODE = Path(__file__).resolve().parent / "mlflow_served.py"
ROOMS = ("configs", "models", "data_pipeline")
NEEDS = ("torch", "torchvision", "numpy", "pillow", "safetensors", "pandas", "mlflow")
WEIGHTS = "weights.safetensors"


@dataclass(frozen=True)
class Parts:
    """What MLflow's functions that write a model are given."""

    words: dict[str, Any]
    card: Card


warnings.filterwarnings("ignore", message=".*(Type hint|type hint)")  # see `trainer/tracking/mlflow_served.py`


@contextmanager
def parts(weights: interop.Weights) -> Iterator[Parts]:
    """The parts of the model, in a temporary folder."""
    import pandas as pd
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import Array

    card = weights.card
    with tempfile.TemporaryDirectory(prefix="coatnet-mlflow-") as folder:
        file = Path(folder) / WEIGHTS
        interop.write(file, weights)
        for room in ROOMS:
            shutil.copytree(
                CODE.parents[2] / room, Path(folder) / room, ignore=shutil.ignore_patterns("__pycache__", "building")
            )
        texts, numbers = DataType.string, DataType.double
        outputs = [ColSpec(texts, "label"), ColSpec(numbers, "probability")]
        outputs += [ColSpec(Array(texts), "labels"), ColSpec(Array(numbers), "probabilities")]
        signature = ModelSignature(
            inputs=Schema([ColSpec(DataType.binary, "image")]),
            outputs=Schema([*outputs]),
            params=ParamSchema([ParamSpec("top", DataType.long, min(5, card.classes))]),
        )
        found = versions()
        words = {
            "python_model": str(CODE),
            "artifacts": {"weights": str(file)},
            "code_paths": [str(Path(folder) / room) for room in ROOMS],
            "signature": signature,
            "input_example": pd.DataFrame({"image": [example(card)]}),
            "pip_requirements": [f"{name}=={found[name]}" if found.get(name) else name for name in NEEDS],
            "metadata": {"network": card.spec.name, "recipe": card.recipe, "config": card.config, "step": card.step},
        }
        yield Parts(words, card)


def example(card: Card) -> bytes:
    """A JPEG of the network's size: grey stripes, no picture of anybody's."""
    from PIL import Image

    height, width = card.resolution
    stripes = Image.linear_gradient("L").resize((width, height)).convert("RGB")
    out = io.BytesIO()
    stripes.save(out, "JPEG", quality=90)
    return out.getvalue()


def write(path: Path, weights: interop.Weights, force: bool = False) -> None:
    """Write the model's folder.

    Raises:
        InputError: something is there and is not to be replaced, or the folder cannot be written.
    """
    import mlflow

    if path.exists() and not force:
        raise InputError(f"{path}: is there already; --force replaces it, --out chooses another folder")
    aside = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        with parts(weights) as made:
            mlflow.pyfunc.save_model(str(aside), **made.words)
        shutil.rmtree(path, ignore_errors=True)
        os.replace(aside, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error}; choose another --out") from None


def register(weights: interop.Weights, name: str, uri: str, run_id: str) -> str:
    """Log weights under a run's MLflow run, as a new version of a registered model.

    Args:
        weights: of the run.
        name: in the registry; made with its first version.
        uri: of MLflow.
        run_id: of the MLflow run.

    Returns:
        The version.
    """
    import mlflow

    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    with parts(weights) as made, mlflow.start_run(run_id=run_id):
        scores = {key: float(value) for key, value in made.card.metrics.items()}
        logged = mlflow.pyfunc.log_model(
            name="model", registered_model_name=name, step=made.card.step, params={"weights": made.card.weights},
            tags={"scores": json.dumps(scores)}, **made.words
        )  # fmt: skip
    return str(logged.registered_model_version)
