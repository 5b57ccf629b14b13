"""Recipes of the paper on JFT (arXiv 2106.04803, tables 5 and 10): pictures with many labels each.

JFT is Google's own; any set of shards with multi-label samples takes its place. Costs are estimates: model FLOPs
6 x multiply-adds x images, at 30 % of an H100's 989 TFLOP/s in bf16 and 2.50 USD per GPU-hour.
"""

from dataclasses import replace

from configs.schema import Augment, Data, Model, Norm, Optim, Parallel, Run


def coatnet5_jft300m_224() -> Run:
    """CoAtNet-5 pre-trained on JFT-300M at 224 px, 14 epochs.

    Source: table 10, column JFT-300M pre-training, third of each entry (no stochastic depth).
    Expected: ImageNet-1k top-1 89.77 % after fine-tuning at 512 (table 5), for 1,820 TPUv3-core-days.
    Hardware, time, cost (estimate): 128 H100, 26 hours, 8,500 USD.
    Command: `coatnet train coatnet5-jft300m-224 --data.path SHARDS`
    """
    return Run(
        recipe="coatnet5-jft300m-224",
        model=Model(name="coatnet5", resolution=224, drop_path=0.0),
        norm=Norm(replica_batch=256),
        data=Data(path="data/jft300m", global_batch=4096),
        augment=Augment(randaugment_layers=2, randaugment_magnitude=5.0),
        optim=Optim(
            loss="sigmoid",
            label_smoothing=1e-4,
            epochs=14.0,
            lr=5e-4,
            min_lr=1e-5,
            schedule="linear",
            warmup_steps=20_000,
            weight_decay=0.01,
            clip_norm=1.0,
        ),
        parallel=Parallel(zero=3, recompute="full"),
    )


def coatnet7_jft3b_224() -> Run:
    """CoAtNet-7 pre-trained on JFT-3B at 224 px: the result is published, the recipe is not.

    Source: none. The paper publishes no hyper-parameters for JFT-3B, so this starts from CoAtNet-5's on JFT-300M,
    the 14 epochs included. The published cost would pay for about 4 epochs at 30 % of a TPUv3's peak
    (`--optim.epochs 4`).
    Expected: ImageNet-1k top-1 90.88 % after fine-tuning at 512 (table 5), for 20,100 TPUv3-core-days.
    Hardware, time, cost (estimate, of 14 epochs): 512 H100, 9 days, 270,000 USD; 4 epochs 2.5 days, 77,000 USD.
    Command: `coatnet train coatnet7-jft3b-224 --data.path SHARDS`
    """
    base = coatnet5_jft300m_224()
    return replace(
        base,
        recipe="coatnet7-jft3b-224",
        model=replace(base.model, name="coatnet7"),
        data=replace(base.data, path="data/jft3b"),
    )
