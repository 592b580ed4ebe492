"""What does one call of each component cost, engine by engine?

Method: every engine holds the same weights and gets the same inputs: one prompt, noise, half of the schedule.
`diffusers` is its own pipeline's encode_prompt (which pads to 512 tokens), transformer and VAE; `eager` this project's
modules; the others are engines, and a call that another engine answers ends the benchmark. Each output is first held
against eager's (diffusers' encoder by the velocity that its embeddings give: it leaves out what its denoiser repeats in
every step). All rows are then called in turn in each repetition, beginning with another each time.

Units: milliseconds a call, on the device (by CUDA events) where there is one; x is how many times as fast, repetition
by repetition; error is the relative L2 distance from eager.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import choice, rows
from benchmarks.choice import DIFFUSERS, pixels
from benchmarks.diffusers_row import DiffusersRow
from benchmarks.record import BenchmarkError, Row, percentiles, print_table, row
from benchmarks.subject import Subject, open_subject
from benchmarks.timing import side_by_side
from export.manifest import Backend
from export.spec import Component
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
    """Measures and prints the table. A row is a component, a size, a batch and an engine."""
    subject, pipeline = open_subject(choice.read(options))
    benchmark = Components(subject, DiffusersRow(pipeline, subject.device), options)
    measured: list[Row] = []
    for batch in subject.choice.batches:
        for number, size in enumerate(subject.choice.sizes):
            for component in options.component or Component:
                if _is_asked(component, batch, first=number == 0):
                    measured += benchmark.measure(component, size, batch)
    _show(measured)
    return {"settings": rows.settings(subject.choice, options), "rows": measured}


def _is_asked(component: Component, batch: int, *, first: bool) -> bool:
    """The prompt encoder knows no size, so it is measured at the first; the decoder takes one image a call."""
    match component:
        case Component.PROMPT_ENCODER:
            return first
        case Component.IMAGE_DECODER:
            return batch == 1
        case _:
            return True


@dataclass(frozen=True)
class Components:
    """Measures single calls."""

    subject: Subject
    diffusers: DiffusersRow
    options: argparse.Namespace

    def measure(self, component: Component, size: str, batch: int) -> list[Row]:
        """One row a backend."""
        inputs = self._inputs(component, size, batch)
        calls = {b: self._call(b, component, inputs, batch) for b in self.subject.choice.backends}
        before = {backend: self._count(backend, component) for backend in calls}
        errors = self._check(component, calls, self._call(Backend.EAGER, component, inputs, batch))
        warm_up, repetitions = self.options.warm_up, self.options.repetitions
        taken = side_by_side(calls, warm_up=warm_up, repetitions=repetitions, device=self.subject.device)
        forwards = {backend: self._count(backend, component) - before[backend] for backend in calls}
        for backend, made in forwards.items():
            again = 1 if backend == Backend.EAGER else 0  # as the reference
            rows.check_count(f"{component} on {backend}", made, 1 + again + warm_up + repetitions)
        shape = "any" if component is Component.PROMPT_ENCODER else size
        return [
            row(
                {"component": component, "size": shape, "batch": batch, "engine": backend},
                ms=percentiles(taken[backend]),
                speedup=rows.speedups(taken, backend),
                relative_error=errors[backend],
                forwards=forwards[backend],
            )
            for backend in calls
        ]

    def _call(self, backend: str, component: Component, inputs: dict[str, Tensor], batch: int) -> Callable[[], Tensor]:
        if backend == DIFFUSERS:
            return self.diffusers.component(component, inputs, [PROMPT] * batch)
        engine = self.subject.engines[backend][component]
        return lambda: engine.run(inputs)

    def _count(self, backend: str, component: Component) -> int:
        if backend == DIFFUSERS:
            return self.diffusers.calls[component]
        return self.subject.engines[backend][component].calls

    def _check(
        self, component: Component, calls: dict[str, Callable[[], Tensor]], reference: Callable[[], Tensor]
    ) -> dict[str, float | None]:
        """Relative error of each; None where the outputs are different things."""
        expected, errors = reference().double(), dict[str, float | None]()
        tolerances = self.subject.specs[component].tolerance
        for backend, call in calls.items():
            got = call().double()
            if backend == DIFFUSERS and component is Component.PROMPT_ENCODER:
                errors[backend] = None
                continue
            errors[backend] = error = float((got - expected).norm() / expected.norm())
            tolerance = tolerances[self.subject.choice.precision_of(backend)]
            if not error <= tolerance:  # written so that NaN fails
                raise BenchmarkError(
                    f"{component} on {backend} is {error:.1e} from eager, {tolerance:.0e} is accepted; it is not timed"
                )
        return errors

    def _inputs(self, component: Component, size: str, batch: int) -> dict[str, Tensor]:
        """Of `component`; the caption is what eager makes of the prompt."""
        width, height = pixels(size)
        ids = PromptTokenizer(self.subject.tokenizer).encode("prompt", PROMPT, LongPrompt.REFUSE)
        padded = torch.zeros(batch, padded_length(ids), dtype=torch.int64)
        padded[:, : len(ids)] = torch.tensor(ids)
        prompt = self._placed(input_ids=padded, caption_length=torch.full((batch,), len(ids)))
        if component is Component.PROMPT_ENCODER:
            return prompt
        channels = self.subject.manifest.checkpoint.dimensions.latent_channels
        latents = torch.cat([initial_noise(i, height=height, width=width, channels=channels) for i in range(batch)])
        if component is Component.IMAGE_DECODER:
            return self._placed(latents=latents)
        caption = self.subject.engines[Backend.EAGER][Component.PROMPT_ENCODER].run(prompt)
        return self._placed(latents=latents, timestep=torch.full((batch,), TIMESTEP), caption=caption)

    def _placed(self, **tensors: Tensor) -> dict[str, Tensor]:
        return {name: tensor.to(self.subject.device) for name, tensor in tensors.items()}


def _show(measured: list[Row]) -> None:
    header = ("component", "size", "batch", "engine", "p50 ms", "p90 ms", "p99 ms", "x diffusers", "x eager", "error")
    print_table(header, [_line(r) for r in measured])


def _line(r: Row) -> list[object]:
    ms, faster, error = r["ms"], r["speedup"], r["relative_error"]
    ratios = [faster[name]["p50"] if name in faster else None for name in (DIFFUSERS, Backend.EAGER)]
    distance = None if error is None else f"{error:.0e}"
    return [*r["case"].values(), ms["p50"], ms["p90"], ms["p99"], *ratios, distance]
