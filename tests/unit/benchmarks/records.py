"""Records as benchmarks write them, made up."""

from typing import Any

from benchmarks.record import Record, percentiles

MACHINE = {"cpu": "one", "cores": 2, "gpu": None, "system": "Linux", "python": "3.11"}


def record(benchmark: str, *rows: dict[str, Any]) -> Record:
    return {
        "benchmark": benchmark,
        "machine": MACHINE,
        "versions": {"torch": "2.13.0"},
        "commit": "0123456789abcdef",
        "date": "2026-01-02T03:04:05+00:00",
        "settings": {"device": "cpu"},
        "rows": list(rows),
    }


def engine_row(engine: str, ms: float, *, batch: int = 1, size: str = "256x256", **speedup: float) -> dict[str, Any]:
    return {
        "case": {"component": "denoiser", "size": size, "batch": batch, "engine": engine},
        "ms": percentiles([ms]),
        "speedup": {other: percentiles([ratio]) for other, ratio in speedup.items()},
        "stages_ms": {"denoiser": percentiles([ms / 2]), "other": percentiles([ms / 2])},
        "forwards": 8,
    }


def components(compiled_ms: float = 50.0) -> Record:
    return record(
        "components",
        engine_row("diffusers", 100.0),
        engine_row("eager", 90.0, diffusers=100 / 90),
        engine_row("onnxruntime", compiled_ms, diffusers=100 / compiled_ms, eager=90 / compiled_ms),
    )
