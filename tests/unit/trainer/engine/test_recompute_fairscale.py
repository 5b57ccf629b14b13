"""fairscale's checkpoint wrapper beside ours: the same numbers, and refusals where it cannot work."""

import gc
import importlib.util
import re
import sys
import warnings
import weakref
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from configs import resolve
from configs.errors import InputError
from configs.schema import Parallel, Run
from models import coatnet, drop_path, norm, spec
from models.coatnet import CoAtNet
from trainer.bench.held_bytes import held_bytes
from trainer.commands.train import check_before_start
from trainer.engine.recompute import run_block

with_fairscale = pytest.mark.skipif(
    importlib.util.find_spec("fairscale") is None,
    reason="NOT COMPARED WITH FAIRSCALE: it is not installed; pip install fairscale==0.4.13",
)


def made() -> CoAtNet:
    model = coatnet.build(spec.get("coatnet-nano"), resolution=64, classes=10, drop_path=0.5)
    coatnet.initialise(model, 0, "cpu")
    norm.configure(model, group=4)
    return model.train().to(memory_format=torch.channels_last)


def trained(model: CoAtNet, bf16: bool, *how: str | bool) -> dict[str, Tensor]:
    """Loss, gradients and statistics of one step of two passes."""
    found: dict[str, Tensor] = {}
    run = run_block(*how) if how else None  # type: ignore[arg-type]
    for number in range(2):
        x = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(number))
        drop = drop_path.scales(torch.arange(8) + 8 * number, model.drop_rates)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=False):
            logits = model(x.to(memory_format=torch.channels_last), drop, run)
        loss = logits.float().square().mean()
        torch.autograd.backward(loss)
        found[f"loss {number}"] = loss.detach()
    found |= {name: buffer.clone() for name, buffer in model.named_buffers()}
    norm.commit(model)
    found |= {f"committed {name}": buffer for name, buffer in model.named_buffers()}
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert None not in gradients.values()
    return found | {f"gradient {name}": value for name, value in gradients.items() if value is not None}


@with_fairscale
@pytest.mark.parametrize("offload", [False, True], ids=["here", "offloaded"])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_fairscale_and_ours_are_equal(bf16: bool, offload: bool) -> None:
    ours = trained(made(), bf16, "full")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs = trained(made(), bf16, "full", "fairscale", offload)
    plain = trained(made(), bf16)
    assert ours.keys() == theirs.keys() == plain.keys()
    assert ours["blocks.s1.0.norm_in.pending"][-1] == 4  # two passes of two groups, each counted once
    assert ours["gradient blocks.s0.0.conv1.weight"].abs().sum() > 0
    for name, value in ours.items():
        assert torch.equal(theirs[name], value), name
        assert torch.equal(plain[name], value), name


@with_fairscale
def test_fairscale_keeps_the_inputs_only_and_no_block_alive() -> None:
    model = made()
    plain, ours, theirs = (
        held_bytes(model, 4, run) for run in (None, run_block("full"), run_block("full", "fairscale"))
    )
    assert sum(theirs.values()) < sum(plain.values()) / 4
    assert sum(theirs.values()) == pytest.approx(sum(ours.values()), rel=0.02)
    trained(model, False, "full", "fairscale")
    assert "forward" not in model.flat[0][1].__dict__  # the block itself is not wrapped
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


@with_fairscale
def test_evaluation_under_fairscale_is_plain() -> None:
    model = made().eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(x, None, run_block("full", "fairscale")), model(x))
    assert not any(layer.pending.any() for layer in model.modules() if isinstance(layer, norm.BatchNorm))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (("selective", "fairscale"), "parallel.recompute = 'selective': fairscale wraps whole blocks; nearest valid"),
        (("none", "fairscale"), "parallel.recompute = 'none': fairscale wraps whole blocks; nearest valid: 'full'"),
        (("full", "own", True), "parallel.recompute_offload = True: only fairscale's wrapper"),
    ],
)
def test_what_a_wrapper_cannot_do_is_refused(how: tuple[str, str], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        run_block(*how)


@pytest.mark.parametrize(
    ("parallel", "nearest"),
    [
        (Parallel(recompute="selective", recompute_impl="fairscale"), "nearest valid: parallel.recompute full"),
        (Parallel(recompute="none", recompute_impl="fairscale"), "nearest valid: parallel.recompute full"),
        (Parallel(zero=2, pipeline=2, recompute_impl="fairscale"), "nearest valid: parallel.recompute_impl own"),
        (Parallel(recompute="full", recompute_offload=True), "nearest valid: parallel.recompute_impl fairscale"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(parallel: Parallel, nearest: str) -> None:
    with pytest.raises(InputError, match=re.escape(nearest)):
        resolve.check(Run(parallel=parallel))
    resolve.check(Run(parallel=replace(parallel, recompute="full", recompute_impl="fairscale", pipeline=1)))


@pytest.mark.parametrize("field", ["recompute_impl", "partition_impl"])
def test_a_missing_fairscale_is_named_before_the_launch(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fairscale", None)
    demo = resolve.load("demo-digits")
    run = replace(demo, parallel=replace(demo.parallel, **{field: "fairscale"}))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=rf"parallel\.{field} = 'fairscale': the package is missing; pip install"):
        check_before_start(run, 1)


def test_a_missing_fairscale_is_named_by_the_wrapper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fairscale", None)
    with pytest.raises(InputError, match=re.escape("pip install -e '.[fairscale]'; nearest valid: 'own'")):
        run_block("full", "fairscale")
