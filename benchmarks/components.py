"""What does one call of each component cost, engine by engine?

Method: every engine holds the same weights and gets the same inputs: one prompt, noise, timestep 0.5. `diffusers` is
its own pipeline's encode_prompt (which pads to 512 tokens), transformer and VAE, `diffusers-compile` the latter two
under torch.compile; `eager` is this project's modules; the others are engines, and a call that another engine answers
ends the benchmark. The first output and the last timed one are compared with eager's (diffusers' encoder by the
velocity that its denoiser computes from the embeddings: it leaves out work that the denoiser repeats in every step).
All rows are called in turn in each repetition, starting with a different one each time; on a CPU twice, of which the
second call counts, because threads of the row before may still spin in the first.

Units: milliseconds per call, on the device (by CUDA events) where there is one; x is how many times as fast, repetition
by repetition; error is the larger relative L2 distance from eager.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks import choice, diffusers_row, rows
from benchmarks.choice import COMPILED, DIFFUSERS, Choice
from benchmarks.diffusers_row import DiffusersRow
from benchmarks.record import BenchmarkError, Row, percentiles, print_table, row, shown
from benchmarks.subject import Subject, open_subject
from benchmarks.timing import calls_a_turn, side_by_side
from export.manifest import Backend
from export.spec import Component, pixels
from server.requests import LongPrompt
from server.worker.prompts import PromptTokenizer, padded_length
from server.worker.sampler import initial_noise

PROMPT = "A watercolour of a lighthouse on a cliff, gulls above the sea"
TIMESTEP = 0.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's options."""
    rows.add_arguments(parser, repetitions=10)
    parser.add_argument(
        "--component", type=Component, choices=list(Component), action="append", help="may be repeated (default: all)"
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measures and prints the table. A row is a case on an engine."""
    chosen = choice.read(options)
    components = options.component or list(Component)
    wanted = [case for case in cases(chosen, components) if any(_differs(b, case) for b in chosen.backends)]
    if not wanted:
        raise BenchmarkError(
            f"nothing to measure: the image decoder takes one image a call (--batch 1), and {COMPILED} encodes prompts "
            f"like {DIFFUSERS}; give another --component too, or another --backend"
        )
    subject, pipeline = open_subject(chosen)
    benchmark = Components(subject, diffusers_row.rows(pipeline, subject.device, chosen.backends), options)
    measured = [r for case in wanted for r in benchmark.measure(case)]
    _show(measured)
    return {"settings": rows.settings(chosen, options), "rows": measured}


@dataclass(frozen=True)
class Case:
    """One call of a component."""

    component: Component
    size: str  # WIDTHxHEIGHT
    batch: int

    def on(self, engine: str) -> dict[str, str | int]:
        """The case of a row; the prompt encoder knows no size."""
        size = "any" if self.component is Component.PROMPT_ENCODER else self.size
        return {"component": self.component, "size": size, "batch": self.batch, "engine": engine}


def cases(chosen: Choice, components: Sequence[Component]) -> Iterator[Case]:
    """What is measured: the prompt encoder at the first size alone; the decoder takes one image a call."""
    for batch in chosen.batches:
        for size in chosen.sizes:
            for component in components:
                again = component is Component.PROMPT_ENCODER and size != chosen.sizes[0]
                shared = component is Component.IMAGE_DECODER and batch > 1
                if not again and not shared:
                    yield Case(component, size, batch)


@dataclass(frozen=True)
class Components:
    """Measures single calls."""

    subject: Subject
    diffusers: Mapping[str, DiffusersRow]
    options: argparse.Namespace

    def measure(self, case: Case) -> list[Row]:
        """One row per backend. Its first and last outputs are checked; on CUDA a recorded graph has made the last."""
        inputs = self._inputs(case)
        calls = {b: self._call(b, case, inputs) for b in self.subject.choice.backends if _differs(b, case)}
        expected = self._call(Backend.EAGER, case, inputs)()
        first = {backend: self._error(backend, case, call(), expected) for backend, call in calls.items()}
        before = {backend: self._count(backend, case.component) for backend in calls}
        warm_up, repetitions = self.options.warm_up, self.options.repetitions
        taken, last = side_by_side(calls, warm_up=warm_up, repetitions=repetitions, device=self.subject.device)
        forwards = {backend: self._count(backend, case.component) - before[backend] for backend in calls}
        for backend, made in forwards.items():
            expected_calls = (warm_up + repetitions) * calls_a_turn(self.subject.device)
            rows.check_count(f"{case.component} on {backend}", made, expected_calls)
        return [
            row(
                case.on(backend),
                ms=percentiles(taken[backend]),
                speedup=rows.speedups(taken, backend),
                relative_error=max(first[backend], self._error(backend, case, last[backend], expected)),
                forwards=forwards[backend],
            )
            for backend in calls
        ]

    def _call(self, backend: str, case: Case, inputs: dict[str, Tensor]) -> Callable[[], Tensor]:
        if backend in self.diffusers:
            return self.diffusers[backend].component(case.component, inputs, [PROMPT] * case.batch)
        engine = self.subject.engines[backend][case.component]
        return lambda: engine.run(inputs)

    def _count(self, backend: str, component: Component) -> int:
        if backend in self.diffusers:
            return self.diffusers[backend].calls[component]
        return self.subject.engines[backend][component].calls

    def _error(self, backend: str, case: Case, got: Tensor, expected: Tensor) -> float:
        """The error of an output, relative to eager's.

        Raises:
            BenchmarkError: it is over the component's tolerance.
        """
        component = case.component
        if backend == DIFFUSERS and component is Component.PROMPT_ENCODER:
            component, (got, expected) = Component.DENOISER, self._velocities(case, got)
        error = float((got.double() - expected.double()).norm() / expected.double().norm())
        tolerance = self.subject.specs[component].tolerance[self.subject.choice.precision_of(backend)]
        if not error <= tolerance:  # written so that NaN fails
            raise BenchmarkError(
                f"{case.component} on {backend} is {error:.1e} from eager, {tolerance:.0e} is accepted; no time counts"
            )
        return error

    def _velocities(self, case: Case, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """The velocity of diffusers' denoiser from its encoder's joined embeddings, and of eager's from eager's."""
        inputs = self._inputs(replace(case, component=Component.DENOISER))
        velocity = self.diffusers[DIFFUSERS].velocity(inputs, embeddings.chunk(case.batch))
        return velocity(), self.subject.engines[Backend.EAGER][Component.DENOISER].run(inputs)

    def _inputs(self, case: Case) -> dict[str, Tensor]:
        """The component's inputs; the caption is eager's encoding of the prompt."""
        (width, height), batch = pixels(case.size), case.batch
        ids = PromptTokenizer(self.subject.tokenizer).encode("prompt", PROMPT, LongPrompt.REFUSE)
        padded = torch.zeros(batch, padded_length(ids), dtype=torch.int64)
        padded[:, : len(ids)] = torch.tensor(ids)
        prompt = self._placed(input_ids=padded, caption_length=torch.full((batch,), len(ids)))
        if case.component is Component.PROMPT_ENCODER:
            return prompt
        channels = self.subject.manifest.checkpoint.dimensions.latent_channels
        latents = torch.cat([initial_noise(i, height=height, width=width, channels=channels) for i in range(batch)])
        if case.component is Component.IMAGE_DECODER:
            return self._placed(latents=latents)
        caption = self.subject.engines[Backend.EAGER][Component.PROMPT_ENCODER].run(prompt)
        return self._placed(latents=latents, timestep=torch.full((batch,), TIMESTEP), caption=caption)

    def _placed(self, **tensors: Tensor) -> dict[str, Tensor]:
        return {name: tensor.to(self.subject.device) for name, tensor in tensors.items()}


def _differs(backend: str, case: Case) -> bool:
    """Whether `backend` is a row of its own: compiled or not, diffusers encodes prompts alike."""
    return not (backend == COMPILED and case.component is Component.PROMPT_ENCODER)


def _show(measured: list[Row]) -> None:
    header = (
        "component",
        "size",
        "batch",
        "engine",
        "n",
        *("p50 ms", "p90 ms", "p99 ms"),
        "x diffusers",
        "x eager",
        "error",
    )
    print_table(header, [_line(r) for r in measured])


def _line(r: Row) -> list[object]:
    ms, faster, error = r["ms"], r["speedup"], r["relative_error"]
    ratios = [faster[name]["p50"] if name in faster else None for name in (DIFFUSERS, Backend.EAGER)]
    return [*r["case"].values(), ms["n"], *shown(ms, 50, 90, 99), *ratios, f"{error:.0e}"]
