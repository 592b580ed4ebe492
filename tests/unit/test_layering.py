"""Data flows one way; who may import whom is checked on the code's own import statements."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
# What a package's modules may import of the project, by prefix.
ALLOWED = {
    "export": ("export",),
    "verify": ("verify", "export.", "server.", "demo."),
    "client": ("client", "protos"),
    "demo": ("demo", "client"),
    "server/worker": ("export.", "server", "protos"),
    "server/frontend": ("export.spec", "export.manifest", "server", "protos"),
    "server/engines": ("export.", "server.engines", "server.errors", "server.requests", "server.config"),
}
SERVER_MAY_SEE = {
    "export.spec",
    "export.modules",
    "export.manifest",
    "export.validity",
    "export.rebuild",
    "export.errors",
    "export.checkpoint",
    "export.devices",
    "export.plans",
    "export.packages",
    "export.profiles",
    "export.parsing",
}
PROJECT = ("export", "server", "verify", "client", "protos", "demo", "benchmarks", "tests")
WIRE = ("protos", "tritonclient", "grpc_health", "grpc_reflection")


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def modules(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert found, package
    return found


@pytest.mark.parametrize("package", list(ALLOWED))
def test_a_package_imports_only_what_lies_below_it(package: str) -> None:
    for path in modules(package):
        for name in imports(path):
            if name.partition(".")[0] in PROJECT:
                assert name.startswith(ALLOWED[package]), f"{path} imports {name}"


def test_the_server_sees_only_the_exports_shared_parts() -> None:
    for path in modules("server"):
        for name in imports(path):
            if name.startswith("export"):
                assert ".".join(name.split(".")[:2]) in SERVER_MAY_SEE, f"{path} imports {name}"


def test_only_rpc_sees_wire_types() -> None:
    """Processes add servicers to their servers: nothing else."""
    exceptions = {"server/frontend/app.py", "server/worker/process.py"}
    for path in modules("server"):
        where = str(path.relative_to(ROOT))
        if not where.startswith("server/rpc/") and where not in exceptions:
            assert not [n for n in imports(path) if n.partition(".")[0] in WIRE], where


def test_the_protocols_see_the_repository_and_nothing_else_of_the_frontend() -> None:
    seen = {name for path in modules("server/rpc") for name in imports(path) if name.startswith("server.frontend")}
    assert seen == {"server.frontend.repository", "server.frontend.versions"}


@pytest.mark.parametrize(
    "name", ["turns", "costs", "frontend/forecast", "worker/batching", "worker/busyness", "worker/planner"]
)
def test_policy_has_no_torch_and_no_clock(name: str) -> None:
    assert not {"torch", "time", "threading", "asyncio"} & set(imports(ROOT / "server" / f"{name}.py"))


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("server.frontend.app", ("torch", "transformers", "diffusers", "PIL")),
        ("zserve", ("torch", "numpy", "server", "tritonclient")),
    ],
)
def test_a_process_stays_light(module: str, absent: tuple[str, ...]) -> None:
    program = f"import {module}, sys; print([m for m in {absent!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
