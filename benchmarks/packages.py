"""How close is each AOTInductor engine to the model in fp32, how fast does it open, and does it hold a second copy?

Method: one component at a time, of the version that `components` measures too (exported if it is not there yet). Its
weights are put on the device as in a worker; a copy widened to fp32 computes the reference, without TF32, and is freed
again; eager computes in the weights' own precision. Then the package is opened and called three times at each
size, on CUDA plainly, recorded and replayed; the last output is compared. Batch 1, 64 caption tokens.

Units: errors are relative L2 distances; seconds to open a package once the weights are on the device and an earlier one
has done the imports (the settings' `first_open_s`). Memory in MiB, over that before the component was loaded: what
torch has allocated, and what is in use on the whole device, which nothing else may use; on a CPU the process's resident
size. It fails if an engine is past its tolerance from eager; in bf16, if it is over 1.25 times as far from fp32 as
eager is; and on CUDA, if it takes over 5 % of the weights plus 64 MiB to open.
"""

import argparse
import copy
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import choice
from benchmarks.choice import Choice
from benchmarks.device_memory import used_mib
from benchmarks.engines import version_folder
from benchmarks.record import Row, print_table, row
from export.devices import current_target
from export.manifest import Backend, Manifest
from export.memory import free_memory
from export.modules import load_components
from export.parity import closeness
from export.profiles import TYPICAL_CAPTION
from export.spec import Component, ComponentSpec, Precision, ShapePoint, component_specs, example_inputs, pixels
from export.validity import check_engine
from server.config import cpu_threads
from server.engines import memory
from server.engines.aotinductor import AotInductorEngine

