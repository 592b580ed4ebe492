"""Training on a GPU: a step replayed from a CUDA graph computes what the same step computes without one."""

import pytest
import torch

from demo.training.forward import denoise
from demo.training.models import make_denoiser
from demo.training.replay import Replay

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.mark.parametrize("learns", [True, False])
def test_replayed_gradients_are_those_of_the_plain_step(learns: bool) -> None:
    torch.manual_seed(0)
    denoiser = make_denoiser().cuda()
    replay = Replay(denoiser)
    for size in ((16, 16), (18, 32), (16, 16)):
        latents = torch.randn(4, 16, *size, device="cuda")
        caption = torch.randn(4, 64, 192, device="cuda", dtype=torch.bfloat16, requires_grad=learns)
        sigma, lengths = torch.rand(4, device="cuda"), torch.tensor([64, 40, 50, 33], device="cuda")
        outcomes = []
        for forward in (lambda *inputs: denoise(denoiser, *inputs), replay):
            output = forward(latents, sigma, caption, lengths)
            torch.autograd.backward(output.square().mean())
            gradients = [p.grad.clone() for p in denoiser.parameters() if p.grad is not None]
            gradients += [caption.grad.float().clone()] if caption.grad is not None else []
            outcomes.append([output.detach().clone(), *gradients])
            caption.grad = None
            del output  # else it keeps nodes of the stream it ran on, which recording must not meet
            for parameter in denoiser.parameters():
                parameter.grad = None
        plain, replayed = outcomes
        assert len(plain) == len(replayed)
        for a, b in zip(plain, replayed, strict=True):
            assert (a - b).norm() <= 2e-2 * a.norm() + 1e-6
