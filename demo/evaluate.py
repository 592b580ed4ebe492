"""Score the demo model through a running server: `make serve`, and then `python -m demo.evaluate`.

Prints one line a question and writes one JSON object. The prompt sets are fixed by their seeds, and image i of a set
is drawn from seed i. Shares are of pictures, in [0, 1], each with its 95 % confidence interval by Wilson.
With `--images FOLDER` the pictures are kept, and those that lie there already are scored without being drawn again;
after `--minutes` nothing more is drawn, and every question is answered from what there is of it.
"""

import argparse
import json
import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from PIL import Image as Pillow

from benchmarks.record import provenance
from client import ZImageClient
from demo.scenes import Image, Scene, sample_scenes
from demo.score import Score, score

AT_ONCE = 4
Told = dict[int, tuple[Scene, Score]]
Z = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Question:
    """One set of prompts, drawn one way; `kind` is one of the grammar's, or any."""

    width: int
    height: int
    count: int
    steps: int = 8
    guidance: float = 0.0
    held_out: bool = False
    kind: str = ""
    seed: int = 20261

    @property
    def name(self) -> str:
        extra = f", guidance {self.guidance}" if self.guidance else ""
        extra += (f", {self.kind}s" if self.kind else "") + (", held out" if self.held_out else "")
        return f"{self.width}x{self.height}, {self.steps} steps{extra}"

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
    Question(1024, 1024, 16, kind="character"),
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


@dataclass(frozen=True)
class Answer:
    """The shares of right pictures, and the wrong prompts."""

    name: str
    question: Question
    all_correct: Share
    parts: dict[str, float]
    languages: dict[str, Share]
    shapes: dict[str, Share]  # pictures with the shape in them that are right in everything
    wrong: list[str]

    def line(self) -> str:
        shares = self.parts | {name: share.share for name, share in self.languages.items()}
        told = " ".join(f"{name} {value:.3f}" for name, value in shares.items())
        a = self.all_correct
        return f"{self.name}: {a.share:.3f} ({a.low:.3f} to {a.high:.3f}, n {a.count}; {told})"


class Drawer:
    """Draws through the server, and tells which engines drew."""

    def __init__(self, client: ZImageClient, model: str, kept: Path | None, minutes: float) -> None:
        self.client, self.model, self.kept = client, model, kept
        self.until = time.monotonic() + 60 * minutes
        self.found: list[Path] = []  # pictures of earlier runs
        instances = client.model(model).instances
        self.engines = sorted({f"{e.component}: {e.backend}" for instance in instances for e in instance.engines})

    def draw(self, question: Question, scenes: list[Scene]) -> list[Image | None]:
        """Image i from seed i, several at once; None where the time was over."""
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(lambda i: self._image(question, scenes[i].prompt, i), range(len(scenes))))

    def _image(self, question: Question, prompt: str, seed: int) -> Image | None:
        path = self.kept / question.name / f"{seed}.png" if self.kept else None
        if path and path.exists():
            self.found.append(path)
            return np.asarray(Pillow.open(path).convert("RGB"))
        if time.monotonic() > self.until:
            return None
        drawing = self.client.draw(
            prompt,
            model=self.model,
            seed=seed,
            width=question.width,
            height=question.height,
            num_inference_steps=question.steps,
            guidance_scale=question.guidance,
        )
        if any(engine.fallback_reason for engine in drawing.completed.engines):
            raise SystemExit(f"an engine fell back, so this would score another: {drawing.completed.engines}")
        if path:
            drawing.images[0].save(path)
        return np.asarray(drawing.images[0].pillow())


def ask(drawer: Drawer, question: Question) -> Answer | None:
    """Draw a question's prompts and score them; None if there was no time for any."""
    scenes = question.scenes()
    drawn = drawer.draw(question, scenes)
    told = {i: (scenes[i], score(image, scenes[i])) for i, image in enumerate(drawn) if image is not None}
    return judge(question, told) if told else None


def judge(question: Question, told: Told) -> Answer:
    """The shares of a question's scores, by the number of the prompt."""
    scenes, scores = zip(*told.values(), strict=True)
    languages = sorted({scene.language for scene in scenes})
    shapes = sorted({thing.shape for scene in scenes for thing in scene.things})
    return Answer(
        name=question.name,
        question=question,
        all_correct=Share.of([s.all_correct for s in scores]),
        parts={part: Share.of([getattr(s, part) for s in scores]).share for part in vars(scores[0])},
        languages={name: _share(told, [scene.language == name for scene in scenes]) for name in languages},
        shapes={name: _share(told, [_has(scene, name) for scene in scenes]) for name in shapes},
        wrong=[f"{i}: {scene.prompt} {_faults(s)}" for i, (scene, s) in told.items() if not s.all_correct],
    )


def _share(told: Told, wanted: list[bool]) -> Share:
    return Share.of([verdict.all_correct for (_, verdict), chosen in zip(told.values(), wanted, strict=True) if chosen])


def _has(scene: Scene, shape: str) -> bool:
    return any(thing.shape == shape for thing in scene.things)


def _faults(verdict: Score) -> list[str]:
    return [part for part, right in vars(verdict).items() if not right]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="127.0.0.1:8001", help="of the server (default: %(default)s)")
    parser.add_argument("--model", default="z-image-demo", help="default: %(default)s")
    parser.add_argument("--suite", choices=SUITES, default="quick", help="default: %(default)s")
    parser.add_argument("--images", type=Path, help="folder to keep the pictures in")
    parser.add_argument("--minutes", type=float, default=math.inf, help="draw no more after so many")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    answers: list[Answer] = []
    with ZImageClient(arguments.url, timeout=600) as client:
        drawer = Drawer(client, arguments.model, arguments.images, arguments.minutes)
        for question in SUITES[arguments.suite]:
            if answer := ask(drawer, question):
                answers.append(answer)
                print(answer.line(), flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(as_json(drawer, answers), ensure_ascii=False, indent=1) + "\n", "utf-8")


def as_json(drawer: Drawer, answers: list[Answer]) -> dict[str, Any]:
    """The answers with where they came from."""
    return {
        "benchmark": "demo_quality",
        **provenance(),
        "engines": drawer.engines,
        "pictures_of_earlier_runs": len(drawer.found),
        "answers": [asdict(answer) for answer in answers],
    }


if __name__ == "__main__":
    main()
