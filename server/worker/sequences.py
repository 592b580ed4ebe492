"""The images that a worker draws: one sequence of steps each, and its state on the device."""

from dataclasses import dataclass, field

from torch import Tensor

from export.spec import Component
from server.requests import EngineUse, GenerationRequest
from server.turns import Claim
from server.worker.batching import StepShape
from server.worker.planner import PlannedSequence
from server.worker.prompts import TokenIds, padded_length
from server.worker.sampler import sigma_schedule


@dataclass(eq=False, kw_only=True)
class ImageSequence(PlannedSequence):
    """One image being denoised: the planner's view of it, and its state on the device."""

    request: GenerationRequest
    image_index: int
    prompts: tuple[TokenIds, ...]  # the prompt's, and for guidance the negative prompt's
    sigmas: tuple[float, ...]
    latents: Tensor | None = None  # fp32 [1, C, h, w]
    captions: tuple[Tensor, ...] = ()  # fp32 [1, T, dim], one per prompt
    schedule: Tensor | None = None  # fp32 [3, steps]: every step's time, its change of sigma, and the guidance
    velocity: Tensor | None = None  # of the last step begun, for previews
    prompt_cached: bool = False  # the prompt's own encoding was in the cache
    encoded: int = 0  # prompts that had to be encoded, including the negative one
    restarted: bool = False  # once, because its result was not finite
    starved: bool = False  # it has run out of memory once while alone in its plan
    engines: dict[Component, EngineUse] = field(default_factory=dict)
    seconds: dict[Component, float] = field(default_factory=dict)

    @property
    def seed(self) -> int:
        """Image i of a request uses the request's seed + i."""
        return self.request.seed + self.image_index


def make_sequences(
    request: GenerationRequest,
    prompts: tuple[TokenIds, ...],
    *,
    key: int,
    shift: float,
    now: float,
    delivery: float = 0.0,
) -> tuple[ImageSequence, ...]:
    """The sequences of all images of `request`, which reached this worker at `now`.

    They are due `delivery` seconds before the request is.
    """
    due = None if request.timeout is None else now + request.timeout - delivery
    claim = Claim(request.priority, now - request.waited, due, request.delayed)
    return tuple(_sequence(request, i, prompts, key, shift, claim) for i in range(request.num_images))


def _sequence(
    request: GenerationRequest,
    image_index: int,
    prompts: tuple[TokenIds, ...],
    key: int,
    shift: float,
    claim: Claim,
) -> ImageSequence:
    return ImageSequence(
        key=key,
        shape=StepShape(request.height, request.width, tuple(map(padded_length, prompts))),
        steps=request.num_inference_steps,
        claim=claim,
        request=request,
        image_index=image_index,
        prompts=prompts,
        sigmas=sigma_schedule(request.num_inference_steps, shift),
    )
