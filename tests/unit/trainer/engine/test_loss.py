"""Losses against torch's own."""

import torch
import torch.nn.functional as F

from trainer.engine.loss import loss_function


def test_softmax_equals_cross_entropy_with_smoothing() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 10), torch.randint(10, (6,))
    soft = F.one_hot(labels, 10) * 0.9 + 0.1 / 10
    ours = loss_function("softmax")(logits, soft)
    torch.testing.assert_close(ours, F.cross_entropy(logits, labels, label_smoothing=0.1))


def test_sigmoid_sums_over_classes() -> None:
    torch.manual_seed(0)
    logits, wanted = torch.randn(6, 10), torch.randint(2, (6, 10)).float()
    ours = loss_function("sigmoid")(logits, wanted)
    torch.testing.assert_close(ours, 10 * F.binary_cross_entropy_with_logits(logits, wanted))
