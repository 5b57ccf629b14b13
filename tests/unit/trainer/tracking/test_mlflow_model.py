"""A model as MLflow serves it: no pickle, its own code, and the answers of the run's own evaluation."""

import base64
import io
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from PIL import Image

from configs.schema import Augment
from data_pipeline import augment, decode
from models import coatnet, interop, spec
from models.card import Card, Preprocessing
from models.interop import Weights
from trainer import cli
from trainer.launch import free_port

LABELS = ("ant", "bee", "cat", "dog", "eel", "fox")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of `coatnet export` with a fresh network of six classes, sharpened so that its answers differ."""
    network = coatnet.build(spec.get("coatnet-nano"), resolution=(64, 64), classes=len(LABELS))
    coatnet.initialise(network, 3, "cpu")
    tensors = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    tensors[interop.CLASSIFIER + "weight"] *= 40
    seen = Preprocessing(mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3), eval_crop=0.9)
    card = Card(spec.get("coatnet-nano"), (64, 64), len(LABELS), LABELS, preprocessing=seen)
    path = tmp_path_factory.mktemp("weights") / "nano.safetensors"
    interop.write(path, Weights(card, tensors))
    return path


@pytest.fixture(scope="module")
def model(exported: Path) -> Path:
    """The folder of the MLflow model."""
    out = exported.parent / "served"
    assert cli.main(["export", str(exported), "--format", "mlflow", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`mlflow models serve`, somewhere that is not the repository."""
    port, log = free_port(), tmp_path_factory.mktemp("serve") / "log"
    words = [sys.executable, "-m", "mlflow", "models", "serve", "-m", str(model), "-p", str(port)]
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))  # it calls uvicorn by its name
    with log.open("w") as output:
        process = subprocess.Popen([*words, "--env-manager", "local"], cwd=log.parent, stdout=output, stderr=output,
                                   env=os.environ | {"PATH": path}, start_new_session=True)  # fmt: skip
    try:
        while not _answers(f"http://127.0.0.1:{port}/ping"):
            assert process.poll() is None, log.read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/invocations"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url)
    except OSError:
        return False
    return True


def pictures() -> list[bytes]:
    """A JPEG that is wider than high, a grey one, and a PNG with transparency."""
    wide = Image.merge("RGB", [Image.linear_gradient("L").rotate(90 * k) for k in range(3)]).resize((150, 90))
    clear = Image.merge("RGBA", [Image.radial_gradient("L")] * 4)
    found = []
    for picture, form in ((wide, "JPEG"), (Image.radial_gradient("L"), "JPEG"), (clear, "PNG")):
        out = io.BytesIO()
        picture.save(out, form)
        found.append(out.getvalue())
    return found


def expected(exported: Path, data: bytes) -> torch.Tensor:
    """The probabilities by the functions that evaluation uses."""
    view = augment.eval_view(decode.decode(data, 10**6), 64, Augment(eval_crop=0.9))
    mean, std = torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1), torch.tensor([0.2, 0.25, 0.3]).view(3, 1, 1)
    with torch.no_grad():
        logits: torch.Tensor = interop.load_model(exported)(((view / 255 - mean) / std)[None])
    return logits[0].softmax(-1)


def ask(url: str, cells: list[str], **more: Any) -> list[dict[str, Any]]:
    body = {"dataframe_split": {"columns": ["image"], "data": [[cell] for cell in cells]}, **more}
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        found: list[dict[str, Any]] = json.loads(answer.read())["predictions"]
    return found


def test_the_server_classifies_pictures_as_the_evaluation_does(server: str, exported: Path) -> None:
    cells = [base64.b64encode(data).decode() for data in pictures()]
    answers = ask(server, cells)
    assert len({answer["label"] for answer in answers}) > 1  # the pictures are not one to the network
    for data, answer in zip(pictures(), answers, strict=True):
        chances = expected(exported, data)
        order = chances.argsort(descending=True)[:5]
        assert answer["labels"] == [LABELS[number] for number in order.tolist()]
        assert answer["label"] == answer["labels"][0]
        assert answer["probabilities"] == pytest.approx(chances[order].tolist(), abs=1e-5)
        assert answer["probability"] == answer["probabilities"][0]
    (one,) = ask(server, cells[:1], params={"top": 2})
    assert one["labels"] == answers[0]["labels"][:2]


def test_what_is_no_picture_is_refused(server: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        ask(server, [base64.b64encode(b"GIF89a").decode()])
    assert b"picture cannot be decoded" in refused.value.read()


def test_the_folder_holds_code_and_safetensors_and_no_pickle(model: Path, exported: Path) -> None:
    files = {str(path.relative_to(model)) for path in model.rglob("*") if path.is_file()}
    endings = {Path(name).suffix for name in files}
    assert endings <= {"", ".py", ".safetensors", ".json", ".yaml", ".txt"}
    assert {"mlflow_served.py", "code/models/coatnet.py", "code/data_pipeline/decode.py"} <= files
    assert (model / "artifacts" / "weights.safetensors").read_bytes() == exported.read_bytes()
    described = mlflow.models.Model.load(str(model))
    assert described.signature is not None
    assert described.signature.inputs.input_names() == ["image"]
    assert "label" in described.signature.outputs.input_names()
    example = json.loads((model / "input_example.json").read_text())
    assert Image.open(io.BytesIO(base64.b64decode(example["data"][0][0]))).size == (64, 64)
    assert "torch==" in (model / "requirements.txt").read_text()


def test_a_model_that_is_there_stays(model: Path, exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["export", str(exported), "--format", "mlflow", "--out", str(model)]) == 76
    assert "--force replaces it" in capsys.readouterr().err
