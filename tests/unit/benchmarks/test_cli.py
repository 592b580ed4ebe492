"""`zserve bench`: what it offers, what it refuses, and that every benchmark keeps to the interface."""

import importlib
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from benchmarks import cli, plots, simulation
from benchmarks.record import check_writable, write
from export.manifest import Backend
from tests.conftest import ROOT
from tests.unit.benchmarks.records import components
from tests.unit.benchmarks.versions import write_version


@pytest.fixture
def version(tmp_path: Path) -> Path:
    """One without engines."""
    return write_version(tmp_path / "model", Backend.EAGER)


@pytest.mark.parametrize("name", list(cli.BENCHMARKS))
def test_every_benchmark_states_its_question_method_and_units(name: str) -> None:
    module = importlib.import_module(f"benchmarks.{name}")
    assert module.__doc__ is not None
    assert "?" in module.__doc__.partition("Method:")[0]
    assert "\nMethod:" in module.__doc__
    assert "\nUnits:" in module.__doc__
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"])
    assert ended.value.code == 0


def test_the_command_lists_its_benchmarks(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    listed = capsys.readouterr().out
    assert [name for name in cli.BENCHMARKS if f"    {name} " not in listed] == []


def test_a_client_install_does_not_load_benchmarks() -> None:
    program = "import zserve, sys; print([m for m in sys.modules if m.startswith('benchmarks')])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["nope"], 2, "there are components, image, service"),
        (["components", "--model", "no/where"], 1, "`zserve export` makes one"),
        (["components", "--random-weights", "--device", "cpu"], 1, "needs a GPU with 24 GB"),
        (["components", "--checkpoint", "no/where", "--backend", "eager"], 1, "no checkpoint folder"),
        (["components", "--device", "foo"], 1, "--device foo is not on this machine; cpu"),
        (["quality", "--device", "foo"], 1, "--device foo is not on this machine; cpu"),
        (
            ["service", "--backend", "diffusers", "--device", "cpu"],
            1,
            "aotinductor, eager, aotinductor-fp8 are accepted",
        ),
        (
            ["startup", "--backend", "diffusers", "--device", "cpu"],
            1,
            "aotinductor, eager, aotinductor-fp8 are accepted",
        ),
        (["quality", "--device", "cuda:99"], 1, "--device cuda:99 is not on this machine; cpu"),
        (["planner", "--output", "."], 1, "--output . cannot be written (Is a directory)"),
        (["planner", "--output", "/proc/none/a.json"], 1, "--output /proc/none/a.json cannot be written"),
        (["simulation", "--plot", "/dev/null/a.svg"], 1, "--plot /dev/null/a.svg cannot be written"),
        (["image", "--plot", "a.pdf"], 1, ".svg and .png are accepted"),
    ],
)
def test_bad_input_is_told_what_is_accepted(
    arguments: list[str], status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == status
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--size", "100x100"], "multiples of 16 from 64 on"),
        (["--size", "256"], "WIDTHxHEIGHT"),
        (["--backend", "nope"], "diffusers"),
        (["--batch", "0"], "a whole number from 1 on"),
    ],
)
def test_bad_options_are_told_what_is_accepted(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["components", *arguments])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["packages", "--backend", "eager"], "unrecognized arguments: --backend"),
        (["preview", "-n", "51"], "a whole number from 1 to 50"),
        (["soak", "--size", "foo"], "WIDTHxHEIGHT"),
        (["protocol", "--perf-analyzer", "no/where"], "'no/where' is no program that can be run"),
        (["protocol", "--perf-analyzer", sys.executable, "--model", "no/where"], "no/where is no exported model"),
        (["quality", "--images", "0"], "a whole number from 1 on"),
    ],
)
def test_what_could_only_fail_later_is_refused_at_once(
    arguments: list[str], said: str, version: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, *options = arguments
    model = ("--model", str(version)) if name in ("preview", "soak") else ()
    with pytest.raises(SystemExit) as ended:
        cli.main([name, *model, *options])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_a_folder_that_is_there_is_not_built_in_and_not_deleted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["full_size_export", "denoiser", "--folder", str(tmp_path)]) == 1
    assert f"--folder {tmp_path} is there; a new one is made" in capsys.readouterr().err
    assert tmp_path.is_dir()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["preview"], "has no engines; a compiled version is measured"),
        (["soak", "--device", "foo"], "--device foo is not on this machine; cpu"),
        (["soak"], "cannot be loaded, for the reason above"),
    ],
)
def test_a_version_that_cannot_be_measured_is_named(
    arguments: list[str], said: str, version: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is eager, and takes no image as large as those that soak would warm."""
    assert cli.main([arguments[0], "--model", str(version), *arguments[1:]]) == 1
    assert said in capsys.readouterr().err
    assert "gauges" not in [thread.name for thread in threading.enumerate()]  # the frontend's, which has ended with it


@pytest.mark.parametrize(
    ("name", "option"),
    [("service", "--load"), ("service", "--seconds"), ("service", "--deadline"), ("scheduling", "--seconds")],
)
@pytest.mark.parametrize("value", ["0", "-1"])
def test_a_load_of_nothing_is_refused(name: str, option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([name, option, value])
    assert ended.value.code == 2
    assert f"argument {option}: {value!r}: a number above 0 is accepted" in capsys.readouterr().err


def test_plot_is_offered_where_there_is_a_picture(capsys: pytest.CaptureFixture[str]) -> None:
    offered = set()
    for name in cli.BENCHMARKS:
        with pytest.raises(SystemExit):
            cli.main([name, "--help"])
        offered |= {name} if "--plot" in capsys.readouterr().out else set()
    assert offered == set(plots.PLOTS)


def test_output_and_last_line_are_the_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "a.json", components())
    output = tmp_path / "out" / "c.json"
    assert cli.main(["compare", *[str(tmp_path / "a.json")] * 2, "--output", str(output)]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last == json.loads(output.read_text())
    assert last["benchmark"] == "compare"
    assert [len(last["load_average"][when]) for when in ("before", "after")] == [3, 3]


def test_a_measurement_outlives_its_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No disk can be full, and no picture fail, before the record is printed."""

    def fail(*_: object) -> None:
        raise OSError("no space left")

    output = tmp_path / "a.json"
    monkeypatch.setattr(simulation, "run", lambda options: {"rows": []})
    monkeypatch.setattr(plots, "draw", fail)
    monkeypatch.setattr(cli, "draw", fail, raising=False)
    with pytest.raises(OSError, match="no space"):
        cli.main(["simulation", "--output", str(output), "--plot", str(tmp_path / "a.svg")])
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert json.loads(output.read_text()) == printed
    monkeypatch.setattr(cli, "write", fail)
    with pytest.raises(OSError, match="no space"):
        cli.main(["simulation", "--output", str(output)])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["benchmark"] == "simulation"


def test_a_path_is_tried_without_a_trace(tmp_path: Path) -> None:
    check_writable("--output", tmp_path / "new" / "a.json")
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "old.json").write_text("kept")
    check_writable("--output", tmp_path / "old.json")
    assert (tmp_path / "old.json").read_text() == "kept"
