"""diffusers' pipeline as a row: called as its users call it, eager or compiled, forwards counted and stages timed."""

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.choice import COMPILED, DIFFUSERS
from benchmarks.timing import Stages
from export.spec import Component, pixels
from server.worker.images import Pixels

if TYPE_CHECKING:
    from diffusers import ZImagePipeline

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def compiled(pipeline: "ZImagePipeline") -> "ZImagePipeline":
    """The same pipeline and weights with transformer and VAE under `torch.compile`; the prompt encoder stays eager.

    To be called before a row watches `pipeline`. From here on it is torch's error if it gave up compiling, having
    compiled too many shapes, instead of going on eagerly.
    """
    import torch._dynamo

    torch._dynamo.config.fail_on_recompile_limit_hit = True
    parts = {"transformer": _compiled(pipeline.transformer, "forward"), "vae": _compiled(pipeline.vae, "decode")}
    made = type(pipeline)(**{**pipeline.components, **parts})
    made.set_progress_bar_config(disable=True)
    return made


def _compiled(module: "ModuleT", method: str) -> "ModuleT":
    """A copy that shares the weights: `module` itself stays eager."""
    copied = copy.copy(module)
    setattr(copied, method, torch.compile(getattr(copied, method)))
    return copied


def rows(pipeline: "ZImagePipeline", device: torch.device, names: Iterable[str]) -> "dict[str, DiffusersRow]":
    """The row of `pipeline`, and if it is among `names` the compiled one, by name."""
    faster = {COMPILED: DiffusersRow(compiled(pipeline), device)} if COMPILED in names else {}
    return {DIFFUSERS: DiffusersRow(pipeline, device), **faster}


class DiffusersRow:
    """The pipeline; `calls` counts how often the model of each component has run."""

    def __init__(self, pipeline: "ZImagePipeline", device: torch.device) -> None:
        self._pipeline, self._device = pipeline, device
        self.calls: Counter[Component] = Counter()
        self.after: Callable[[Component], object] = lambda _: None  # called after each component's model has run
        self._stages = Stages(device)
        self._watch(Component.PROMPT_ENCODER, pipeline, "encode_prompt")
        self._watch(Component.DENOISER, pipeline.transformer, "forward")
        self._watch(Component.IMAGE_DECODER, pipeline.vae, "decode")

    def _watch(self, component: Component, owner: object, name: str) -> None:
        """Counts and times what the pipeline calls; this project's modules share the weights but call none of these."""
        original = getattr(owner, name)

        def watched(*arguments: object, **options: object) -> object:
            self.calls[component] += 1
            with self._stages.stage(component):
                output = original(*arguments, **options)
            self.after(component)
            return output

        setattr(owner, name, watched)

    def component(self, component: Component, inputs: Mapping[str, Tensor], prompts: list[str]) -> Callable[[], Tensor]:
        """The pipeline's counterpart of `component` for `prompts`, on the inputs of this project's component."""
        match component:
            case Component.PROMPT_ENCODER:
                return lambda: torch.cat(self._embeddings(prompts))
            case Component.DENOISER:
                return self.velocity(inputs, self._embeddings(prompts))
            case Component.IMAGE_DECODER:
                return lambda: self._image(inputs["latents"])

    @staticmethod
    def calls_of(images: int, steps: int) -> dict[Component, int]:
        """The calls that one `draw` makes: the images share all of them."""
        return {Component.PROMPT_ENCODER: 1, Component.DENOISER: steps, Component.IMAGE_DECODER: 1}

    def draw(self, prompts: list[str], *, size: str, steps: int, seed: int) -> tuple[list[Pixels], dict[str, float]]:
        """An image per prompt, uint8 [H, W, 3], from seed, seed + 1 ...; and milliseconds by component."""
        width, height = pixels(size)
        self._stages = Stages(self._device)
        images = self._pipeline(
            prompt=list(prompts),  # the pipeline writes into the list
            height=height,
            width=width,
            num_inference_steps=steps,
            guidance_scale=0.0,
            generator=[torch.Generator("cpu").manual_seed(seed + image) for image in range(len(prompts))],
            output_type="np",
        ).images
        return [(image * 255).round().astype(np.uint8) for image in images], self._stages.milliseconds()

    def _embeddings(self, prompts: list[str]) -> list[Tensor]:
        with torch.inference_mode():
            made, _ = self._pipeline.encode_prompt(list(prompts), self._device, do_classifier_free_guidance=False)
        return list(made)

    def velocity(self, inputs: Mapping[str, Tensor], embeddings: Sequence[Tensor]) -> Callable[[], Tensor]:
        """Calls the transformer as the pipeline's loop does, and negates the output as there."""
        transformer = self._pipeline.transformer
        latents = list(inputs["latents"].to(transformer.dtype).unsqueeze(2).unbind(0))

        def call() -> Tensor:
            with torch.inference_mode():
                output = transformer(latents, inputs["timestep"], list(embeddings), return_dict=False)[0]
                return -torch.stack(list(output)).squeeze(2).float()

        return call

    def _image(self, latents: Tensor) -> Tensor:
        """Decodes as the pipeline does at its end; in grey levels."""
        vae = self._pipeline.vae
        with torch.inference_mode():
            scaled = latents.to(vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
            image: Tensor = vae.decode(scaled, return_dict=False)[0]
            shown = self._pipeline.image_processor.postprocess(image, output_type="pt")
        levels: Tensor = (shown.permute(0, 2, 3, 1) * 255).round()
        return levels
