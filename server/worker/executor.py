"""Runs the three components on the device: encode -> denoise -> decode. One thread calls it.

Work is started and its result collected later: where the device can (see `lanes`), encoding and decoding run beside the
steps, and a step is submitted before the previous one is done.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from export.manifest import Backend, Manifest
from export.spec import Component
from server.engines.served import ServedComponent
from server.errors import NonFiniteError
from server.requests import EngineUse
from server.worker.images import Pixels
from server.worker.lanes import Pending, lanes, together
from server.worker.prompts import PromptCache, TokenIds, padded_length
from server.worker.sampler import euler_step, initial_noise, timestep
from server.worker.sequences import ImageSequence

PAD_TOKEN = 0  # any id works: causal attention never looks ahead, and the learned pad token replaces the result

Components = dict[Component, ServedComponent]
Output = tuple[Tensor, EngineUse]  # of one call of a component, and the engine that made it


class Executor:
    """The components on their device, and the prompts they have encoded."""

    def __init__(self, components: Components, manifest: Manifest, device: str, prompt_cache_size: int) -> None:
        self._components = components
        self._channels = manifest.checkpoint.dimensions.latent_channels
        self._device = torch.device(device)
        self._lanes = lanes(self._device)
        self._cache = PromptCache[Pending[Output]](prompt_cache_size)
        self._preview_weight = torch.tensor(manifest.preview.weight, device=self._device)
        self._preview_bias = torch.tensor(manifest.preview.bias, device=self._device)
        self._stepped = 0.0  # when the last step was seen done

    def engines(self) -> tuple[EngineUse, ...]:
        """The engine in use of every component."""
        return tuple(self._components[c].use for c in Component)

    def encode(self, sequence: ImageSequence) -> Pending[None]:
        """Fills in the captions, from the cache where it has them, and the starting noise."""
        started = time.perf_counter()
        sequence.prompt_cached = sequence.prompts[0] in self._cache
        sequence.encoded = len({ids for ids in sequence.prompts if ids not in self._cache})
        pending = [self._caption(ids) for ids in sequence.prompts]
        self.reset(sequence)  # the host draws the noise while the device encodes

        def finish(captions: list[Output]) -> None:
            sequence.captions = tuple(caption for caption, _ in captions)
            sequence.engines[Component.PROMPT_ENCODER] = captions[-1][1]
            if sequence.encoded:
                _charge(sequence, Component.PROMPT_ENCODER, time.perf_counter() - started)

        return together(pending, finish)

    def reset(self, sequence: ImageSequence) -> None:
        """Puts the sequence back to its noise."""
        request = sequence.request
        noise = initial_noise(sequence.seed, height=request.height, width=request.width, channels=self._channels)
        # Both are made before either is kept: if memory ran out in between, noise would be taken for denoised latents.
        latents = noise.to(self._device)
        schedule = _schedule(sequence.sigmas, request.guidance_scale).to(self._device)
        sequence.latents, sequence.schedule, sequence.velocity = latents, schedule, None

    def denoise(self, sequences: Sequence[ImageSequence]) -> Pending[float]:
        """Advances each of `sequences`, all of one shape, by one step of its own schedule.

        Their next step may be started before this one is done. The result is the seconds that the device took for it.
        """
        started = time.perf_counter()

        def work() -> Callable[[], float]:
            inputs = [s.latents for s in sequences]
            self._step(sequences)
            return lambda: self._charge_step(sequences, started, inputs)

        return self._lanes[Component.DENOISER].start(work)

    def decode(self, sequence: ImageSequence) -> Pending[Pixels]:
        """The finished image, uint8 [H, W, 3] in host memory.

        Raises, when its result is asked for:
            NonFiniteError: the denoiser's result is not finite; the sequence has to be restarted, on eager.
        """
        return self._lanes[Component.IMAGE_DECODER].start(lambda: self._decode(sequence))

    def preview(self, sequence: ImageSequence, step: int) -> Pending[Pixels]:
        """The image as predicted after `step` steps, the last one begun: uint8 [H / 8, W / 8, 3].

        Made by a linear map from the latents.
        """

        def work() -> Callable[[], Pixels]:
            assert sequence.velocity is not None, "a preview needs a step"
            clean = _latents(sequence) - sequence.sigmas[step] * sequence.velocity
            colours = clean[0].permute(1, 2, 0) @ self._preview_weight + self._preview_bias
            return _to_host(colours.clamp(0, 255).round().to(torch.uint8)).numpy

        return self._lanes[Component.DENOISER].start(work)

    def quarantine(self, component: Component, reason: str) -> None:
        """Moves `component` to eager, if it is not there already. What a bad prompt encoder encoded is forgotten."""
        if not self._components[component].compiled:
            return
        self._components[component].quarantine(reason)
        if component is Component.PROMPT_ENCODER:
            self._cache.clear()

    def usable(self) -> bool:
        """False if an error has left the device in a state that only a new process can mend, as CUDA's errors may."""
        if self._device.type == "cuda":
            try:
                torch.cuda.synchronize(self._device)
            except RuntimeError:
                return False
        return True

    def forget_prompts(self) -> None:
        """Empties the prompt cache."""
        self._cache.clear()

    def free_memory(self) -> None:
        """Frees what can be made again, and what engines can do without, because memory is short."""
        self.forget_prompts()
        for component in self._components.values():
            component.free_memory()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def keep_kernels(self) -> None:
        """Has the engines keep for the next start what they have compiled."""
        for component in self._components.values():
            component.keep_kernels()

    def run(self, component: Component, inputs: dict[str, Tensor]) -> Tensor:
        """Runs one call of a component and waits for it; for warm-up."""
        on_device = {name: t.to(self._device) for name, t in inputs.items()}
        output, _ = self._run(component, on_device)
        return output

    def _run(self, component: Component, inputs: dict[str, Tensor]) -> Output:
        def work() -> Callable[[], Output]:
            made = self._components[component].run(inputs)
            return lambda: made

        return self._lanes[component].start(work).result()

    def _step(self, sequences: Sequence[ImageSequence]) -> None:
        latents = torch.cat([_latents(s) for s in sequences])
        times, change, guidance = torch.cat([_now(s) for s in sequences], dim=1)
        velocity = self._velocity(sequences, latents, times, guidance)
        moved = euler_step(latents, velocity, change)
        for row, sequence in enumerate(sequences):
            sequence.latents, sequence.velocity = moved[row : row + 1], velocity[row : row + 1]

    def _charge_step(self, sequences: Sequence[ImageSequence], started: float, inputs: object) -> float:
        """Charges a finished step, which may have waited for the one before. `inputs` are held until here."""
        started, self._stepped = max(started, self._stepped), time.perf_counter()
        seconds, images = self._stepped - started, Counter(s.key for s in sequences)
        for sequence in sequences:  # split among a request's images, which waited for it together
            _charge(sequence, Component.DENOISER, seconds / images[sequence.key])
        return seconds

    def _caption(self, ids: TokenIds) -> Pending[Output]:
        """The caption of `ids`; several sequences may wait for the same one."""
        caption = self._cache.get(ids)
        if caption is None:
            inputs = self._prompt(ids)  # made before the lane's work: a copy to the device waits for its stream
            caption = self._lanes[Component.PROMPT_ENCODER].start(lambda: self._encode(inputs))
            self._cache.put(ids, caption)
        return caption

    def _prompt(self, ids: TokenIds) -> dict[str, Tensor]:
        padding = [PAD_TOKEN] * (padded_length(ids) - len(ids))
        return {
            "input_ids": torch.tensor([[*ids, *padding]], device=self._device),
            "caption_length": torch.tensor([len(ids)], device=self._device),
        }

    def _encode(self, inputs: dict[str, Tensor]) -> Callable[[], Output]:
        output, use = self._components[Component.PROMPT_ENCODER].run(inputs)
        good = _to_host(_is_finite(output))
        return lambda: (output, use) if good else self._again(output, use, inputs)

    def _decode(self, sequence: ImageSequence) -> Callable[[], Pixels]:
        started = time.perf_counter()
        inputs = {"latents": _latents(sequence)}
        # Checked once per image, where a copy to the host is due anyway: NaN never goes away on the way here.
        finite = _to_host(_is_finite(inputs["latents"]))
        output, use = self._components[Component.IMAGE_DECODER].run(inputs)
        # Engines return colour planes; interleaving 1024x1024 pixels for encoding would take the host 7 ms.
        image, good = _to_host(output.contiguous()), _to_host(_is_picture(output))

        def finish() -> Pixels:
            if not finite:
                raise NonFiniteError("the denoiser's output is not finite")
            made, by = (image, use) if good else self._again(image, use, inputs)
            sequence.engines[Component.IMAGE_DECODER] = by
            _charge(sequence, Component.IMAGE_DECODER, time.perf_counter() - started)
            pixels: Pixels = made[0].contiguous().cpu().numpy()
            return pixels

        return finish

    def _again(self, output: Tensor, use: EngineUse, inputs: dict[str, Tensor]) -> Output:
        """Repeats the call on eager when an engine's output is useless, and quarantines that engine.

        Eager's own output is returned as it is. If eager's image is of one colour too, the engine is not at fault.
        """
        if use.backend is Backend.EAGER:
            return output, use
        reason = f"the {use.component}'s output is not finite or of one value"
        if use.component is not Component.IMAGE_DECODER:
            self.quarantine(use.component, reason)  # first: eager may not fit into memory beside the engine
            return self._run(use.component, inputs)
        eagers = self._lanes[use.component].start(lambda: self._by_eager(use.component, inputs)).result()
        if not _is_picture(eagers):
            return output, use
        self.quarantine(use.component, reason)
        return eagers, self._components[use.component].use

    def _by_eager(self, component: Component, inputs: dict[str, Tensor]) -> Callable[[], Tensor]:
        made = self._components[component].by_eager(inputs)
        return lambda: made

    def _velocity(self, sequences: Sequence[ImageSequence], latents: Tensor, times: Tensor, guidance: Tensor) -> Tensor:
        """[B, C, h, w]; with guidance, the prompt's velocity pushed away from the negative prompt's."""
        captions = [torch.cat(row) for row in zip(*(s.captions for s in sequences), strict=True)]
        if len(captions) == 1:
            return self._forward(sequences, latents, times, captions[0])
        conditional, unconditional = self._guided(sequences, latents, times, captions)
        return conditional + guidance.view(-1, 1, 1, 1) * (conditional - unconditional)

    def _guided(
        self, sequences: Sequence[ImageSequence], latents: Tensor, times: Tensor, captions: list[Tensor]
    ) -> Sequence[Tensor]:
        """Both velocities, in one forward if the captions are equally long, as all rows of a forward must be."""
        if captions[0].shape == captions[1].shape:
            both = self._forward(sequences, latents.repeat(2, 1, 1, 1), times.repeat(2), torch.cat(captions))
            return both.chunk(2)
        return [self._forward(sequences, latents, times, caption) for caption in captions]

    def _forward(self, sequences: Sequence[ImageSequence], latents: Tensor, times: Tensor, caption: Tensor) -> Tensor:
        inputs = {"latents": latents, "timestep": times, "caption": caption}
        velocity, use = self._components[Component.DENOISER].run(inputs)
        for sequence in sequences:
            sequence.engines[Component.DENOISER] = use
        return velocity


