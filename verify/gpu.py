"""`zserve verify`: builds every kind of engine that this machine can, and checks and times those that it can run.

Each backend is exported and compared with eager in processes of their own, so one that fails, or kills its process,
is a line of the report like any other. Writes OUT.json and OUT.md.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from export.cli import NOT_POSSIBLE, image_size
from export.devices import checked_device
from export.errors import UnsupportedError
from export.manifest import Backend
from export.spec import Precision
from export.validity import BINDING_LIBRARIES, installed_version
from verify.images import psnr_text
from verify.machine import commit, cpu_name, cpu_quota

ON_CUDA = (Backend.TENSORRT, Backend.TENSORRT_RTX, Backend.AOTINDUCTOR)
ON_CPU = (Backend.ONNXRUNTIME, Backend.AOTINDUCTOR, Backend.TENSORRT_RTX)
AHEAD_OF_TIME = "sm89,sm120"  # what TensorRT-RTX builds for where there is no GPU

COMPILED = [backend for backend in Backend if backend is not Backend.EAGER]
STATUSES = f"""exit status: 0 what is possible here is right, or was built for other machines and not run; 1 a backend
that is possible here is not built, does not run or is past its tolerance; {NOT_POSSIBLE} no backend is possible here"""


@dataclass(frozen=True)
class Verdict:
    """The result of one backend."""

    backend: Backend
    built: bool = False
    right: bool | None = None  # it is built, runs and is as close to eager as it must be; None: not possible here
    export_seconds: float = 0.0
    problem: str = ""  # why it was not built, or not run
    parity: dict[str, Any] = field(default_factory=dict)  # as `zserve parity --json` gives it
    version: dict[str, Any] = field(default_factory=dict)  # as `zserve inspect --json` gives it


def main(argv: Sequence[str]) -> int:
    """Runs all backends; returns the exit status."""
    parser = argparse.ArgumentParser(prog="zserve verify", description=__doc__, epilog=STATUSES)
    parser.add_argument("--checkpoint", default="demo/checkpoint", help="default: %(default)s")
    parser.add_argument(
        "--default-size", type=image_size, default="256x256", help="default: %(default)s; 1024x1024 for the real model"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda where there is one)")
    parser.add_argument("--backend", type=Backend, choices=COMPILED, action="append", help="default: all that fit")
    parser.add_argument("--precision", type=Precision, choices=list(Precision), help="default: as zserve export has it")
    parser.add_argument("--images", type=int, default=4, help="images drawn with each (default: %(default)s)")
    parser.add_argument("--repository", type=Path, help="keep the engines here and reuse them (default: deleted)")
    parser.add_argument("--out", type=Path, default=Path("out/verify"), help="report without suffix (%(default)s)")
    arguments = parser.parse_args(argv)
    try:
        arguments.device = checked_device(arguments.device)
    except UnsupportedError as error:
        print(f"zserve verify: {error}", file=sys.stderr)
        return NOT_POSSIBLE
    backends = arguments.backend or (ON_CUDA if arguments.device.startswith("cuda") else ON_CPU)
    with _repository(arguments.repository) as repository:
        verdicts = [verify(backend, arguments, repository) for backend in backends]
    settings = {name: getattr(arguments, name) for name in ("checkpoint", "default_size", "images")}
    write_report(arguments.out, machine(arguments.device), settings, verdicts)
    print(f"report: {arguments.out}.md and {arguments.out}.json")
    return status(verdicts)


def status(verdicts: Sequence[Verdict]) -> int:
    """The exit status, by `STATUSES`."""
    if any(v.right is False for v in verdicts):
        return 1
    return 0 if any(v.built for v in verdicts) else NOT_POSSIBLE


@contextmanager
def _repository(kept: Path | None) -> Iterator[Path]:
    """`kept`, or a temporary folder that is deleted after the block."""
    if kept is not None:
        yield kept
        return
    with tempfile.TemporaryDirectory(prefix="zserve-verify-") as folder:
        yield Path(folder)


def verify(backend: Backend, arguments: argparse.Namespace, repository: Path) -> Verdict:
    """Exports one backend and compares it with eager."""
    print(f"{backend}: building ...", flush=True)
    started = time.perf_counter()
    name, device = f"verified-{backend}", ("--device", arguments.device)
    options = ("--checkpoint", arguments.checkpoint, "--default-size", arguments.default_size, *device)
    elsewhere = backend is Backend.TENSORRT_RTX and not arguments.device.startswith("cuda")
    target = ("--target", AHEAD_OF_TIME) if elsewhere else ()
    precision = ("--precision", arguments.precision) if arguments.precision else ()
    place = ("--repository", repository, "--name", name)
    export = _zserve("export", *options, *target, *precision, *place, "--backend", backend)
    seconds = round(time.perf_counter() - started, 1)
    if export.returncode != 0:
        return _not_built(backend, export, seconds)
    model = repository / name
    inspected = _zserve("inspect", model, *device, "--json")
    if inspected.returncode != 0:
        return Verdict(backend, built=True, right=False, export_seconds=seconds, problem=_last_words(inspected))
    built = Verdict(backend, built=True, export_seconds=seconds, version=json.loads(inspected.stdout))
    if elsewhere:
        return replace(built, problem=f"built for {AHEAD_OF_TIME}, and not run, as this machine has no GPU")
    print(f"{backend}: comparing with eager ...", flush=True)
    parity = _zserve("parity", model, *device, "--json", "--images", arguments.images)
    if not parity.stdout.startswith("{"):
        return replace(built, right=False, problem=_last_words(parity))
    measured = json.loads(parity.stdout)
    problem = "; ".join(c["not_run"] for c in measured["components"] if c["not_run"])
    # It was built for this device, so a verdict of None, that there is nothing to compare, counts as wrong.
    return replace(built, right=measured["within_tolerance"] is True, problem=problem, parity=measured)


def _not_built(backend: Backend, export: subprocess.CompletedProcess[str], seconds: float) -> Verdict:
    """An export checks its engines itself, so a failed export is as bad as a failed comparison."""
    possible, problem = export.returncode != NOT_POSSIBLE, _last_words(export)
    print(f"{backend}: {'FAILED' if possible else 'not possible here'}: {problem}", flush=True)
    return Verdict(backend, right=False if possible else None, export_seconds=seconds, problem=problem)


def _zserve(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "zserve", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _last_words(done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode < 0:
        return f"its process was killed by signal {-done.returncode}"
    said = [line for line in done.stderr.splitlines() if line.strip()]
    return said[-1] if said else f"its process ended with status {done.returncode} and said nothing"


def machine(device: str) -> dict[str, Any]:
    """The machine that the report is about."""
    import torch

    cuda = device.startswith("cuda")
    libraries = {library for names in BINDING_LIBRARIES.values() for library in names}
    return {
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "cpu": cpu_name(),
        **cpu_quota(),
        "compute_capability": ".".join(map(str, torch.cuda.get_device_capability(device))) if cuda else None,
        "memory_gb": round(torch.cuda.get_device_properties(device).total_memory / 1e9, 1) if cuda else None,
        "cuda": torch.version.cuda,
        "libraries": {name: installed_version(name) for name in sorted(libraries)},
        "zserve": installed_version("zserve"),
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def write_report(out: Path, here: dict[str, Any], settings: dict[str, Any], verdicts: list[Verdict]) -> None:
    """Writes `out`.json and `out`.md; a dot in its name does not begin a suffix."""
    out.parent.mkdir(parents=True, exist_ok=True)
    whole = {"machine": here, "settings": settings, "backends": [asdict(v) for v in verdicts]}
    out.with_name(f"{out.name}.json").write_text(json.dumps(whole, indent=2) + "\n", "utf-8")
    out.with_name(f"{out.name}.md").write_text(as_markdown(here, settings, verdicts), "utf-8")


def as_markdown(here: dict[str, Any], settings: dict[str, Any], verdicts: list[Verdict]) -> str:
    """The report for people."""
    lines = [f"# zserve on {here['device']}", ""]
    lines += [f"* {key}: {value}" for key, value in here.items() if key not in ("device", "libraries")]
    lines += [f"* {name}: {version or 'not installed'}" for name, version in here["libraries"].items()]
    lines += [
        "",
        f"Checkpoint {settings['checkpoint']}; milliseconds are of one call at {settings['default_size']}, the median.",
        "",
        "| backend | built | precision | component | relative error | tolerance | ms | eager ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [row for verdict in verdicts for row in _rows(verdict)]
    lines += ["", *(line for verdict in verdicts for line in _notes(verdict))]
    return "\n".join(lines) + "\n"


def _rows(verdict: Verdict) -> list[str]:
    built = f"{verdict.export_seconds} s" if verdict.built else "no" if verdict.right is None else "FAILED"
    start = f"| {verdict.backend} | {built} |" + (f" {verdict.version['precision']} |" if verdict.version else " |")
    if not verdict.parity:
        return [f"{start} | | | | |"]
    return [
        f"{start} {c['component']} | not run | | | |"
        if c["not_run"]
        else f"{start} {c['component']} | {c['relative_error']:.1e} | {c['tolerance']:.0e} | "
        f"{c['milliseconds']:.2f} | {c['eager_milliseconds']:.2f} |"
        for c in verdict.parity["components"]
    ]


def _notes(verdict: Verdict) -> list[str]:
    notes = [f"* {verdict.backend}: {verdict.problem}"] if verdict.problem else []
    if verdict.parity and verdict.parity["images"]:
        images, least = verdict.parity["images"], verdict.parity["least_psnr"]
        notes.append(
            f"* {verdict.backend}: {images['images']} images, {psnr_text(images['worst_psnr'], least)}, at most "
            f"{images['largest_difference']} grey levels from eager"
        )
        if images["score"] is not None:
            notes.append(
                f"* {verdict.backend}: {images['score']:.0%} of the demo's images show what was asked for, and "
                f"{images['eager_score']:.0%} of eager's"
            )
    return notes
