"""Runs a TensorRT plan for checking: plainly, one call after another. The server's engine is the fast one."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from export.errors import BuildError
from export.manifest import Backend
from export.plans import Foreign, OpenPlan
from export.spec import ComponentSpec


class PlanRunner:
    """A plan on the current CUDA device, with the kernels that the server runs."""

    def __init__(self, trt: Foreign, path: Path, spec: ComponentSpec, backend: Backend) -> None:
        self._plan = OpenPlan(trt, path, spec, backend)
        self._contexts: dict[int, Foreign] = {}  # one per profile
        self._spec = spec

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        profile = self._profile(inputs)
        if profile not in self._contexts:
            self._contexts[profile] = self._plan.context_in(profile)
        context = self._contexts[profile]
        held = {name: tensor.contiguous() for name, tensor in inputs.items()}
        output = self._plan.bind(context, self._spec, held)
        scratch = torch.empty(self._plan.memory_needed(context), dtype=torch.uint8, device="cuda")
        context.set_device_memory(scratch.data_ptr(), scratch.numel())
        self._plan.execute(context)
        torch.cuda.synchronize()
        return output

    def _profile(self, inputs: Mapping[str, Tensor]) -> int:
        engine = self._plan.engine
        for index in range(engine.num_optimization_profiles):
            bounds = {name: engine.get_tensor_profile_shape(name, index) for name in inputs}
            if all(_within(tuple(t.shape), bounds[name]) for name, t in inputs.items()):
                return index
        raise BuildError(f"no profile of {self._spec.component} takes {[tuple(t.shape) for t in inputs.values()]}")


def _within(shape: tuple[int, ...], bounds: Foreign) -> bool:
    low, _, high = bounds
    return all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True))
