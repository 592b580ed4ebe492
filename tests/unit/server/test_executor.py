"""A whole image through the executor is the image of diffusers' own pipeline."""

import dataclasses
import time
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from diffusers import ZImagePipeline
from torch import Tensor

from export.manifest import Backend, CheckpointRecord, Manifest, PreviewProjection
from export.modules import build_components
from export.preview import fit_preview
from export.spec import Component, ModelDimensions, Precision, component_specs
from server.costs import CostTable
from server.engines.eager import EagerEngine
from server.engines.served import ServedComponent
from server.errors import NonFiniteError
from server.requests import GenerationRequest, ImageFormat, LongPrompt
from server.worker.batching import BatchPolicy
from server.worker.executor import Executor
from server.worker.images import Pixels, encode_image
from server.worker.planner import Plan, Planner
from server.worker.prompts import PromptCache, PromptTokenizer
from server.worker.sequences import ImageSequence, make_sequences
from server.worker.under_way import images_of
from tests.conftest import CHECKPOINT
from tests.fakes import FakeClock, FakeEngine, a_request

DIMENSIONS = ModelDimensions(16, 192, 1024)
SPECS = component_specs(DIMENSIONS)
PROMPT, NEGATIVE = "a large red circle in the top left corner on a blue background", "a green star"


@pytest.fixture(scope="module")
def tokenizer() -> PromptTokenizer:
    return PromptTokenizer(CHECKPOINT)


def manifest(preview: PreviewProjection | None = None) -> Manifest:
    return Manifest(
        name="demo",
        created="",
        checkpoint=CheckpointRecord(str(CHECKPOINT), "", DIMENSIONS, 3.0),
        precision=Precision.FP32,
        max_batch=4,
        max_size=1024,
        default_size="256x256",
        engines=(),
        preview=preview or PreviewProjection(tuple((0.0, 0.0, 0.0) for _ in range(16)), (0.0, 0.0, 0.0)),
        source="",
    )


def components(pipeline: ZImagePipeline) -> dict[Component, ServedComponent]:
    modules = build_components(pipeline)
    engines = {c: EagerEngine(m) for c, m in modules.items()}
    return {c: ServedComponent(SPECS[c], e, lambda e=e: e) for c, e in engines.items()}  # type: ignore[misc]


@pytest.fixture
def executor(pipeline: ZImagePipeline) -> Executor:
    return Executor(components(pipeline), manifest(), "cpu", prompt_cache_size=8)


def sequences(tokenizer: PromptTokenizer, request: GenerationRequest) -> tuple[ImageSequence, ...]:
    texts = (request.prompt, request.negative_prompt) if request.guided else (request.prompt,)
    prompts = tuple(tokenizer.encode("prompt", text, LongPrompt.REFUSE) for text in texts)
    return make_sequences(request, prompts, key=1, shift=3.0, now=0.0)


def draw(executor: Executor, sequence: ImageSequence) -> Pixels:
    executor.encode(sequence).result()
    for _ in range(sequence.steps):
        executor.denoise([sequence]).result()
        sequence.step += 1
    return executor.decode(sequence).result()


@pytest.mark.parametrize("steps", [4, 8, 9])
@pytest.mark.parametrize("guidance", [0.0, 1.5])
def test_the_image_is_that_of_diffusers(
    pipeline: ZImagePipeline, executor: Executor, tokenizer: PromptTokenizer, steps: int, guidance: float
) -> None:
    request = dataclasses.replace(
        a_request(),
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        width=128,
        height=96,
        num_inference_steps=steps,
        guidance_scale=guidance,
    )
    expected = pipeline(
        prompt=[PROMPT],
        negative_prompt=[NEGATIVE],
        width=128,
        height=96,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(request.seed),
        output_type="np",
    ).images[0]
    got = draw(executor, sequences(tokenizer, request)[0])
    assert got.shape == (96, 128, 3)
    assert np.abs(got.astype(int) - (expected * 255).round().astype(int)).max() <= 1


def test_a_negative_prompt_of_another_length_is_guided_too(
    pipeline: ZImagePipeline, executor: Executor, tokenizer: PromptTokenizer
) -> None:
    """Rows of one forward share the caption's length, so these two cannot."""
    longer = ", ".join([NEGATIVE] * 12)
    request = dataclasses.replace(a_request(), prompt=PROMPT, negative_prompt=longer, guidance_scale=1.5)
    (sequence,) = sequences(tokenizer, request)
    assert len(set(sequence.shape.captions)) == 2
    expected = pipeline(
        prompt=[PROMPT],
        negative_prompt=[longer],
        width=64,
        height=64,
        num_inference_steps=2,
        guidance_scale=1.5,
        generator=torch.Generator().manual_seed(request.seed),
        output_type="np",
    ).images[0]
    assert np.abs(draw(executor, sequence).astype(int) - (expected * 255).round().astype(int)).max() <= 1


