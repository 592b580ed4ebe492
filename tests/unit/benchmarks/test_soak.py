"""What `zserve bench soak` takes for a leak, and how it learns what a process has on a GPU."""

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.device_memory import process_mib, used_mib
from benchmarks.soak import GROWTH, SLACK, Held, Life, too_much

STEADY = Held(resident=800.0, device=1500.0, of_worker=None, peak=300.0)
LIFE = Life(before=500.0, loaded=STEADY, serving=[STEADY] * 10, unloaded=500.0)


def test_what_stays_as_it_is_is_no_leak() -> None:
    grown = replace(STEADY, resident=800.0 * (1 + GROWTH) + SLACK, device=1500.0 * (1 + GROWTH) + SLACK)
    assert too_much(replace(LIFE, serving=[STEADY, STEADY, grown], unloaded=500.0 + SLACK)) == []
    first = replace(STEADY, resident=10.0, device=10.0)  # until every size has been used
    assert too_much(replace(LIFE, serving=[first, STEADY, STEADY])) == []
    host = Held(resident=800.0, device=None, of_worker=None, peak=None)
    assert too_much(Life(None, host, [host] * 3, None)) == []


@pytest.mark.parametrize(
    ("life", "said"),
    [
        (replace(LIFE, serving=[STEADY, STEADY, replace(STEADY, resident=881.0)]), "the worker went from 800.0 to"),
        (replace(LIFE, serving=[STEADY, STEADY, replace(STEADY, device=1595.0)]), "the device went from 1500.0 to"),
        (replace(LIFE, unloaded=565.0), "500.0 MiB taken before the model was loaded, and 565.0 after"),
    ],
)
def test_what_grows_or_stays_taken_is_named(life: Life, said: str) -> None:
    (told,) = too_much(life)
    assert said in told


@pytest.mark.parametrize(("told", "expected"), [("7, 12\n42, 1234\n", 1234.0), ("42, [N/A]\n", None), ("", None)])
def test_the_driver_may_tell_what_a_process_has(
    told: str, expected: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\nprintf '{told}'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert process_mib(42) == expected


def test_without_a_gpu_there_is_nothing_to_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert process_mib(42) is None
    assert used_mib("cpu") is None
