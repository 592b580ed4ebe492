"""The denoiser's forward and backward as CUDA graphs: up to 512x512 launching the kernels takes longer than they do."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from demo.training.forward import denoise

Forward = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Replay:
    """`denoise` of one denoiser, recorded at the first use of each shape on a GPU and replayed from then on.

    The denoiser's parameters have to stay where they are in memory: change them in place.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        self.denoiser = denoiser
        self.recorded: dict[tuple[object, ...], Forward] = {}
        # The graphs of one shape are done before another's begin, so all of them use the same memory.
        self.pool: Any = torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None

    def __call__(self, latents: Tensor, sigma: Tensor, caption: Tensor, lengths: Tensor) -> Tensor:
        if not latents.is_cuda:
            return denoise(self.denoiser, latents, sigma, caption, lengths)
        key = (latents.shape, caption.shape, caption.requires_grad)
        if key not in self.recorded:
            self.recorded[key] = self._record(latents, sigma, caption, lengths)
        return self.recorded[key](latents, sigma, caption, lengths)

    def _record(self, *inputs: Tensor) -> Forward:
        samples = tuple(t.detach().clone().requires_grad_(t.requires_grad) for t in inputs)
        # The padding token of images is unused where none is padded.
        recorded: Any = torch.cuda.make_graphed_callables(
            _Denoise(self.denoiser), samples, allow_unused_input=True, pool=self.pool
        )
        torch.cuda.empty_cache()  # what recording took on a stream of its own
        forward: Forward = recorded
        return forward


class _Denoise(nn.Module):
    """`denoise` as a module, from which the recorder learns which parameters want gradients."""

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, latents: Tensor, sigma: Tensor, caption: Tensor, lengths: Tensor) -> Tensor:
        return denoise(self.denoiser, latents, sigma, caption, lengths)