def test_images_do_not_depend_on_who_shares_their_steps(executor: Executor, tokenizer: PromptTokenizer) -> None:
    requests = [
        dataclasses.replace(a_request(), seed=seed, prompt=prompt, num_inference_steps=steps)
        for seed, prompt, steps in ((1, PROMPT, 3), (2, NEGATIVE, 4), (3, "一个红色圆形", 3))
    ]
    alone = [draw(executor, *sequences(tokenizer, request)) for request in requests]
    together = [sequence for request in requests for sequence in sequences(tokenizer, request)]
    for sequence in together:
        executor.encode(sequence).result()
    while running := [s for s in together if s.step < s.steps]:
        executor.denoise(running).result()
        for sequence in running:
            sequence.step += 1
    for sequence, expected in zip(together, alone, strict=True):
        assert np.abs(executor.decode(sequence).result().astype(int) - expected.astype(int)).max() <= 1


def test_images_of_one_request_have_consecutive_seeds(executor: Executor, tokenizer: PromptTokenizer) -> None:
    two = sequences(tokenizer, dataclasses.replace(a_request(), seed=7, num_images=2))
    one = sequences(tokenizer, dataclasses.replace(a_request(), seed=8))
    assert [s.seed for s in two] == [7, 8]
    assert np.array_equal(draw(executor, two[1]), draw(executor, one[0]))


def test_a_requests_images_share_the_time_of_the_steps_that_they_share(
    executor: Executor, tokenizer: PromptTokenizer
) -> None:
    """Else a request of four images has taken four times as long as it did."""
    four = sequences(tokenizer, dataclasses.replace(a_request(), num_images=4, num_inference_steps=1))
    (other,) = sequences(tokenizer, dataclasses.replace(a_request(), num_inference_steps=1))
    other.key = four[0].key + 1
    for sequence in (*four, other):
        executor.encode(sequence).result()
    seconds = executor.denoise([*four, other]).result()
    assert sum(s.seconds[Component.DENOISER] for s in four) == pytest.approx(seconds)
    assert other.seconds[Component.DENOISER] == seconds


