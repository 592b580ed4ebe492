"""What does exporting the real model take? Seconds and peak memory of each stage, one component per run.

Method: a checkpoint folder with Z-Image-Turbo's published configs and random bf16 weights; the stages of
`zserve export --backend tensorrt_rtx` one after the other in this process. What was built is deleted at the end.

Units: `peak_gb` is the process's largest resident size (GB) up to the end of a stage, `seconds` the stage's wall clock,
and `cpu_seconds` this process's CPU time for it, which other work on the machine does not change as much.

    zserve bench full_size_export denoiser --folder build/full-size --until weights
    zserve bench full_size_export image_decoder --folder build/full-size --until plan --target sm89
"""

import argparse
import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.published import CONFIGS, dimensions
from benchmarks.record import BenchmarkError, row

STAGES = ("graph", "weights", "plan")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's options."""
    from export.spec import Component

    parser.add_argument("component", type=Component, choices=list(Component))
    parser.add_argument("--folder", type=Path, required=True, help="a new one, for what is built")
    parser.add_argument("--until", choices=STAGES, default="graph")
    parser.add_argument("--target", default="sm89")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Runs the stages of one component up to `--until`.

    Raises:
        BenchmarkError: the folder exists already.
    """
    from export.validity import installed_version

    try:
        options.folder.mkdir(parents=True)
    except FileExistsError as error:
        raise BenchmarkError(
            f"--folder {options.folder} is there; a new one is made, and deleted at the end"
        ) from error
    try:
        stages = _run(options.component, options.folder, options.until, options.target)
        rows = [row({"component": options.component, "stage": s.pop("stage")}, **s) for s in stages]
    finally:
        shutil.rmtree(options.folder)
    memory = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    versions = {name: installed_version(name) for name in ("onnx", "onnxscript", "tensorrt_rtx")}
    return {
        "settings": {"memory_gb": memory, "exporters": versions, "weights": "random, bf16"},
        "rows": rows,
    }


def _run(component: Any, folder: Path, until: str, target: str) -> Iterator[dict[str, Any]]:
    import onnx_ir as ir

    from export.build.plan_graph import fit_for_tensorrt
    from export.onnx import GraphLimits, GraphSource, outline_graph
    from export.spec import Precision, component_specs

    spec = component_specs(dimensions())[component]
    source = GraphSource(folder, dimensions(), Precision.BF16, GraphLimits(max_rows=8, max_size=2048))
    _write_configs(folder)
    with _measured("graph") as graph:
        outlined = outline_graph(source, spec)
        attention = fit_for_tensorrt(outlined.model)
        graph.update(nodes=len(list(outlined.model.graph)), fused=attention.fused, decomposed=attention.decomposed)
    yield graph
    if until == "graph":
        return
    _write_random_weights(folder, outlined.sources, outlined.model)
    weights, onnx = folder / f"{component}.safetensors", folder / f"{component}.onnx"
    with _measured("weights") as written:
        outlined.attach(source, weights)
        ir.save(outlined.model, onnx)
        written.update(weights_gb=weights.stat().st_size / 1e9, graph_mb=onnx.stat().st_size / 1e6)
    yield written
    if until == "plan":
        yield _plan(onnx, source, spec, target)


def _plan(onnx: Path, source: Any, spec: Any, target: str) -> dict[str, Any]:
    from export.build import BuildInputs, BuildOptions
    from export.build.tensorrt import TensorRtBuilder
    from export.manifest import Backend, Target
    from export.profiles import serving_profiles

    def no_module() -> NoReturn:
        raise AssertionError("a plan is built without the weights in memory")

    number = target.removeprefix("sm")
    options = BuildOptions((Target("cuda", f"{number[:-1]}.{number[-1]}"),))
    inputs = BuildInputs(source, spec, serving_profiles((1024, 1024), 8, 2048), onnx.parent, no_module)
    path = onnx.with_suffix(".plan")
    with _measured("plan") as plan:
        TensorRtBuilder(Backend.TENSORRT_RTX, options).write_plan(onnx, inputs, path)
        plan.update(target=target, plan_gb=path.stat().st_size / 1e9)
    return plan


@contextmanager
def _measured(stage: str) -> Iterator[dict[str, Any]]:
    result: dict[str, Any] = {"stage": stage}
    started, computed = time.perf_counter(), time.process_time()
    yield result
    result["seconds"] = round(time.perf_counter() - started, 1)
    result["cpu_seconds"] = round(time.process_time() - computed, 1)
    result["peak_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2)
    print(result, file=sys.stderr, flush=True)


def _write_configs(folder: Path) -> None:
    for part, config in CONFIGS.items():
        (folder / part).mkdir(parents=True, exist_ok=True)
        (folder / part / "config.json").write_text(json.dumps(config))


def _write_random_weights(folder: Path, sources: Mapping[str, tuple[str, str]], model: Any) -> None:
    """One bf16 file per part with the tensors that the component needs: the same 32 MB of noise repeated."""
    import torch

    from export.checkpoint import WEIGHTS

    noise = (torch.randn(1 << 24, dtype=torch.bfloat16) * 0.02).view(torch.uint8).numpy().data
    for part in {part for part, _ in sources.values()}:
        shapes = {
            key: tuple(map(int, model.graph.initializers[name].shape))
            for name, (owner, key) in sources.items()
            if owner == part
        }
        header: dict[str, object] = {}
        offset = 0
        for key, shape in shapes.items():
            end = offset + 2 * prod(shape)
            header[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header).encode()
        with (folder / part / WEIGHTS[part]).open("wb") as f:
            f.write(len(text).to_bytes(8, "little") + text)
            for start in range(0, offset, len(noise)):
                f.write(noise[: offset - start])
