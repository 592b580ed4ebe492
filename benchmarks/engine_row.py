"""The server's own image path over one backend's engines, as a row: encode -> denoise -> decode."""

from collections.abc import Callable

from benchmarks.subject import Subject
from export.spec import Component, pixels
from server.worker.images import Pixels
from verify.painter import Painter


class EngineRow:
    """The server's executor over one backend's engines."""

    def __init__(self, subject: Subject, backend: str) -> None:
        self._painter = Painter(
            subject.manifest,
            subject.served(backend),
            str(subject.device),
            tokenizer=subject.tokenizer,
            prompt_cache_size=0,  # diffusers has none
        )
        self._engines = subject.engines[backend]
        self.after: Callable[[Component], object] = lambda _: None  # called after each component's part
        self._painter.after = self._tell

    @property
    def calls(self) -> dict[Component, int]:
        """How often each engine has run."""
        return {component: engine.calls for component, engine in self._engines.items()}

    @staticmethod
    def calls_of(images: int, steps: int) -> dict[Component, int]:
        """The calls that one `draw` makes: like the server, prompts and images one at a time, steps together."""
        return {Component.PROMPT_ENCODER: images, Component.DENOISER: steps, Component.IMAGE_DECODER: images}

    @property
    def backends(self) -> dict[str, str]:
        """Which backend serves each component."""
        return self._painter.backends()

    def _tell(self, component: Component) -> None:
        self.after(component)

    def draw(self, prompts: list[str], *, size: str, steps: int, seed: int) -> tuple[list[Pixels], dict[str, float]]:
        """One image per prompt, as `DiffusersRow.draw`; prompts of one padded length share each step."""
        painted = self._painter.draw(prompts, pixels(size), steps=steps, seed=seed, at_once=len(prompts))
        return painted.pictures, {c: 1e3 * seconds for c, seconds in painted.seconds.items()}
