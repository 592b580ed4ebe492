"""Which versions a benchmark takes: those given are measured, or refused."""

import argparse
from pathlib import Path

import pytest

from benchmarks import choice, published
from benchmarks.choice import FP8, Choice, version_settings
from benchmarks.record import BenchmarkError
from export.manifest import Backend
from export.spec import Precision
from tests.unit.benchmarks.versions import write_version

ONNXRUNTIME, AOTINDUCTOR = Backend.ONNXRUNTIME, Backend.AOTINDUCTOR


def read(*arguments: str, only: Backend | None = None) -> Choice:
    parser = argparse.ArgumentParser()
    choice.add_arguments(parser, only=only)
    return choice.read(parser.parse_args(["--device", "cpu", *arguments]))


def test_a_model_is_the_row_of_its_engines(tmp_path: Path) -> None:
    first, other = (write_version(tmp_path / backend, backend) for backend in (ONNXRUNTIME, AOTINDUCTOR))
    both = ("--model", str(first.parent), "--model", str(other.parent))
    assert read(*both).models == {ONNXRUNTIME: first, AOTINDUCTOR: other}
    assert read(*both).backends == ("diffusers", "eager", ONNXRUNTIME, AOTINDUCTOR)
    assert read("--model", str(other.parent), only=AOTINDUCTOR).backends == (AOTINDUCTOR,)


def test_a_model_that_no_row_measures_is_refused(tmp_path: Path) -> None:
    given = ("--model", str(write_version(tmp_path / "m", ONNXRUNTIME).parent))
    with pytest.raises(BenchmarkError, match=r"m/1 would be the row onnxruntime, and the rows are aotinductor"):
        read(*given, "--backend", "aotinductor")
    with pytest.raises(BenchmarkError, match=r"m/1 would be the row onnxruntime, and the rows are aotinductor"):
        read(*given, only=AOTINDUCTOR)
    fp8 = ("--model", str(write_version(tmp_path / "n", AOTINDUCTOR, Precision.FP8).parent))
    with pytest.raises(BenchmarkError, match=f"n/1 would be the row {FP8}, and the rows are aotinductor"):
        read(*fp8, only=AOTINDUCTOR)


def test_two_models_of_one_row_are_refused(tmp_path: Path) -> None:
    models = [write_version(tmp_path / name, ONNXRUNTIME).parent for name in ("a", "b")]
    with pytest.raises(BenchmarkError, match=r"b: .*a/1 is the row onnxruntime already"):
        read(*(text for model in models for text in ("--model", str(model))))


def test_a_model_in_another_precision_is_refused(tmp_path: Path) -> None:
    model = write_version(tmp_path / "m", AOTINDUCTOR, Precision.BF16).parent
    with pytest.raises(BenchmarkError, match=r"m: its engines are bf16; fp32 is measured here"):
        read("--model", str(model))


def test_a_version_is_described_as_a_choice_is(tmp_path: Path) -> None:
    told = version_settings(write_version(tmp_path / "m", AOTINDUCTOR, Precision.BF16), "cuda:1")
    assert told == {"checkpoint": "the/checkpoint", "precision": "bf16", "device": "cuda:1"}
    assert told.keys() == read().settings().keys()


def test_a_checkpoint_in_the_checkout_is_the_same_however_it_is_written(tmp_path: Path) -> None:
    given = [read("--checkpoint", text).settings()["checkpoint"] for text in ("demo/x", str(Path("demo/x").absolute()))]
    assert given == ["demo/x", "demo/x"]
    assert read("--checkpoint", str(tmp_path)).settings()["checkpoint"] == str(tmp_path)


def test_images_of_random_weights_are_held_to_something_too(tmp_path: Path) -> None:
    random = Choice(tmp_path / f"{published.CHECKPOINT}-bf16", (), {}, tmp_path, "cuda", ("1024x1024",))
    assert (random.least_psnr(AOTINDUCTOR), random.least_psnr(FP8)) == (30.0, 25.0)
