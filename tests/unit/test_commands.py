"""The `zserve` command itself: what it says where there is nothing to run."""

import subprocess
import sys
from pathlib import Path

import pytest

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