def test_a_step_is_not_charged_for_the_one_before_it(
    executor: Executor, tokenizer: PromptTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is given to the device before that one is done, and the device begins with it after that."""
    clock = FakeClock()
    monkeypatch.setattr(time, "perf_counter", clock)
    first, second = (sequences(tokenizer, a_request())[0] for _ in range(2))
    for sequence in (first, second):
        executor.encode(sequence).result()
    before = executor.denoise([first])
    clock.now = 1.0
    after = executor.denoise([second])
    clock.now = 5.0
    assert before.result() == 5.0
    clock.now = 8.0
    assert after.result() == second.seconds[Component.DENOISER] == 3.0


@pytest.mark.parametrize("image_format", ImageFormat)
def test_an_image_that_an_engine_gives_as_planes_can_be_encoded(
    image_format: ImageFormat, executor: Executor, tokenizer: PromptTokenizer
) -> None:
    planes = torch.arange(3 * 64 * 64).reshape(1, 3, 64, 64).to(torch.uint8)
    decoder = FakeEngine(lambda inputs: planes.permute(0, 2, 3, 1))
    executor._components[Component.IMAGE_DECODER] = ServedComponent(
        SPECS[Component.IMAGE_DECODER], decoder, lambda: decoder
    )
    (sequence,) = sequences(tokenizer, dataclasses.replace(a_request(), num_inference_steps=1))
    assert encode_image(draw(executor, sequence), image_format, 90)


def test_the_same_prompt_is_encoded_once(pipeline: ZImagePipeline, tokenizer: PromptTokenizer) -> None:
    parts = components(pipeline)
    module = build_components(pipeline)[Component.PROMPT_ENCODER]
    counting = FakeEngine(lambda inputs: EagerEngine(module).run(inputs), backend=Backend.EAGER)
    parts[Component.PROMPT_ENCODER] = ServedComponent(SPECS[Component.PROMPT_ENCODER], counting, lambda: counting)
    executor = Executor(parts, manifest(), "cpu", prompt_cache_size=8)
    first, again = (sequences(tokenizer, a_request())[0] for _ in range(2))
    a, b = draw(executor, first), draw(executor, again)
    assert counting.calls == 1
    assert (first.prompt_cached, again.prompt_cached) == (False, True)
    assert np.array_equal(a, b)


def test_only_a_bad_prompt_encoder_has_its_prompts_forgotten(
    pipeline: ZImagePipeline, tokenizer: PromptTokenizer
) -> None:
    for component, kept in ((Component.DENOISER, True), (Component.PROMPT_ENCODER, False)):
        executor = with_engine(pipeline, component, torch.ones(1, 32, 192))
        first, again = (sequences(tokenizer, a_request())[0] for _ in range(2))
        executor.encode(first).result()
        executor.quarantine(component, "it is to be")
        executor.encode(again).result()
        assert again.prompt_cached is kept


def test_it_is_known_how_many_prompts_were_encoded(pipeline: ZImagePipeline, tokenizer: PromptTokenizer) -> None:
    executor = Executor(components(pipeline), manifest(), "cpu", prompt_cache_size=8)
    guided = dataclasses.replace(a_request(), guidance_scale=2.0, negative_prompt="grey")
    asked = (guided, dataclasses.replace(guided, prompt="another"), guided, dataclasses.replace(guided, prompt="grey"))
    made = [sequences(tokenizer, request)[0] for request in asked]
    for sequence in made:
        executor.encode(sequence).result()
    assert [s.encoded for s in made] == [2, 1, 0, 0]
    assert [Component.PROMPT_ENCODER in s.seconds for s in made] == [True, True, False, False]


def with_engine(pipeline: ZImagePipeline, component: Component, answer: Tensor) -> Executor:
    """An executor whose engine of `component` answers `answer`, with eager behind it."""
    parts, module = components(pipeline), build_components(pipeline)[component]
    wrong = FakeEngine(lambda inputs: answer)
    parts[component] = ServedComponent(SPECS[component], wrong, lambda: EagerEngine(module))
    return Executor(parts, manifest(), "cpu", prompt_cache_size=8)


@pytest.mark.parametrize(
    ("component", "answer"),
    [
        (Component.PROMPT_ENCODER, torch.full((1, 32, 192), torch.nan)),
        (Component.IMAGE_DECODER, torch.zeros(1, 64, 64, 3, dtype=torch.uint8)),
    ],
)
def test_a_useless_output_is_made_again_by_eager(
    pipeline: ZImagePipeline, executor: Executor, tokenizer: PromptTokenizer, component: Component, answer: Tensor
) -> None:
    expected = draw(executor, *sequences(tokenizer, a_request()))
    (sequence,) = sequences(tokenizer, a_request())
    assert np.array_equal(draw(with_engine(pipeline, component, answer), sequence), expected)
    assert sequence.engines[component].backend is Backend.EAGER
    assert "not finite or of one value" in sequence.engines[component].fallback_reason


def test_an_image_that_is_of_one_colour_by_eager_too_is_no_fault_of_the_engine(
    pipeline: ZImagePipeline, tokenizer: PromptTokenizer
) -> None:
    black = torch.zeros(1, 64, 64, 3, dtype=torch.uint8)
    parts = components(pipeline)
    engine, eager = FakeEngine(lambda inputs: black), FakeEngine(lambda inputs: black)
    parts[Component.IMAGE_DECODER] = ServedComponent(SPECS[Component.IMAGE_DECODER], engine, lambda: eager)
    (sequence,) = sequences(tokenizer, a_request())
    assert not draw(Executor(parts, manifest(), "cpu", prompt_cache_size=8), sequence).any()
    assert sequence.engines[Component.IMAGE_DECODER].backend is engine.backend
    assert parts[Component.IMAGE_DECODER].compiled
    assert eager.calls == 1


def test_an_image_that_eager_has_made_to_judge_the_engine_is_the_answer(
    pipeline: ZImagePipeline, tokenizer: PromptTokenizer
) -> None:
    picture = torch.randint(256, (1, 64, 64, 3), dtype=torch.uint8)
    black = torch.zeros_like(picture)
    engine, eager = FakeEngine(lambda inputs: black), FakeEngine(lambda inputs: picture)
    parts = components(pipeline)
    parts[Component.IMAGE_DECODER] = ServedComponent(SPECS[Component.IMAGE_DECODER], engine, lambda: eager)
    (sequence,) = sequences(tokenizer, a_request())
    drawn = draw(Executor(parts, manifest(), "cpu", prompt_cache_size=8), sequence)
    assert np.array_equal(drawn, picture[0].numpy())
    assert sequence.engines[Component.IMAGE_DECODER] == parts[Component.IMAGE_DECODER].use
    assert not parts[Component.IMAGE_DECODER].compiled
    assert eager.calls == 1


def test_a_reset_without_memory_leaves_what_was_there(
    executor: Executor, tokenizer: PromptTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noise must not be taken for what was denoised."""
    (sequence,) = sequences(tokenizer, a_request())
    draw(executor, sequence)
    before = sequence.latents

    def without_memory(*arguments: object) -> Tensor:
        raise torch.OutOfMemoryError("a schedule")

    monkeypatch.setattr("server.worker.executor._schedule", without_memory)
    with pytest.raises(torch.OutOfMemoryError):
        executor.reset(sequence)
    assert sequence.latents is before


@pytest.mark.parametrize(("delayed", "first"), [(False, "old"), (True, "new")])
def test_a_request_goes_on_waiting_with_its_worker(delayed: bool, first: str) -> None:
    """One of level 4 that has waited 90 s is as urgent as those of level 1, and came before them.

    If its queue timeout has passed, and its model delays such requests, it is behind all of its level here too.
    """
    waited = dataclasses.replace(a_request(), request_id="old", priority=4, waited=90.0, delayed=delayed)
    fresh = dataclasses.replace(a_request(), request_id="new", priority=1)
    planner = Planner(CostTable(), BatchPolicy(1))
    for key, request in enumerate((fresh, waited)):
        (sequence,) = make_sequences(request, ((1,),), key=key, shift=3.0, now=0.0)
        planner.add(sequence, 0.0)
    plan = planner.plan(0.0)
    assert isinstance(plan, Plan)
    assert [sequence.request.request_id for sequence in images_of(plan)] == [first]


def test_a_denoiser_that_overflows_is_noticed_before_the_image_leaves(
    pipeline: ZImagePipeline, tokenizer: PromptTokenizer
) -> None:
    executor = with_engine(pipeline, Component.DENOISER, torch.full((1, 16, 8, 8), torch.inf))
    with pytest.raises(NonFiniteError):
        draw(executor, *sequences(tokenizer, a_request()))
    for reason in ("overflow", "again"):
        executor.quarantine(Component.DENOISER, reason)
    (use,) = (use for use in executor.engines() if use.component is Component.DENOISER)
    assert use.fallback_reason == "overflow"


def test_a_preview_resembles_the_image(pipeline: ZImagePipeline, tokenizer: PromptTokenizer) -> None:
    executor = Executor(components(pipeline), manifest(fit_preview(CHECKPOINT)), "cpu", prompt_cache_size=8)
    (sequence,) = sequences(tokenizer, dataclasses.replace(a_request(), prompt=PROMPT, width=256, height=256))
    image = draw(executor, sequence).astype(float)
    preview = executor.preview(sequence, sequence.steps).result().astype(float)
    assert preview.shape == (32, 32, 3)
    small = image.reshape(32, 8, 32, 8, 3).mean((1, 3))
    # The best linear map over the demo's own scenes reaches 0.87: its small VAE is less linear than the real one.
    assert np.corrcoef(preview.ravel(), small.ravel())[0, 1] > 0.6


class Hoarder(FakeEngine):
    """An engine that can do with less memory."""

    freed = 0

    def free_memory(self) -> None:
        self.freed += 1


def test_when_memory_runs_out_every_engine_gives_back_what_it_can_do_without() -> None:
    engines = {c: Hoarder(lambda inputs: torch.zeros(1)) for c in (Component.PROMPT_ENCODER, Component.DENOISER)}
    every = {**engines, Component.IMAGE_DECODER: FakeEngine(lambda inputs: torch.zeros(1))}  # which keeps nothing
    served = {c: ServedComponent(SPECS[c], e, lambda e=e: e) for c, e in every.items()}  # type: ignore[misc]
    executor = Executor(served, manifest(), "cpu", prompt_cache_size=8)
    executor.forget_prompts()
    assert [e.freed for e in engines.values()] == [0, 0]
    cached = MagicMock(spec=PromptCache)
    executor._cache = cached
    executor.free_memory()
    assert [e.freed for e in engines.values()] == [1, 1]
    cached.clear.assert_called_once_with()
