"""Does the demo model draw what it is asked for, through the server, at every size?

Method: `zserve serve --require-engine` over the exported demo, in a process of its own, draws fixed sets of prompts:
image i of a set from seed i, several at once, and every picture is scored (demo/score.py). A picture that another
engine drew ends the run. With --images FOLDER the pictures are kept, and those already there are scored without
being drawn again if they are of the same checkpoint, engine and prompts (the record counts them); after --minutes
nothing more is drawn, and every question is answered from the pictures there are.

Units: shares of pictures that are right, in [0, 1], each with its 95 % confidence interval by Wilson.
"""

import argparse
import hashlib
import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from PIL import Image as Pillow

from benchmarks.choice import version_settings
from benchmarks.record import BenchmarkError, Row, row
from benchmarks.serving import add_model, only_backend, repository, server_process
from benchmarks.traffic import check_answer
from benchmarks.workload import above_zero
from client import ZImageClient
from demo.scenes import Image, Scene, sample_scenes
from demo.score import Score, score
from export.devices import default_device
from export.manifest import Manifest

AT_ONCE = 4
Told = dict[int, tuple[Scene, Score]]
Z = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Question:
    """One set of prompts, drawn one way; `kind` is one of the grammar's, or empty for any."""

    width: int
    height: int
    count: int
    steps: int = 8
    guidance: float = 0.0
    held_out: bool = False
    kind: str = ""
    seed: int = 20261

    @property
    def size(self) -> str:
        return f"{self.width}x{self.height}"

    @property
    def name(self) -> str:
        extra = f", guidance {self.guidance}" if self.guidance else ""
        extra += (f", {self.kind}s" if self.kind else "") + (", held out" if self.held_out else "")
        return f"{self.size}, {self.steps} steps{extra}"

    def scenes(self) -> list[Scene]:
        return sample_scenes(self.count, self.seed, held_out=self.held_out, kind=self.kind)


QUICK = (Question(256, 256, 100), Question(256, 256, 24, kind="character"), Question(512, 512, 16))
LARGE = ((768, 768), (1024, 1024), (1024, 768), (896, 1152), (768, 1344), (1280, 720))
FULL = (
    Question(256, 256, 400),
    Question(256, 256, 200, held_out=True),
    Question(256, 256, 144, kind="character"),
    *(Question(256, 256, 200, steps=steps) for steps in (4, 9)),
    Question(256, 256, 200, guidance=1.5),
    Question(512, 512, 200),
    Question(512, 512, 64, held_out=True),
    Question(512, 512, 48, kind="character"),
    *(Question(width, height, 64) for width, height in LARGE),
    Question(1024, 1024, 64, kind="character"),
)
SUITES = {"quick": QUICK, "full": FULL}


