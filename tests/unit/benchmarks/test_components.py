"""`zserve bench components`: what it measures, and that what it timed is checked."""

import argparse
import json
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import choice, components, diffusers_row
from benchmarks.choice import DIFFUSERS, Choice
from benchmarks.components import Case, Components, cases
from benchmarks.record import BenchmarkError, case_name
from benchmarks.subject import Counted, open_subject
from export.manifest import Backend
from export.spec import Component
from server.engines.served import ServedComponent
from tests.conftest import CHECKPOINT, ROOT
from tests.fakes import FakeEngine

SIZE = "64x64"


def test_where_there_is_nothing_to_measure_that_is_said(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    components.add_arguments(parser)
    given = ["--checkpoint", str(CHECKPOINT), "--device", "cpu", "--component", "image_decoder", "--batch", "4"]
    with pytest.raises(BenchmarkError, match="takes one image a call \\(--batch 1\\)"):
        components.run(parser.parse_args(given))


def test_what_the_makefile_measures_has_the_cases_of_the_committed_record() -> None:
    """Or else `make bench-check` could not pass."""
    told = subprocess.run(
        ["make", "--dry-run", "bench-check"], cwd=ROOT, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    line, again = [line.strip() for line in told.stdout.splitlines() if " bench components " in line]
    assert again.split(" --output ")[0] == line.split(" --output ")[0]
    parser = argparse.ArgumentParser()
    components.add_arguments(parser)
    parser.add_argument("--output")
    chosen = choice.read(parser.parse_args([*shlex.split(line)[3:], "--device", "cpu"]))
    measured = {case_name(case.on(engine)) for case in cases(chosen, list(Component)) for engine in chosen.backends}
    record = json.loads((ROOT / "benchmarks" / "results" / "components_cpu.json").read_text())
    assert [name for r in record["rows"] if (name := case_name(r["case"])) not in measured] == []


@pytest.fixture(scope="module")
def measured() -> Components:
    """diffusers and eager over the demo checkpoint."""
    backends = (DIFFUSERS, Backend.EAGER.value)
    chosen = Choice(CHECKPOINT, backends, models={}, repository=Path(), device="cpu", sizes=(SIZE,))
    subject, pipeline = open_subject(chosen)
    options = argparse.Namespace(warm_up=1, repetitions=2)
    return Components(subject, diffusers_row.rows(pipeline, subject.device, backends), options)


@pytest.mark.parametrize("batch", [1, 2])
def test_diffusers_encoder_is_held_against_eager_by_its_velocity(
    measured: Components, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    row, eager = measured.measure(Case(Component.PROMPT_ENCODER, SIZE, batch))
    assert row["relative_error"] < 1e-3
    assert (row["forwards"], eager["forwards"]) == (6, 6)  # warmed up or timed, and each after another
    diffusers = measured.diffusers[DIFFUSERS]
    embeddings = diffusers._embeddings
    monkeypatch.setattr(diffusers, "_embeddings", lambda prompts: embeddings(["a dog"] * len(prompts)))
    with pytest.raises(BenchmarkError, match=r"prompt_encoder on diffusers is .* from eager"):
        measured.measure(Case(Component.PROMPT_ENCODER, SIZE, batch))


@pytest.mark.parametrize("wrong", [1, 7])
def test_the_first_output_and_the_last_timed_one_are_checked(measured: Components, wrong: int) -> None:
    """Such as one that a recorded graph makes, which the first call is not."""
    subject, case = measured.subject, Case(Component.IMAGE_DECODER, SIZE, 1)
    eager = subject.engines[Backend.EAGER][case.component]
    engine = FakeEngine(lambda inputs: eager.run(inputs) + 30 * (engine.calls == wrong))
    served = ServedComponent(subject.specs[case.component], engine, lambda: engine)
    engines = {**subject.engines, "onnxruntime": {case.component: Counted(served, Backend.ONNXRUNTIME)}}
    chosen = replace(subject.choice, backends=("onnxruntime",))
    benchmark = replace(measured, subject=replace(subject, choice=chosen, engines=engines))
    with pytest.raises(BenchmarkError, match=r"image_decoder on onnxruntime is .* from eager"):
        benchmark.measure(case)
    assert benchmark.measure(case)[0]["relative_error"] == 0.0
