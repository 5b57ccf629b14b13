"""The network on a CUDA device: the same function as on the CPU, by every backend."""

import pytest
import torch

from models import coatnet, norm, spec

pytestmark = pytest.mark.gpu


def network(name: str, size: int, attention: str, device: str) -> coatnet.CoAtNet:
    model = coatnet.build(spec.get(name), resolution=size, classes=10, attention=attention)  # type: ignore[arg-type]
    coatnet.initialise(model, 5, device)
    norm.configure(model, group=8)
    return model


def gradients(model: coatnet.CoAtNet, images: torch.Tensor) -> dict[str, torch.Tensor]:
    model.train()
    torch.autograd.backward(model(images).square().mean())
    return {name: value.grad.cpu() for name, value in model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("attention", ["explicit", "sdpa"])
def test_fp32_equals_the_cpu(attention: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    images = torch.randn(16, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    reference = network("coatnet-nano", 64, "explicit", "cpu")
    ours = network("coatnet-nano", 64, attention, "cuda")
    expected = gradients(reference, images)
    found = gradients(ours, images.cuda().to(memory_format=torch.channels_last))
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=2e-3, atol=1e-5), name


@pytest.mark.parametrize("name", ["coatnet0", "coatnet5"])
def test_bf16_step_has_finite_gradients_everywhere(name: str) -> None:
    model = network(name, 224, "auto", "cuda").train()
    images = torch.randn(8, 3, 224, 224, device="cuda").to(memory_format=torch.channels_last)
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(images).float().logsumexp(-1).mean()
    torch.autograd.backward(loss)
    norm.commit(model)
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert torch.isfinite(parameter.grad).all()
    for buffer in model.buffers():
        assert torch.isfinite(buffer).all()


def test_backends_agree_in_bf16_at_224() -> None:
    images = torch.randn(8, 3, 224, 224, device="cuda").to(memory_format=torch.channels_last)
    outputs = []
    for attention in ("explicit", "sdpa"):
        model = network("coatnet0", 224, attention, "cuda").eval()
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            outputs.append(model(images).float())
    scale = outputs[0].abs().max()
    assert (outputs[0] - outputs[1]).abs().max() < 0.05 * scale


@pytest.mark.timeout(600)
def test_compiled_blocks_are_as_near_to_fp32() -> None:
    """In bf16 the gradients of compiled blocks are not farther from fp32's than those of plain blocks."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    images = torch.randn(16, 3, 64, 64, device="cuda").to(memory_format=torch.channels_last)
    exact, plain, compiled = (network("coatnet-nano", 64, "auto", "cuda") for _ in range(3))
    coatnet.compile_blocks(compiled)
    expected = gradients(exact, images)
    with torch.autocast("cuda", torch.bfloat16):
        found = gradients(plain, images), gradients(compiled, images)
    assert set(found[0]) == set(found[1]) == set(expected)
    wrong = [sum(float((one[name] - value).square().sum()) for name, value in expected.items()) for one in found]
    whole = sum(float(value.square().sum()) for value in expected.values())
    assert 0 < wrong[1] < 2 * wrong[0] < 0.1 * whole
