"""The server's own image path over one backend's engines, as a row: encode -> denoise -> decode."""

from collections.abc import Callable
from dataclasses import replace

from benchmarks.choice import pixels
from benchmarks.diffusers_row import Pixels
from benchmarks.simulation import a_request
from benchmarks.subject import Subject
from export.spec import Component
from server.requests import LongPrompt
from server.worker.executor import Executor, ImageSequence, make_sequences
from server.worker.prompts import PromptTokenizer


class EngineRow:
    """The server's executor over one backend's engines."""

    def __init__(self, subject: Subject, backend: str) -> None:
        # A cache of one: the images of a call share the prompt's encoding, as in the server, and calls do not.
        self.executor = Executor(subject.served(backend), subject.manifest, str(subject.device), prompt_cache_size=1)
        self._engines = subject.engines[backend]
        self._tokenizer = PromptTokenizer(subject.tokenizer)
        self.after: Callable[[Component], object] = lambda _: None  # called after each component's part
        self._shift = subject.manifest.checkpoint.shift

    @property
    def calls(self) -> dict[Component, int]:
        """How often each engine has run."""
        return {component: engine.calls for component, engine in self._engines.items()}

    def draw(self, prompts: list[str], *, size: str, steps: int, seed: int) -> tuple[list[Pixels], dict[str, float]]:
        """One image a prompt, all of them the same one, as `DiffusersRow.draw`."""
        width, height = pixels(size)
        ids = self._tokenizer.encode("prompt", prompts[0], LongPrompt.REFUSE)
        request = replace(a_request(width, height), prompt=prompts[0], num_inference_steps=steps)
        images = [replace(request, seed=seed + image) for image in range(len(prompts))]
        sequences = [s for r in images for s in make_sequences(r, (ids,), key=0, shift=self._shift, now=0.0)]
        for sequence in sequences:
            self.executor.encode(sequence).result()
        self.after(Component.PROMPT_ENCODER)
        for step in range(steps):
            for sequence in sequences:
                sequence.step = step
            self.executor.denoise(sequences)
        self.after(Component.DENOISER)
        drawn = [self.executor.decode(sequence).result() for sequence in sequences]
        self.after(Component.IMAGE_DECODER)
        return drawn, {c: self._milliseconds(sequences, c) for c in Component}

    def _milliseconds(self, sequences: list[ImageSequence], component: Component) -> float:
        seconds = [sequence.seconds.get(component, 0.0) for sequence in sequences]
        return 1e3 * (seconds[0] if component is Component.DENOISER else sum(seconds))  # each waited for shared steps
