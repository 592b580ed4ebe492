"""The `zserve` command itself: what it says where there is nothing to run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import client
import zserve

ROOT = Path(__file__).parent.parent.parent
# What a client install does not have.
MISSING = ["torch", "numpy", "prometheus_client", "psutil", "grpc_health", "grpc_reflection", "tritonclient", "tqdm"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`zserve` as it is after `pip install zserve` alone."""
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({MISSING!r})); sys.argv = ['zserve', *{arguments!r}];"
        "import zserve; sys.exit(zserve.main())"
    )
    return subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        (["serve"], "server"),
        (["export", "--checkpoint", "demo/checkpoint", "--name", "x", "--backend", "eager"], "export"),
        (["inspect", "models/x"], "export"),
        (["parity", "models/x"], "export"),
        (["bench", "planner"], "bench"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_command_without_its_libraries_says_what_to_install(arguments: list[str], extra: str) -> None:
    done = run(*arguments)
    assert done.returncode == 1
    assert done.stderr.endswith(f"pip install 'zserve[{extra}]'\n")
    assert "Traceback" not in done.stderr


def test_an_unknown_command_is_told_the_known_ones() -> None:
    done = run("draw")
    assert done.returncode == 2
    assert "no command 'draw'; there are export, serve, generate" in done.stderr


def test_the_clients_are_imported_from_zserve() -> None:
    assert {*client.__all__, "main"} == set(zserve.__all__)
    assert all(getattr(zserve, name) is getattr(client, name) for name in client.__all__)


@pytest.mark.parametrize(
    ("arguments", "unbuffered"),
    [(["--help"], ""), (["--help"], "1"), (["generate", "--help"], "")],
    ids=["written at the end", "written at once", "written by argparse"],
)
def test_a_reader_that_stops_ends_a_command_without_a_word(arguments: list[str], unbuffered: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    command = [sys.executable, "-m", "zserve", *arguments]
    with os.fdopen(writer, "wb") as output:
        done = subprocess.run(
            command, cwd=ROOT, stdout=output, stderr=subprocess.PIPE, env=environment, text=True, check=False
        )
    assert (done.returncode, done.stderr) == (1, "")


def test_a_command_works_without_standard_output() -> None:
    command = ["bash", "-c", 'exec "$@" >&-', "bash", sys.executable, "-m", "zserve", "--version"]
    done = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
