"""`zserve bench compare` and `zserve bench check`, on records that are made up."""

import json
from pathlib import Path

import pytest

from benchmarks.cli import main
from benchmarks.record import Record, write
from tests.unit.benchmarks.records import MACHINE, components, engine_row, record


def run(tmp_path: Path, command: str, a: Record, b: Record, *more: str) -> int:
    write(tmp_path / "a.json", a)
    write(tmp_path / "b.json", b)
    return main([command, str(tmp_path / "a.json"), str(tmp_path / "b.json"), *more])


def test_compare_sets_equal_cases_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slower = components(compiled_ms=75.0) | {"versions": {"torch": "2.14.0"}}
    slower["rows"] += [engine_row("tensorrt", 10.0)]
    assert run(tmp_path, "compare", components(), slower) == 0
    printed = capsys.readouterr().out
    assert "versions differ: torch: 2.13.0 and 2.14.0" in printed
    told = json.loads(printed.splitlines()[-1])
    compiled = next(r for r in told["rows"] if r["case"]["engine"] == "onnxruntime")
    assert compiled["figures"]["ms"] == [50.0, 75.0, 1.5]
    assert compiled["figures"]["speedup.eager"][2] == pytest.approx(2 / 3, rel=1e-3)
    alone = "component denoiser, size 256x256, batch 1, engine tensorrt"
    assert told["only_in"] == {"A": [], "B": [alone]}
    assert f"\nonly in B: {alone}\n" in printed


