"""The server's image path without the server, for whole images from engines and from eager."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import TypeVar

from export.manifest import Manifest
from export.spec import Component
from server.requests import EngineUse, GenerationRequest, ImageFormat, LongPrompt
from server.worker.executor import Components, Executor
from server.worker.images import Pixels
from server.worker.lanes import Pending
from server.worker.prompts import PromptTokenizer
from server.worker.sequences import ImageSequence, make_sequences

Size = tuple[int, int]  # width and height in pixels
T = TypeVar("T")


@dataclass(frozen=True)
class Painted:
    """Pictures, uint8 [H, W, 3], the seconds that each component took for all of them, and the engines they used."""

    pictures: list[Pixels]
    seconds: dict[Component, float]
    uses: frozenset[EngineUse]


class Painter:
    """encode -> denoise -> decode by the server's own executor.

    `tokenizer`: the folder that holds one, if the manifest's checkpoint does not.
    """

    def __init__(
        self,
        manifest: Manifest,
        components: Components,
        device: str,
        *,
        tokenizer: Path | None = None,
        prompt_cache_size: int = 256,
    ) -> None:
        self._executor = Executor(components, manifest, device, prompt_cache_size)
        self._tokenizer = PromptTokenizer(tokenizer or Path(manifest.checkpoint.path))
        self._shift = manifest.checkpoint.shift
        self.after: Callable[[Component], object] = lambda _: None  # called after each component's part
        self.encoded = 0  # prompts that were not in the cache

    def draw(self, prompts: Sequence[str], size: Size, *, steps: int, seed: int = 0, at_once: int = 1) -> Painted:
        """Image i from `seed` + i; up to `at_once` of one shape share a step."""
        sequences = [self._encoded(one_image(prompt, size, steps, seed + i)) for i, prompt in enumerate(prompts)]
        self.after(Component.PROMPT_ENCODER)
        alike = sorted(sequences, key=lambda s: s.shape.captions)
        batches = [batch for _, group in groupby(alike, key=lambda s: s.shape) for batch in batched(group, at_once)]
        for batch in batches:
            self._denoise(batch)
        self.after(Component.DENOISER)
        pictures = [self._executor.decode(sequence).result() for sequence in sequences]
        self.after(Component.IMAGE_DECODER)
        shared = {Component.DENOISER: [batch[0] for batch in batches]}  # all of a batch have waited for the same steps
        uses = frozenset(use for sequence in sequences for use in sequence.engines.values())
        return Painted(pictures, {c: _seconds(shared.get(c, sequences), c) for c in Component}, uses)

    def forget(self) -> None:
        """Empties the prompt cache."""
        self._executor.forget_prompts()

    def backends(self) -> dict[str, str]:
        """Which backend serves each component."""
        return {use.component.value: use.backend.value for use in self._executor.engines()}

    def problem(self) -> str:
        """Why an engine is not the one that was loaded; empty if all are."""
        return "; ".join(use.fallback_reason for use in self._executor.engines() if use.fallback_reason)

    def _encoded(self, request: GenerationRequest) -> ImageSequence:
        ids = self._tokenizer.encode("prompt", request.prompt, LongPrompt.REFUSE)
        (sequence,) = make_sequences(request, (ids,), key=request.seed, shift=self._shift, now=0.0)
        self._executor.encode(sequence).result()
        self.encoded += not sequence.prompt_cached
        return sequence

    def _denoise(self, batch: Sequence[ImageSequence]) -> None:
        steps = [self._step(batch) for _ in range(batch[0].steps)]
        for pending in steps:
            pending.result()

    def _step(self, batch: Sequence[ImageSequence]) -> Pending[float]:
        pending = self._executor.denoise(batch)
        for sequence in batch:
            sequence.step += 1
        return pending


def one_image(prompt: str, size: Size, steps: int, seed: int = 0) -> GenerationRequest:
    """A request with defaults for everything else, except that the image is raw."""
    return GenerationRequest(
        request_id="",
        model="",
        prompt=prompt,
        negative_prompt="",
        width=size[0],
        height=size[1],
        num_inference_steps=steps,
        guidance_scale=0.0,
        seed=seed,
        num_images=1,
        image_format=ImageFormat.RAW,
        quality=90,
        preview_interval=0,
        priority=4,
        long_prompt=LongPrompt.REFUSE,
        timeout=None,
    )


def batched(items: Iterable[T], size: int) -> Iterator[tuple[T, ...]]:
    """`items` in tuples of `size`, the last one possibly shorter."""
    rest = iter(items)
    while batch := tuple(islice(rest, size)):
        yield batch


def _seconds(sequences: Iterable[ImageSequence], component: Component) -> float:
    return sum(sequence.seconds.get(component, 0.0) for sequence in sequences)
