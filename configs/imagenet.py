"""Recipes of the paper on ImageNet-1k and ImageNet-21k (arXiv 2106.04803, table 10).

Costs are estimates: model FLOPs 6 x multiply-adds x images, at the stated share of an H100's 989 TFLOP/s in bf16 and
2.50 USD per GPU-hour.
"""

from configs.schema import Augment, Data, Model, Norm, Optim, Parallel, Run


def coatnet0_in1k_224() -> Run:
    """CoAtNet-0 from scratch on ImageNet-1k at 224 px, 300 epochs.

    Source: table 10, column ImageNet-1k pre-training, first of each entry.
    Expected: 81.6 % top-1 at 224 (table 4); 83.9 % after fine-tuning at 384.
    Hardware, time, cost (estimate, 20 % of peak): 8 H100, 2 hours, 35 USD, when the loaders keep up.
    Command: `coatnet train coatnet0-in1k-224 --data.path SHARDS`
    """
    return Run(
        recipe="coatnet0-in1k-224",
        model=Model(name="coatnet0", resolution=224, drop_path=0.2),
        norm=Norm(replica_batch=256),
        data=Data(path="data/in1k", global_batch=4096),
        augment=Augment(randaugment_layers=2, randaugment_magnitude=15.0, mixup_alpha=0.8),
        optim=Optim(
            loss="softmax",
            label_smoothing=0.1,
            epochs=300.0,
            lr=1e-3,
            min_lr=1e-5,
            schedule="cosine",
            warmup_steps=10_000,
            weight_decay=0.05,
            clip_norm=1.0,
        ),
        parallel=Parallel(zero=1, recompute="none"),  # 25M parameters: nothing to shard but the optimizer's state
    )


def coatnet4_in21k_224() -> Run:
    """CoAtNet-4 pre-trained on ImageNet-21k at 224 px, 90 epochs, with RandAugment.

    Source: table 10, column ImageNet-21k pre-training, third of each entry. Its RandAugment 2, 5 is the row "PT-RA";
    the plain row has none (`--augment.randaugment-layers 0`), the row "E150" more epochs (`--optim.epochs 150`).
    Expected: ImageNet-1k top-1 after fine-tuning 88.3 % at 384, 88.4 % at 512; plain 87.9, 88.1; E150 88.4, 88.56.
    Hardware, time, cost (estimate, 30 % of peak): 64 H100, 6 hours, 1,000 USD.
    Command: `coatnet train coatnet4-in21k-224 --data.path SHARDS`
    """
    return Run(
        recipe="coatnet4-in21k-224",
        model=Model(name="coatnet4", resolution=224, drop_path=0.7),
        norm=Norm(replica_batch=256),
        data=Data(path="data/in21k", global_batch=4096),
        augment=Augment(randaugment_layers=2, randaugment_magnitude=5.0),
        optim=Optim(
            loss="sigmoid",
            label_smoothing=1e-4,
            epochs=90.0,
            lr=1e-3,
            min_lr=1e-5,
            schedule="linear",
            warmup_steps=0,
            warmup_epochs=5.0,
            weight_decay=0.01,
            clip_norm=1.0,
        ),
        parallel=Parallel(zero=3, recompute="full"),
    )
