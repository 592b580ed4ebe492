"""Compares built engines with eager, in a process of its own.

An engine can kill the process that loads it (an AOTInductor package linked against the wrong libstdc++ does), so the
exporter has every engine loaded and run by another process, `python -m export.parity`, before it publishes a version.
That process reads one `ParityCheck` a line and answers with one `Parity`, or `NO_MEMORY`; all are JSON. It starts
beside the first build, so its imports cost no time of their own.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from export.errors import BuildError, ParityError, ResourcesError
from export.manifest import Backend, Parity
from export.parsing import parsed
from export.spec import Component, ModelDimensions, Precision, ShapePoint, example_inputs

if TYPE_CHECKING:
    from torch import Tensor


NO_MEMORY = "no_memory"  # in an answer: what the allocator said, instead of a `Parity`


@dataclass(frozen=True)
class ParityCheck:
    """One engine to be compared with eager."""

    checkpoint: Path
    component: Component
    backend: Backend
    file: Path
    precision: Precision
    device: str
    dimensions: ModelDimensions
    points: tuple[ShapePoint, ...]

    def as_line(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self), default=str)

    @classmethod
    def of_line(cls, line: str) -> Self:
        """The check that `as_line` wrote."""
        check: Self = parsed(cls, json.loads(line))
        return check


class Checker(AbstractContextManager["Checker"]):
    """The process that loads and runs the engines of one export."""

    def __init__(self) -> None:
        # Libraries and compilers may name files in other encodings.
        self._complaints = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "export.parity"],  # -P: not an `export.py` of the folder this is called in
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            text=True,
        )

    def check(self, check: ParityCheck, tolerance: float) -> Parity:
        """Loads and runs the engine there and compares it with eager.

        Raises:
            BuildError: the engine could not be loaded or run, or killed the process; this Checker cannot be used again.
            ResourcesError: there was no memory for it.
            ParityError: its relative error is over `tolerance`.
        """
        what = f"the {check.backend} engine of {check.component}"
        answer = self._ask(check.as_line())
        if not answer:
            raise BuildError(f"{what} {self._end(what, check.backend)}")
        told = json.loads(answer)
        if lacking := told.get(NO_MEMORY):
            raise ResourcesError(
                f"{what} is not published: {check.device} has too little memory to check it ({lacking}); end what else "
                "computes there, or export on a larger machine"
            )
        parity = Parity(**told)
        if not parity.relative_error <= tolerance:  # written so that NaN fails
            raise ParityError(
                f"{what} differs from eager by {parity.relative_error:.2e} relative, {tolerance:.0e} is accepted; "
                "it is not published"
            )
        return parity

    def _ask(self, line: str) -> str:
        """The answer; empty if the process has ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return ""
        return self._process.stdout.readline()

    def _end(self, what: str, backend: Backend) -> str:
        """What became of the process that checked `what`; raises `ResourcesError` where memory did."""
        status = self._process.wait()
        if status == -signal.SIGKILL:
            raise ResourcesError(
                f"{what} is not published: the process that checked it was killed (SIGKILL), probably for want of "
                "memory; end other programs, or export on a larger machine"
            )
        if status < 0:
            name = signal.Signals(-status).name
            return f"killed the process that loaded it ({name}); it is not published. {_hint(backend)}"
        self._complaints.seek(0)
        return f"does not load and run; it is not published:\n{self._complaints.read().strip()[-2000:]}"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()  # it has nothing to finish
        self._process.communicate()
        self._complaints.close()


def measure_parity(check: ParityCheck) -> Parity:
    """Compares the engine with eager in this process, at every point of the check."""
    import torch

    from export.build import BuildOptions, builder_for
    from export.devices import use_device
    from export.modules import load_components
    from export.spec import component_specs

    use_device(check.device)
    spec = component_specs(check.dimensions)[check.component]
    module = load_components(
        check.checkpoint, precision=check.precision, device=check.device, wanted=[check.component]
    )[check.component]
    builder = builder_for(check.backend, BuildOptions())
    assert builder is not None
    with torch.inference_mode():
        inputs = [
            example_inputs(spec, point, check.dimensions, seed=seed, device=check.device)
            for seed, point in enumerate(check.points)
        ]
        expected = [module(**given).cpu() for given in inputs]
        if check.backend is not Backend.AOTINDUCTOR:
            # The others have weights of their own, and there may not be room for both.
            module.to("meta")
            torch.cuda.empty_cache()
        run = builder.load(check.file, module, spec)
        return closeness([run(given).cpu() for given in inputs], expected)


def closeness(got: "Sequence[Tensor]", expected: "Sequence[Tensor]") -> Parity:
    """The largest error and the smallest cosine of pairs of tensors; NaN where one of them holds it."""
    import torch

    pairs = [(g.double().flatten(), e.double().flatten()) for g, e in zip(got, expected, strict=True)]
    errors = [(g - e).norm() / e.norm() for g, e in pairs]
    cosines = [torch.cosine_similarity(g, e, dim=0) for g, e in pairs]
    # Python's max() would let a NaN through, depending on where it stands; torch's does not.
    return Parity(float(torch.stack(errors).max()), float(torch.stack(cosines).min()), len(pairs))


def _hint(backend: Backend) -> str:
    if backend is not Backend.AOTINDUCTOR:
        return "Another version of the backend's library may build a good one."
    return (
        "A C++ compiler that links libstdc++ statically makes such packages: set CXX to the system's compiler "
        "(for example CXX=/usr/bin/g++) and export again."
    )


def main() -> None:
    """Answers the checks on standard input; what libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch
    from diffusers import AutoencoderKL, ZImageTransformer2DModel  # noqa: F401 slow to import, so before they are needed
    from transformers import AutoModel, Qwen3Model  # noqa: F401

    from export.memory import free_memory

    for line in sys.stdin:
        try:
            answer = asdict(measure_parity(ParityCheck.of_line(line)))
        except torch.OutOfMemoryError as error:
            answer = {NO_MEMORY: str(error).splitlines()[0]}
        free_memory()  # before the answer, upon which the other process reads the next component
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