def _charge(sequence: ImageSequence, component: Component, seconds: float) -> None:
    sequence.seconds[component] = sequence.seconds.get(component, 0.0) + seconds


def _latents(sequence: ImageSequence) -> Tensor:
    assert sequence.latents is not None, "the sequence has not been encoded"
    return sequence.latents


def _schedule(sigmas: Sequence[float], guidance: float) -> Tensor:
    """See `ImageSequence.schedule`; copied to the device up front, because a copy would stall each step."""
    levels = torch.tensor(sigmas)
    times = torch.tensor([timestep(sigma) for sigma in sigmas[:-1]])
    return torch.stack([times, levels[1:] - levels[:-1], torch.full_like(times, guidance)])


def _now(sequence: ImageSequence) -> Tensor:
    """Its next step of the schedule, [3, 1]."""
    assert sequence.schedule is not None, "the sequence has not been encoded"
    return sequence.schedule[:, sequence.step : sequence.step + 1]


def _to_host(tensor: Tensor) -> Tensor:
    """A copy that is complete when the lane's work is; from CUDA it lands in pinned memory."""
    return tensor.to("cpu", non_blocking=True)


def _is_finite(tensor: Tensor) -> Tensor:
    return torch.isfinite(tensor).all()


def _is_picture(image: Tensor) -> Tensor:
    """False for an image of a single value, which a decoder that overflows returns."""
    return (image != image.flatten()[0]).any()
