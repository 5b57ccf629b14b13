"""timm's model of coatnet-nano's size on the clip art, trained with timm's own parts; writes its scores to a file.

    python tests/benchmarks/timm_clipart.py OUT CASE [--field value ...]

The words are overrides of demo-clipart, whose budget holds here too: steps, batch, AdamW, the linear schedule with its
warm-up, weight decay, smoothing, clip, EMA. timm's train.py is not in its package and knows one label a picture, so
the loop is written here, from timm's model, initialisation, transforms, loader, loss, optimizer groups, schedule,
clip and EMA. CASES says in what the two cases differ. BatchNorm takes its statistics over the whole batch, as timm's
does in one process.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from timm.data.loader import create_loader
from timm.loss.binary_cross_entropy import BinaryCrossEntropy
from timm.models.maxxvit import MaxxVit, MaxxVitCfg, MaxxVitConvCfg, MaxxVitTransformerCfg
from timm.optim import create_optimizer_v2  # type: ignore[attr-defined]
from timm.scheduler.poly_lr import PolyLRScheduler
from timm.utils.clip_grad import dispatch_clip_grad
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from configs.schema import Run
from data_pipeline.decode import decode
from data_pipeline.manifest import Dataset, open_dataset
from data_pipeline.shard import OpenShards, Sample
from models import spec
from trainer.commands.config import resolve_command
from trainer.engine.network import head_bias
from trainer.evaluation.average_precision import average_precision


class Case(NamedTuple):
    """What differs between the cases: RandAugment in timm's words, and whose initial weights are taken."""

    augment: str
    our_weights: bool


# timm: the recipe's two numbers as timm reads them (5 of 10, each operation applied every other time), its own initial
# weights. timm-matched: the recipe's strength (5 of 30, always; timm's magnitudes are whole, and without inc1 its
# posterize would keep no bit) and its distribution of initial weights with the head bias at the prior, so that only
# the code is timm's.
CASES = {"timm": Case("rand-m5-n2", our_weights=False), "timm-matched": Case("rand-m2-n2-p1.0-inc1", our_weights=True)}


class Pictures(torch.utils.data.Dataset[tuple[Any, Tensor]]):
    """A split as timm's loader wants it: (transformed PIL picture, (K,) of 0 and 1).

    Attributes:
        transform: set by timm's `create_loader`.
    """

    def __init__(self, dataset: Dataset, split: str, max_pixels: int) -> None:
        part = dataset.split(split)
        self.transform: Any = None
        self._shards = OpenShards(part.shard_paths, part.counts)
        self._places = [(shard, inside) for shard, count in enumerate(part.counts) for inside in range(int(count))]
        self._classes, self._max_pixels = dataset.classes, max_pixels

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> tuple[Any, Tensor]:
        stored = self._read(index)
        picture = Image.fromarray(decode(stored.picture, self._max_pixels).permute(1, 2, 0).numpy())
        wanted = torch.zeros(self._classes)
        wanted[list(stored.labels)] = 1.0
        return self.transform(picture), wanted

    def positive(self) -> Tensor:
        """(N, K) bool: which picture carries which class."""
        found_NK = torch.zeros(len(self), self._classes, dtype=torch.bool)
        for index in range(len(self)):
            found_NK[index, list(self._read(index).labels)] = True
        return found_NK

    def _read(self, index: int) -> Sample:
        shard, inside = self._places[index]
        return self._shards.get(shard).read(inside, self._classes)


def build(run: Run, classes: int) -> MaxxVit:
    """timm's expression of the recipe's network, with timm's initial weights."""
    found = spec.get(run.model.name)
    stem, *stages = found.stages
    config = MaxxVitCfg(
        embed_dim=tuple(stage.width for stage in stages),
        depths=tuple(stage.depth for stage in stages),
        block_type=("C", "C", "T", "T"),
        stem_width=stem.width,
        stem_bias=True,
        head_hidden_size=stages[-1].width,
        conv_cfg=MaxxVitConvCfg(
            stride_mode="1x1" if found.stride == "expansion" else "dw",
            pool_type="max2",
            norm_eps=1e-3,
            act_layer="gelu_tanh",
        ),
        transformer_cfg=MaxxVitTransformerCfg(
            dim_head=found.head_size, pool_type="max2", rel_pos_type="bias", norm_eps=1e-5, act_layer="gelu_tanh"
        ),
    )
    return MaxxVit(config, img_size=run.model.resolution, num_classes=classes)