@dataclass(frozen=True)
class Share:
    """How many of `count` pictures are right: `right` / `count`, between `low` and `high` with 95 % confidence."""

    right: int
    count: int
    share: float
    low: float
    high: float

    @classmethod
    def of(cls, verdicts: list[bool]) -> "Share":
        """Wilson's interval (E. B. Wilson, 1927): it stays within [0, 1] and is honest near 1."""
        right, n = sum(verdicts), len(verdicts)
        p, z2 = right / n, Z * Z / n
        centre = (p + z2 / 2) / (1 + z2)
        reach = Z * (p * (1 - p) / n + z2 / (4 * n)) ** 0.5 / (1 + z2)
        low, high = (round(float(np.clip(end, 0, 1)), 4) for end in (centre - reach, centre + reach))
        return cls(right, n, round(p, 4), low, high)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's options."""
    add_model(parser)
    parser.add_argument("--device", default=default_device(), help="default: %(default)s")
    parser.add_argument("--suite", choices=SUITES, default="quick", help="default: %(default)s")
    parser.add_argument("--size", action="append", help="WIDTHxHEIGHT: only these questions; may be repeated")
    parser.add_argument("--images", type=Path, help="folder to keep the pictures in")
    parser.add_argument("--minutes", type=above_zero, default=math.inf, help="draw no more after so many")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Draws, scores and prints a line per question. A row is a question."""
    backend, questions = only_backend(options.model), chosen(options)
    with (
        repository(options.model, ["256x256"]) as models,
        server_process(models, options.device) as server,
        ZImageClient(server.url, timeout=600) as client,
    ):
        kept = options.images and options.images / identity(options.model)
        drawer = Drawer(client, backend, kept, options.minutes)
        rows = [answer for question in questions if (answer := ask(drawer, question))]
    settings = {"engine": backend, **version_settings(options.model, options.device), "suite": options.suite}
    return {"settings": {**settings, "pictures_of_earlier_runs": len(drawer.found)}, "rows": rows}


def chosen(options: argparse.Namespace) -> list[Question]:
    """The questions of the suite, or only those of the sizes asked for.

    Raises:
        BenchmarkError: the suite has none of that size.
    """
    suite = SUITES[options.suite]
    there = list(dict.fromkeys(q.size for q in suite))
    wanted = options.size or there
    if unknown := set(wanted) - set(there):
        raise BenchmarkError(f"--size {', '.join(sorted(unknown))}: the {options.suite} suite has {', '.join(there)}")
    return [question for question in suite if question.size in wanted]


def identity(version: Path) -> str:
    """What pictures depend on besides prompts: checkpoint, precision, engines and how they were built."""
    manifest = Manifest.read(version)
    made = [manifest.checkpoint.fingerprint, manifest.precision, manifest.source, *map(repr, manifest.engines)]
    return _digest(made)


def _digest(texts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:12]


class Drawer:
    """Draws through the server, on one engine alone."""

    def __init__(self, client: ZImageClient, backend: str, kept: Path | None, minutes: float) -> None:
        self._client, self._backend, self._kept = client, backend, kept
        self._until = time.monotonic() + 60 * minutes
        self.found: list[Path] = []  # pictures of earlier runs

    def draw(self, question: Question, scenes: list[Scene]) -> list[Image | None]:
        """Image i from seed i, several at once; None if the time was over."""
        prompts = [scene.prompt for scene in scenes]
        kept = self._kept / f"{question.name}, {_digest(prompts)}" if self._kept else None
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(lambda i: self._image(question, prompts[i], i, kept), range(len(prompts))))

    def _image(self, question: Question, prompt: str, seed: int, kept: Path | None) -> Image | None:
        path = kept / f"{seed}.png" if kept else None
        if path and path.exists():
            self.found.append(path)
            return np.asarray(Pillow.open(path).convert("RGB"))
        if time.monotonic() > self._until:
            return None
        drawing = self._client.draw(
            prompt,
            seed=seed,
            width=question.width,
            height=question.height,
            num_inference_steps=question.steps,
            guidance_scale=question.guidance,
        )
        check_answer(drawing.completed, self._backend, question.steps * (2 if question.guidance else 1))
        if path:
            drawing.images[0].save(path)
        return np.asarray(drawing.images[0].pillow())


def ask(drawer: Drawer, question: Question) -> Row | None:
    """Draws a question's prompts, scores them and prints the line; None if there was no time for any."""
    scenes = question.scenes()
    drawn = drawer.draw(question, scenes)
    told = {i: (scenes[i], score(image, scenes[i])) for i, image in enumerate(drawn) if image is not None}
    return judge(question, told) if told else None


def judge(question: Question, told: Told) -> Row:
    """Prints and returns the shares of right scores, and the wrong prompts; `told` is by the number of the prompt."""
    pairs = list(told.values())
    verdicts = [verdict for _, verdict in pairs]
    right = Share.of([verdict.all_correct for verdict in verdicts])
    parts = {part: Share.of([getattr(verdict, part) for verdict in verdicts]).share for part in vars(verdicts[0])}
    languages = {
        name: Share.of([v.all_correct for scene, v in pairs if scene.language == name])
        for name in sorted({scene.language for scene, _ in pairs})
    }
    shapes = {  # of the pictures with the shape in them
        name: Share.of([v.all_correct for scene, v in pairs if _has(scene, name)])
        for name in sorted({thing.shape for scene, _ in pairs for thing in scene.things})
    }
    shares = parts | {name: share.share for name, share in languages.items()}
    line = " ".join(f"{name} {share:.3f}" for name, share in shares.items())
    interval = f"{right.low:.3f} to {right.high:.3f}"
    print(f"{question.name}: {right.share:.3f} ({interval}, n {right.count}; {line})", flush=True)
    return row(
        {"prompts": question.name},
        question=asdict(question),
        all_correct=asdict(right),
        parts=parts,
        languages={name: asdict(share) for name, share in languages.items()},
        shapes={name: asdict(share) for name, share in shapes.items()},
        wrong=[f"{i}: {scene.prompt} {_faults(verdict)}" for i, (scene, verdict) in told.items() if _faults(verdict)],
    )


def _has(scene: Scene, shape: str) -> bool:
    return any(thing.shape == shape for thing in scene.things)


def _faults(verdict: Score) -> list[str]:
    return [part for part, right in vars(verdict).items() if not right]
