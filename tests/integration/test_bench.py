"""`zserve bench` on the demo model: what is measured is what is named."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from benchmarks import demo_quality, preview, serving, soak
from benchmarks.cli import main
from benchmarks.diffusers_row import DiffusersRow
from benchmarks.record import BenchmarkError
from benchmarks.traffic import Manners, Traffic
from benchmarks.workload import Arrival
from export.spec import Component
from tests.conftest import CHECKPOINT, MODEL
from tests.integration.process import ServerProcess

BACKENDS = ("diffusers", "eager", "onnxruntime")


def bench(name: str, repository: Path, capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    """Runs it on the smallest image, once; its last line."""
    common = ("--checkpoint", str(CHECKPOINT), "--model", str(repository / MODEL), "--size", "64x64", "--device", "cpu")
    assert main([name, *common, "-n", "1", "--warm-up", "1", *options]) == 0
    told: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["benchmark"] == name
    return told


def test_components_names_every_engine_and_counts_its_calls(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = bench("components", repository, capsys)
    found = {(r["case"]["component"], r["case"]["engine"]): r for r in told["rows"]}
    assert set(found) == {(component.value, backend) for component in Component for backend in BACKENDS}
    for (_, engine), row in found.items():
        assert row["forwards"] == 4  # warm-up and measured, each after another
        assert row["ms"]["n"] == 1
        assert set(row["speedup"]) == {"diffusers", "eager"} - {engine}
        assert row["relative_error"] < 1e-3


def test_image_draws_what_diffusers_draws(
    repository: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plot, asked, draw = tmp_path / "image.svg", list[str](), DiffusersRow.draw

    def watched(row: DiffusersRow, prompts: list[str], **options: Any) -> Any:
        asked.extend(prompts)
        return draw(row, prompts, **options)

    monkeypatch.setattr(DiffusersRow, "draw", watched)
    told = bench("image", repository, capsys, "--steps", "2", "--batch", "2", "--plot", str(plot))
    assert [r["case"]["engine"] for r in told["rows"]] == list(BACKENDS)
    for row in told["rows"]:
        assert row["forwards"] == 2
        assert row["largest_difference"] <= 1
        assert set(row["engines"].values()) == {row["case"]["engine"]}
        stages = {stage: values["p50"] for stage, values in row["stages_ms"].items()}
        assert all(stages[component] > 0 for component in Component)
        assert sum(stages.values()) == pytest.approx(row["ms"]["p50"], rel=1e-3)
    assert plot.read_text().startswith("<?xml")
    assert len(set(asked)) == len(asked) == 4  # no prompt twice, so that no cache helps


def test_service_says_what_came_and_what_of_it_was_answered(
    repository: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    options = ("--size", "64x64", "--clients", "1", "--load", "0.5", "--seconds", "1", "-n", "1", "--deadline", "1")
    plot = tmp_path / "service.svg"
    model = ("--model", str(repository / MODEL), "--checkpoint", str(CHECKPOINT), "--device", "cpu")
    assert main(["service", *model, *options, "--plot", str(plot)]) == 0
    table, last = capsys.readouterr().out.rsplit("\n", 2)[:2]
    told = json.loads(last)
    cases = [tuple(r["case"].values()) for r in told["rows"]]
    assert cases == [
        ("one at a time", 1, "64x64", "diffusers", "onnxruntime"),
        ("one at a time", 1, "64x64", "onnxruntime"),
        ("closed", 1, "64x64", "onnxruntime"),
        ("open", 0.5, "64x64", "onnxruntime"),
    ]
    assert [r["precision"] for r in told["rows"]] == ["fp32"] * 4
    closed, opened = told["rows"][2:]
    requests = opened["requests"]
    assert requests["offered"] == max(1, round(0.5 * closed["throughput"])) == opened["rate"] == opened["ms"]["n"]
    assert sum(opened["statuses"].values()) == requests["offered"] >= requests["answered"] >= requests["good"]
    assert f"{requests['good']} of {requests['offered']}" in table
    assert plot.read_text().startswith("<?xml")


@pytest.mark.parametrize("name", ["service", "startup"])
def test_a_model_of_another_checkpoint_is_not_recorded_under_this_ones_name(
    name: str, repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(CHECKPOINT, tmp_path / "other")
    config = other / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"shift": 2.5}))
    model = ("--model", str(repository / MODEL), "--checkpoint", str(other), "--device", "cpu", "--size", "64x64")
    assert main([name, *model, "--backend", "onnxruntime", "-n", "1"]) == 1
    assert "give the --checkpoint that it was exported from" in capsys.readouterr().err


async def test_traffic_is_answered_and_checks_who_answered(server: ServerProcess) -> None:
    traffic = Traffic(server.url, "onnxruntime", ["a red circle", "a blue star"], steps=1)
    closed = await traffic.closed_loop(2, 0.01, [(64, 64)])
    assert len(closed) >= 2
    assert all(o.latency is not None for o in closed)
    arrivals = [Arrival(0.01 * n, "all", (64, 64), 1, 60.0) for n in range(3)]
    answered = await traffic.open_loop(arrivals, Manners.TELL)
    assert [o.arrival for o in answered] == arrivals
    assert all(o.good for o in answered)
    hopeless = [Arrival(0.0, "all", (64, 64), 1, patience) for patience in (1e-4, 0.0)]
    assert [o.latency for o in await traffic.open_loop(hopeless, Manners.TELL)] == [None, None]
    with pytest.raises(BenchmarkError, match="tensorrt is to be measured"):
        await Traffic(server.url, "tensorrt", ["a red circle"], steps=1).closed_loop(1, 0.01, [(64, 64)])


def test_demo_quality_scores_what_the_server_draws_and_keeps_the_pictures(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    question = demo_quality.Question(256, 256, 4)
    guided = demo_quality.Question(128, 96, 1, steps=2, guidance=1.5)
    monkeypatch.setitem(demo_quality.SUITES, "quick", (question, guided))
    small = partial(serving.repository, sizes=["64x64"], max_batch=1)  # to be there sooner
    monkeypatch.setattr(demo_quality, "repository", lambda version, sizes: small(version))

    def told() -> dict[str, Any]:
        options = ("demo_quality", "--model", str(repository / MODEL), "--device", "cpu", "--images", str(tmp_path))
        assert main(options) == 0
        record: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
        return record

    first = told()
    assert first["settings"] == {
        "engine": "onnxruntime",
        "checkpoint": "demo/checkpoint",
        "precision": "fp32",
        "device": "cpu",
        "suite": "quick",
        "pictures_of_earlier_runs": 0,
    }
    row, other = first["rows"]
    assert row["all_correct"]["right"] == row["all_correct"]["count"] == 4
    assert sum(share["count"] for share in row["languages"].values()) == 4
    assert row["wrong"] == []
    assert other["all_correct"]["count"] == 1

    (kept,) = tmp_path.glob(f"*/{question.name}*")
    (kept / "2.png").write_bytes((kept / "3.png").read_bytes())
    again = told()
    assert again["settings"]["pictures_of_earlier_runs"] == 5
    assert again["rows"][0]["all_correct"]["right"] == 3
    assert [text.partition(":")[0] for text in again["rows"][0]["wrong"]] == ["2"]
    assert again["rows"][1] == other


def test_soak_watches_the_worker_until_its_model_is_unloaded(
    repository: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, count in {"REQUESTS": 12, "EVERY": 4, "ROW": 3}.items():
        monkeypatch.setattr(soak, name, count)
    monkeypatch.setitem(soak.SIZES, "cpu", ((64, 64), (96, 64)))
    assert main(["soak", "--model", str(repository / MODEL), "--rows", "1", "--size", "64x64"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [held["resident"] > 0 for held in told["memory_mib"]["serving"]] == [True] * 3
    assert told["failed"] == []
    settings = {"engine": "onnxruntime", "checkpoint": "demo/checkpoint", "precision": "fp32", "device": "cpu"}
    assert told["settings"].items() >= settings.items()
    assert told["rows"][0]["p99_over_median"]["n"] == 1


def test_preview_says_what_it_measured(
    repository: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preview, "SIZES", (64,))
    monkeypatch.setattr(preview, "default_device", lambda: "cpu")
    assert main(["preview", "--model", str(repository / MODEL), "-n", "2"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    settings = {"engine": "onnxruntime", "checkpoint": "demo/checkpoint", "precision": "fp32", "device": "cpu"}
    assert told["settings"] == {**settings, "pairs": 2}
    assert told["rows"][0]["step_ms"]["n"] == 2