def loader(run: Run, dataset: Dataset, split: str, augment: str | None) -> Any:
    """timm's loader of a split: `augment` and the recipe's crops for training, the central square where it is None."""
    pictures: Any = Pictures(dataset, split, run.data.max_pixels)
    return create_loader(
        pictures,
        input_size=(3, run.model.resolution, run.model.resolution),
        batch_size=run.data.global_batch,
        is_training=augment is not None,
        scale=run.augment.crop_scale,
        ratio=run.augment.crop_ratio,
        auto_augment=augment,
        interpolation="bicubic",
        mean=run.augment.mean,
        std=run.augment.std,
        crop_pct=run.augment.eval_crop,
        num_workers=1,
        device=torch.device("cpu"),
        use_prefetcher=False,
    )


def batches(run: Run, dataset: Dataset, augment: str) -> Iterator[tuple[Tensor, Tensor]]:
    """The run's training batches, epoch after epoch, each epoch's incomplete batch left out, as timm does."""
    source, made = loader(run, dataset, "train", augment), 0
    while True:
        for batch in source:
            yield batch
            made += 1
            if made == run.optim.steps:
                return


@torch.no_grad()
def redraw(model: MaxxVit, std: float, bias_K: Tensor) -> None:
    """Give `model` initial weights as `models.coatnet.initialise` would: kernels and tables normal(0, std)."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(0.0, std)
        elif name.endswith(".bias"):
            parameter.zero_()
    head: Any = model.head
    head.fc.bias.copy_(bias_K)


def train(run: Run, dataset: Dataset, case: Case) -> dict[str, nn.Module]:
    """Train from the run's seed; the model and its average."""
    torch.manual_seed(run.seed)
    optim = run.optim
    model = build(run, dataset.classes).to(memory_format=torch.channels_last)
    if case.our_weights:
        redraw(model, spec.get(run.model.name).kernel_std, torch.as_tensor(head_bias(run, dataset)))
    optimizer = create_optimizer_v2(
        model, "adamw", lr=optim.lr, weight_decay=optim.weight_decay, betas=optim.betas, eps=optim.eps
    )
    schedule = PolyLRScheduler(
        optimizer,
        t_initial=optim.steps - optim.warmup_steps,
        power=1.0,
        lr_min=optim.min_lr,
        warmup_t=optim.warmup_steps,
        warmup_lr_init=optim.lr / optim.warmup_steps,
        warmup_prefix=True,
        t_in_epochs=False,
    )
    loss_of = BinaryCrossEntropy(smoothing=optim.label_smoothing, smooth_dense=True, sum_classes=True)
    average = ModelEmaV3(model, decay=optim.ema)
    model.train()
    for step, (images, wanted) in enumerate(batches(run, dataset, case.augment), 1):
        loss = loss_of(model(images.to(memory_format=torch.channels_last)), wanted)
        optimizer.zero_grad()
        loss.backward()
        dispatch_clip_grad(model.parameters(), optim.clip_norm)
        optimizer.step()
        schedule.step_update(step)
        average.update(model, step=step)
        if step % 50 == 0:
            print(f"timm step {step}/{optim.steps}  loss {float(loss.detach()):.4f}", flush=True)
    return {"raw": model, "EMA": average.module}


@torch.no_grad()
def score(model: nn.Module, run: Run, dataset: Dataset) -> tuple[float, float]:
    """(precision@1, mean average precision) on the held-out split."""
    model.eval()
    pairs = [(model(images), wanted) for images, wanted in loader(run, dataset, "heldout", None)]
    logits_NK, positive_NK = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    return precision_and_map(logits_NK, positive_NK > 0)


def precision_and_map(scores_NK: Tensor, positive_NK: Tensor) -> tuple[float, float]:
    """(precision@1, mean average precision over the classes that have a positive), as our own evaluation has them."""
    first = positive_NK.gather(1, scores_NK.argmax(1, keepdim=True)).double().mean()
    present = positive_NK.any(0).nonzero().flatten().tolist()
    each = [average_precision(scores_NK[:, k], positive_NK[:, k]) for k in present]
    return float(first), sum(each) / len(each)


def main(out: str, case: str, words: list[str]) -> None:
    """Train one case and write its scores."""
    torch.set_num_threads(2)  # as many as our two ranks use together
    run = resolve_command("demo-clipart", words)
    dataset = open_dataset(run.data.path)
    scores = {}
    for name, model in train(run, dataset, CASES[case]).items():
        scores[f"precision@1 {name}"], scores[f"mAP {name}"] = score(model, run, dataset)
    Path(out).write_text(json.dumps(scores))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