def test_compare_shows_what_only_one_of_them_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A median that is over the deadline is None: a figure that is gone may be the worst of all."""
    late = components()
    late["rows"][2]["ms"] = dict.fromkeys(late["rows"][2]["ms"])
    assert run(tmp_path, "compare", components(), late) == 0
    printed = capsys.readouterr().out
    assert json.loads(printed.splitlines()[-1])["rows"][2]["figures"]["ms"] == [50.0, None, None]
    (line,) = [told for told in printed.splitlines() if "engine onnxruntime" in told and " ms " in told]
    assert line.split()[-3:] == ["50.00", "-", "-"]


@pytest.mark.parametrize("command", ["compare", "check"])
def test_both_say_what_else_is_not_as_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    other = components() | {"versions": {"torch": "2.99"}, "machine": MACHINE | {"cores": 8}}
    assert run(tmp_path, command, other, components()) == 0
    said = capsys.readouterr().out
    assert "versions differ: torch: 2.99 and 2.13.0\n" in said
    assert "machine differ: cores: 8 and 2\n" in said


def test_compare_says_which_record_is_which_and_what_was_set_otherwise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = components() | {"settings": {"device": "cuda"}}
    a["rows"] += [engine_row("tensorrt", 10.0)]
    assert run(tmp_path, "compare", a, components()) == 0
    said = capsys.readouterr().out
    told = json.loads(said.splitlines()[-1])
    assert told["compared"] == [str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    assert told["only_in"] == {"A": ["component denoiser, size 256x256, batch 1, engine tensorrt"], "B": []}
    assert "settings differ: device: cuda and cpu\n" in said


def test_compare_shows_a_figure_that_is_new_or_has_become_zero(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    b = components()
    b["rows"][2] |= {"failed": 1, "forwards": 0}
    assert run(tmp_path, "compare", components(), b) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"][2]["figures"]
    assert (found["failed"], found["forwards"]) == ([None, 1.0, None], [8.0, 0.0, 0.0])


def test_compare_refuses_what_has_nothing_in_common(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "compare", components(), components() | {"benchmark": "image"}) == 1
    assert "A is of components and B of image" in capsys.readouterr().err
    assert run(tmp_path, "compare", components(), record("components", engine_row("eager", 1.0, batch=2))) == 1
    assert "no row in common" in capsys.readouterr().err


@pytest.mark.parametrize(("compiled_ms", "status"), [(40.0, 0), (50.0, 0), (54.0, 0), (57.0, 1), (90.0, 1)])
def test_check_fails_on_a_lost_speed_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], compiled_ms: float, status: int
) -> None:
    """A tenth of the speed-up at 50 ms is gone at 55.6 ms."""
    assert run(tmp_path, "check", components(compiled_ms), components()) == status
    said = capsys.readouterr().out
    assert ("lost over 10 %" in said) == bool(status)
    assert "engine onnxruntime, over eager" in said
    lost = json.loads(said.splitlines()[-1])["failed"]
    assert [name.rpartition(" over ")[2] for name in lost] == ["diffusers", "eager"] * status


def test_what_one_of_several_runs_has_is_not_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, compiled_ms in (("slow", 90.0), ("good", 50.0), ("slower", 95.0), ("committed", 50.0)):
        write(tmp_path / f"{name}.json", components(compiled_ms))

    def check(*names: str) -> int:
        return main(["check", *(str(tmp_path / f"{name}.json") for name in (*names, "committed"))])

    assert check("slow", "good") == 0
    assert check("good", "slow") == 0
    capsys.readouterr()
    assert check("slow", "slower") == 1
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [r["measured"] for r in rows] == pytest.approx([100 / 90, 1.0], rel=1e-3)
    assert [r["loss_percent"] for r in rows] == pytest.approx([100 * (1 - 50 / 90)] * 2, rel=1e-3)


def test_of_several_runs_the_last_is_the_one_that_tells_of_the_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    busy = record("components", engine_row("eager", 180.0), engine_row("onnxruntime", 100.0, diffusers=2.0, eager=1.8))
    busy["versions"] = {"torch": "2.99"}
    for name, made in (("busy", busy), ("today", components()), ("committed", components())):
        write(tmp_path / f"{name}.json", made)
    for names, warned in ((("busy", "today"), False), (("today", "busy"), True)):
        assert main(["check", *(str(tmp_path / f"{name}.json") for name in (*names, "committed"))]) == 0
        said = capsys.readouterr().out
        assert (("warning: " in said), ("versions differ" in said)) == (warned, warned)


@pytest.mark.parametrize(("p90", "status"), [(1.85, 0), (1.65, 0), (1.6, 1)])
def test_a_lower_median_of_scattered_repetitions_is_no_loss(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], p90: float, status: int
) -> None:
    """Of 1.8 times as fast then, 1.62 has to be reached by one repetition in ten."""
    today = components()
    today["rows"][2]["speedup"]["eager"] = {"p10": 1.2, "p50": 1.4, "p90": p90}
    committed = components()
    committed["rows"][2]["speedup"]["eager"] = {"p10": 1.7, "p50": 1.8, "p90": 5.0}
    assert run(tmp_path, "check", today, committed) == status
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"][1]
    assert (found["measured"], found["measured_p90"]) == (1.4, p90)


@pytest.mark.parametrize(("measured", "status"), [(1.7, 0), (1.5, 1)])
def test_a_speed_up_without_percentiles_is_held_by_its_median(tmp_path: Path, measured: float, status: int) -> None:
    today, committed = components(), components()
    today["rows"][2]["speedup"]["eager"] = {"p50": measured}
    committed["rows"][2]["speedup"]["eager"] = 1.8
    assert run(tmp_path, "check", today, committed) == status


def test_a_loss_as_large_as_is_tolerated_is_tolerated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    today, committed = components(), components()
    today["rows"][2]["speedup"], committed["rows"][2]["speedup"] = {"eager": 1.0}, {"eager": 2.0}
    assert run(tmp_path, "check", today, committed, "--tolerance=50") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["tolerance_percent"] == 50.0
    assert run(tmp_path, "check", today, committed, "--tolerance=49.9") == 1
    assert run(tmp_path, "check", today, committed, "--tolerance=100") == 0


@pytest.mark.parametrize(("eager_ms", "moved"), [(180.0, 2.0), (110.0, None), (45.0, 0.5)])
def test_check_looks_at_ratios_alone_and_warns_of_another_speed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], eager_ms: float, moved: float | None
) -> None:
    """All of the machine is half as fast today, or twice."""
    today = record(
        "components", engine_row("eager", eager_ms), engine_row("onnxruntime", 100.0, diffusers=2.0, eager=1.8)
    )  # fmt: skip
    assert run(tmp_path, "check", today, components()) == 0
    said = capsys.readouterr().out
    name = "component denoiser, size 256x256, batch 1, engine eager"
    assert json.loads(said.splitlines()[-1])["moved"] == ({name: moved} if moved else {})
    assert (f"{name}: {moved:.2f} times" if moved else "") in said
    assert ("warning: " in said) == (moved is not None)


def test_check_refuses_what_was_measured_in_another_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """How often does not matter."""
    today = components() | {
        "settings": {"device": "cpu", "size": "512x512", "repetitions": 3, "warm_up": 1, "seconds": 2.0}
    }
    committed = components() | {"settings": {"device": "cpu", "size": "256x256", "repetitions": 10}}
    assert run(tmp_path, "check", today, committed) == 1
    assert "the settings differ: size: 512x512 and 256x256; run the benchmark" in capsys.readouterr().err
    today["settings"]["size"] = "256x256"
    assert run(tmp_path, "check", today, committed) == 0


@pytest.mark.parametrize(
    "speedup",
    [
        None,
        1.5,
        *({"eager": values} for values in (None, {}, {"p50": None}, {"p50": "fast"}, {"p50": 0.0}, {"p50": -1})),
    ],
)
def test_check_says_which_speed_up_is_no_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], speedup: object
) -> None:
    damaged = components()
    damaged["rows"][2]["speedup"] = speedup
    for pair in ((damaged, components()), (components(), damaged)):
        assert run(tmp_path, "check", *pair) == 1
        assert "batch 1, engine onnxruntime: its speed-ups are" in capsys.readouterr().err


@pytest.mark.parametrize("ms", [None, 0.0, "fast", {}, {"p50": None}, {"p50": 0.0}])
def test_check_needs_neither_a_machine_nor_the_baselines_times(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], ms: object
) -> None:
    """Old records, or damaged ones: their speed-ups are there."""
    damaged = components()
    del damaged["machine"]
    damaged["rows"][1]["ms"] = ms
    for pair in ((damaged, components()), (components(), damaged)):
        assert run(tmp_path, "check", *pair) == 0
        assert "warning: " not in capsys.readouterr().out
        assert run(tmp_path, "compare", *pair) == 0


def test_check_fails_where_nothing_was_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "check", record("components", engine_row("eager", 1.0)), components()) == 1
    assert "not measured any more" in capsys.readouterr().err
    assert run(tmp_path, "check", components(), record("components", engine_row("eager", 1.0))) == 1
    assert "no speed-ups to check" in capsys.readouterr().err
    assert run(tmp_path, "check", components() | {"benchmark": "image"}, components()) == 1
    assert "one is of image" in capsys.readouterr().err


def test_check_takes_another_tolerance(tmp_path: Path) -> None:
    assert run(tmp_path, "check", components(57.0), components(), "--tolerance", "20") == 0
    for wrong in ("-1", "101", "nan", "much"):
        with pytest.raises(SystemExit):
            run(tmp_path, "check", components(), components(), f"--tolerance={wrong}")