CALLS = 3  # plain, recorded, replayed
FURTHER = 1.25  # times as far from fp32 as eager
GROWTH, SLACK = 0.05, 64.0  # that opening may take: a share of the weights, and MiB for code
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Used:
    """Memory at one moment, MiB."""

    allocated: float  # by torch on the device
    taken: float  # on the device by all, or of the host by this process

    @classmethod
    def now(cls, device: torch.device) -> "Used":
        """Once the device is done, without what torch only caches."""
        free_memory()
        if device.type != "cuda":
            return cls(0.0, round(memory.host_bytes() / memory.MIB, 1))
        torch.cuda.synchronize(device)
        return cls(round(torch.cuda.memory_allocated(device) / memory.MIB, 1), used_mib(str(device)) or 0.0)

    def since(self, start: "Used") -> "Used":
        """What came on top of `start`."""
        return Used(round(self.allocated - start.allocated, 1), round(self.taken - start.taken, 1))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's options."""
    choice.add_arguments(parser, only=Backend.AOTINDUCTOR)
    parser.add_argument(
        "--component", type=Component, choices=list(Component), action="append", help="may be repeated (default: all)"
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measures and prints the tables. There is a row per component, and one more for each of its sizes."""
    chosen = choice.read(options)
    folder = version_folder(chosen, Backend.AOTINDUCTOR)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    benchmark = Packages(chosen, folder, Manifest.read(folder))
    first = benchmark.first_open()
    measured = [r for component in options.component or Component for r in benchmark.measure(component)]
    _show(measured)
    failed = [f"{r['case']['component']}: {said}" for r in measured for said in r["failed"]]
    print(*(f"TOO MUCH: {said}" for said in failed), sep="\n")
    settings = {**chosen.settings(), "engine": Backend.AOTINDUCTOR, "version": str(folder), "first_open_s": first}
    return {"settings": settings, "rows": measured, "failed": failed}


@dataclass(frozen=True)
class Packages:
    """Measures the engines of one version."""

    choice: Choice
    folder: Path
    manifest: Manifest

    @property
    def device(self) -> torch.device:
        """The device that everything is on."""
        return torch.device(self.choice.device)

    @property
    def specs(self) -> dict[Component, ComponentSpec]:
        """The components' specs."""
        return component_specs(self.manifest.checkpoint.dimensions)

    def first_open(self) -> float:
        """Seconds until this process has opened its first package, the smallest."""
        smallest = Component.IMAGE_DECODER
        engine, seconds = self._open(self.specs[smallest], self._module(smallest))
        engine.close()
        return seconds

    def measure(self, component: Component) -> list[Row]:
        """The component's row, and those of its sizes."""
        spec = self.specs[component]
        start, began = Used.now(self.device), time.perf_counter()
        module = self._module(component)
        read = time.perf_counter() - began
        weights = sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers())) / memory.MIB
        inputs = self._inputs(spec)
        reference = _widened(module, inputs)
        eager = _outputs(module, inputs)
        used = {"eager": Used.now(self.device).since(start)}
        engine, opening = self._open(spec, module)
        used["opened"] = Used.now(self.device).since(start)
        outputs = {size: _called(engine, given) for size, given in inputs.items()}
        used["called"] = Used.now(self.device).since(start)
        engine.close()
        kept = used["opened"].taken - used["eager"].taken
        too_much = self.device.type == "cuda" and kept > GROWTH * weights + SLACK
        return [
            row(
                {"component": component, "size": "any"},
                read_s=read,
                open_s=opening,
                weights_mib=weights,
                memory_mib={when: asdict(amount) for when, amount in used.items()},
                opened_over_eager=used["opened"].taken / used["eager"].taken if used["eager"].taken > 0 else None,
                failed=[f"opening its package took {kept:.0f} MiB"] if too_much else [],
            ),
            *(self._closeness(spec, size, outputs[size], eager[size], reference[size]) for size in inputs),
        ]

    def _module(self, component: Component) -> nn.Module:
        chosen = self.choice
        return load_components(chosen.checkpoint, precision=chosen.precision, device=chosen.device, wanted=[component])[
            component
        ]

    def _inputs(self, spec: ComponentSpec) -> dict[str, Inputs]:
        """Inputs by size; the prompt encoder, which has none, gets one entry."""
        sizes = self.choice.sizes[:1] if spec.component is Component.PROMPT_ENCODER else self.choice.sizes
        made = {}
        for size in sizes:
            width, height = pixels(size)
            point = ShapePoint(1, TYPICAL_CAPTION, height, width)
            made[size] = example_inputs(spec, point, self.manifest.checkpoint.dimensions, device=self.device)
        return made

    def _open(self, spec: ComponentSpec, module: nn.Module) -> tuple[AotInductorEngine, float]:
        """The engine as the server opens it, and the seconds until the device is done with that."""
        record = self.manifest.engine(spec.component)
        assert record is not None, "the version was exported with all of them"
        check_engine(record, self.folder, current_target(self.choice.device), "zserve bench packages")
        began = time.perf_counter()
        engine = AotInductorEngine(self.folder / record.file, spec, self.manifest.served_shapes, module, cpu_threads(1))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return engine, time.perf_counter() - began

    def _closeness(self, spec: ComponentSpec, size: str, got: Tensor, eager: Tensor, reference: Tensor) -> Row:
        pairs = {
            "engine_to_eager": closeness([got], [eager]),
            "engine_to_fp32": closeness([got], [reference]),
            "eager_to_fp32": closeness([eager], [reference]),
        }
        error = {name: close.relative_error for name, close in pairs.items()}
        tolerance, failed = spec.tolerance[self.choice.precision], []
        if not error["engine_to_eager"] <= tolerance:  # written so that NaN fails
            failed.append(f"at {size} it is {error['engine_to_eager']:.1e} from eager, {tolerance:.0e} is accepted")
        exact = self.choice.precision is Precision.FP32  # eager is the reference then
        if not (exact or error["engine_to_fp32"] <= FURTHER * error["eager_to_fp32"]):
            failed.append(
                f"at {size} it is {error['engine_to_fp32']:.1e} from fp32, eager {error['eager_to_fp32']:.1e}"
            )
        figures = {
            name: {"relative_error": close.relative_error, "cosine": close.cosine} for name, close in pairs.items()
        }
        return row({"component": spec.component, "size": size}, **figures, failed=failed)


def _widened(module: nn.Module, inputs: dict[str, Inputs]) -> dict[str, Tensor]:
    """The outputs of the same weights in fp32: only the arithmetic differs."""
    return _outputs(copy.deepcopy(module).float(), inputs)


def _outputs(module: nn.Module, inputs: dict[str, Inputs]) -> dict[str, Tensor]:
    with torch.inference_mode():
        return {size: module(**given).cpu() for size, given in inputs.items()}


def _called(engine: AotInductorEngine, given: Inputs) -> Tensor:
    """The last of several calls."""
    for _ in range(CALLS - 1):
        engine.run(given)
    return engine.run(given).cpu()


def _show(measured: list[Row]) -> None:
    opened = [r for r in measured if "open_s" in r]
    print_table(
        ("component", "weights MiB", "open s", *opened[0]["memory_mib"], "opened / eager"),
        [(r["case"]["component"], r["weights_mib"], r["open_s"], *_taken(r), r["opened_over_eager"]) for r in opened],
    )
    pairs = ("engine_to_eager", "engine_to_fp32", "eager_to_fp32")
    print_table(
        ("component", "size", *pairs),
        [
            (*r["case"].values(), *(f"{r[p]['relative_error']:.1e} ({r[p]['cosine']:.6f})" for p in pairs))
            for r in measured
            if r not in opened
        ],
    )


def _taken(r: Row) -> list[float]:
    return [used["taken"] for used in r["memory_mib"].values()]
