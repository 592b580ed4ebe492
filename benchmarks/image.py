"""What does a whole image cost in one process, engine by engine, and where does the time go?

Method: `diffusers` is its own eager pipeline called as in its documentation, `diffusers-compile` the same with its
transformer and its VAE under torch.compile; the other rows are the server's own executor over their engines: encode, 8
steps, decode, pixels in host memory. All draw the same prompts from the same seeds, no prompt twice so that no cache
helps, one row after the other in each repetition and each repetition starting with a different one. Garbage collection
skips what is loaded, as in a worker. Every image is compared with diffusers' own, the first before anything is timed;
every engine is named and the calls of every component are counted. As in a worker, every padded length of the prompts
is warmed up before anything is timed; `diffusers-compile` draws all of them once before. With --batch k, k images of k
prompts of one padded length share every step.

Units: milliseconds from the prompt to the pixels of all images, by the host's clock; stages on the device (CUDA events
for diffusers; the executor waits after every step anyway); `other` is what no stage took. x is how many times as fast,
repetition by repetition. PSNR in dB.
"""

import argparse
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks import choice, diffusers_row, rows
from benchmarks.choice import COMPILED, DIFFUSERS
from benchmarks.diffusers_row import DiffusersRow
from benchmarks.engine_row import EngineRow
from benchmarks.record import Row, percentiles, print_table, row, shown
from benchmarks.subject import Subject, open_subject
from export.manifest import Backend
from export.spec import CAPTION_MULTIPLE, MAX_PROMPT_TOKENS, Component
from server.requests import LongPrompt
from server.worker.images import Pixels
from server.worker.prompts import PromptTokenizer, padded_length

STEPS = 8
OTHER = "other"
STAGES = (*Component, OTHER)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's options."""
    rows.add_arguments(parser, repetitions=10)
    parser.add_argument("--steps", type=choice.positive, default=STEPS, help="denoiser forwards (default: %(default)s)")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measures and prints the table. A row is a size, a batch and an engine."""
    subject, pipeline = open_subject(choice.read(options))
    chosen = subject.choice
    benchmark = Images(subject, diffusers_row.rows(pipeline, subject.device, chosen.backends), options)
    measured = [r for size in chosen.sizes for batch in chosen.batches for r in benchmark.measure(size, batch)]
    header = ("size", "batch", "engine", "n", "p50 ms", "p90 ms", "p99 ms", *STAGES, "x diffusers", "x eager", "PSNR")
    print_table(header, [_line(r) for r in measured])
    return {"settings": {**rows.settings(chosen, options), "steps": options.steps}, "rows": measured}


@dataclass(frozen=True)
class Drawn:
    """The images of one call, and its milliseconds, as a whole and by stage."""

    images: list[Pixels]
    milliseconds: float
    stages: dict[str, float]


class Images:
    """Draws the same images through every row."""

    def __init__(self, subject: Subject, diffusers: Mapping[str, DiffusersRow], options: argparse.Namespace) -> None:
        self._least_psnr, self._options = subject.choice.least_psnr, options
        self._diffusers = diffusers[DIFFUSERS]  # the reference, a row or not
        self._tokenizer = PromptTokenizer(subject.tokenizer)
        self._rows: dict[str, DiffusersRow | EngineRow] = {
            backend: diffusers[backend] if backend in diffusers else EngineRow(subject, backend)
            for backend in subject.choice.backends
        }

    def measure(self, size: str, batch: int) -> list[Row]:
        """One row per backend."""
        drawn: dict[str, list[Drawn]] = {name: [] for name in self._rows}
        closeness: dict[str, list[dict[str, Any]]] = {name: [] for name in self._rows}
        names = list(self._rows)
        warm_up, counted = self._prompts(batch)
        if COMPILED in self._rows:  # it may compile anew for any length before padding, by which no other row differs
            for prompts in counted:
                self._draw(self._rows[COMPILED], prompts, size, seed=0)
        for number, prompts in enumerate([*warm_up, *counted]):
            first, what = number % len(names), (prompts, size, number)
            made = {name: self._draw(self._rows[name], *what) for name in names[first:] + names[:first]}
            expected = made.get(DIFFUSERS) or self._draw(self._diffusers, *what)
            for name, one in made.items():
                closeness[name].append(rows.compare_images(one.images, expected.images, self._least_psnr(name)))
                drawn[name].append(one)
        kept = {name: every[len(warm_up) :] for name, every in drawn.items()}
        return [self._row({"size": size, "batch": batch, "engine": n}, kept, closeness[n]) for n in names]

    def _prompts(self, batch: int) -> tuple[list[list[str]], list[list[str]]]:
        """The prompts of the warm-up, and of the repetitions that count."""
        warm_up, repetitions = self._options.warm_up, self._options.repetitions
        lengths = MAX_PROMPT_TOKENS // CAPTION_MULTIPLE
        enough = rows.prompts(batch * (repetitions + lengths * (1 + warm_up)))  # some of each length are left
        groups = rows.alike(enough, self._length, batch)
        return rows.warmed(groups, self._length, warm_up=warm_up, repetitions=repetitions)

    def _length(self, prompt: str) -> int:
        return padded_length(self._tokenizer.encode("prompt", prompt, LongPrompt.REFUSE))

    def _row(self, case: dict[str, Any], drawn: dict[str, list[Drawn]], closeness: list[dict[str, Any]]) -> Row:
        name = case["engine"]
        taken = {n: [d.milliseconds for d in every] for n, every in drawn.items()}
        return row(
            case,
            ms=percentiles(taken[name]),
            stages_ms={stage: percentiles([d.stages[stage] for d in drawn[name]]) for stage in STAGES},
            images_per_second=1e3 * case["batch"] / percentiles(taken[name])["p50"],
            speedup=rows.speedups(taken, name),
            forwards=self._options.steps,
            engines=self._engines(name),
            psnr_db=min((c["psnr_db"] for c in closeness if c["psnr_db"] is not None), default=None),
            largest_difference=max(c["largest_difference"] for c in closeness),
        )

    def _engines(self, name: str) -> dict[str, str]:
        drawer = self._rows[name]
        if isinstance(drawer, DiffusersRow):
            return {component.value: name for component in Component}
        return drawer.backends

    def _draw(self, drawer: DiffusersRow | EngineRow, prompts: list[str], size: str, seed: int) -> Drawn:
        before, began = Counter(drawer.calls), time.perf_counter()
        images, stages = drawer.draw(prompts, size=size, steps=self._options.steps, seed=seed)
        milliseconds = 1e3 * (time.perf_counter() - began)
        for component, expected in drawer.calls_of(len(prompts), self._options.steps).items():
            rows.check_count(f"the {component}", drawer.calls[component] - before[component], expected)
        return Drawn(images, milliseconds, {**stages, OTHER: milliseconds - sum(stages.values())})


def _line(r: Row) -> list[object]:
    ms, faster, stages = r["ms"], r["speedup"], r["stages_ms"]
    ratios = [faster[name]["p50"] if name in faster else None for name in (DIFFUSERS, Backend.EAGER)]
    times = (ms["n"], *shown(ms, 50, 90, 99), *(stages[s]["p50"] for s in STAGES))
    return [*r["case"].values(), *times, *ratios, "equal" if r["psnr_db"] is None else r["psnr_db"]]
