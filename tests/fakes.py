"""Ordinary classes that stand in for devices and engines."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from export.manifest import Backend
from server.engines.base import Shapes
from server.requests import GenerationRequest, ImageFormat, LongPrompt


class FakeClock:
    """A clock that moves only when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class FakeEngine:
    """Answers with what `answer` makes of the inputs, and remembers being closed."""

    answer: Callable[[Mapping[str, Tensor]], Tensor]
    backend: Backend = Backend.ONNXRUNTIME
    accepts: Callable[[Shapes], bool] = lambda shapes: True
    calls: int = 0
    closed: bool = False

    def fits(self, shapes: Shapes) -> bool:
        return self.accepts(shapes)

    def run(self, inputs: Mapping[str, Tensor]) -> Tensor:
        self.calls += 1
        return self.answer(inputs)

    def close(self) -> None:
        self.closed = True


def raising(error: Exception) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """An `answer` that fails."""

    def answer(inputs: Mapping[str, Tensor]) -> Tensor:
        raise error

    return answer


def a_request() -> GenerationRequest:
    """A small valid request, to be varied with `dataclasses.replace`."""
    return GenerationRequest(
        request_id="test",
        model="demo",
        prompt="a red circle",
        negative_prompt="",
        width=64,
        height=64,
        num_inference_steps=2,
        guidance_scale=0.0,
        seed=7,
        num_images=1,
        image_format=ImageFormat.PNG,
        quality=90,
        preview_interval=0,
        priority=4,
        long_prompt=LongPrompt.REFUSE,
        timeout=None,
    )
