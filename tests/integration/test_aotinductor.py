"""AOTInductor: really compiled, lent the eager module's weights, drawing the same picture."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import cli as bench
from export.devices import current_target
from export.manifest import Backend, Manifest
from export.spec import Component, ShapePoint, component_specs, example_inputs
from export.validity import cpu_instructions
from server.config import FallbackPolicy
from server.engines.eager import EagerModules
from server.engines.load import EngineLoader
from tests.conftest import CHECKPOINT, REPOSITORY, exported
from tests.integration.process import ServerProcess

NAME = "demo-aotinductor"
PROMPT = "a red circle on a white background"
# In a new process: whether the compiler is imported once a package is open.
OPENING = """
import sys
from pathlib import Path
from export.manifest import Manifest
from export.packages import open_package
from export.spec import Component
from server.engines.eager import EagerModules
folder = Path(sys.argv[1])
manifest, component = Manifest.read(folder), Component.IMAGE_DECODER
module = EagerModules(Path(manifest.checkpoint.path), manifest.precision, "cpu")[component]
open_package(folder / manifest.engine(component).file, module)
print("torch._inductor.codecache" in sys.modules)
"""


@pytest.fixture(scope="module")
def aoti_repository() -> Path:
    return exported(REPOSITORY.with_name("test-models-aotinductor"), "aotinductor", name=NAME)


@pytest.fixture(scope="module")
def loader(aoti_repository: Path) -> EngineLoader:
    folder = max((p for p in (aoti_repository / NAME).iterdir() if p.name.isdecimal()), key=lambda p: int(p.name))
    manifest = Manifest.read(folder)
    modules = EagerModules(CHECKPOINT, manifest.precision, "cpu")
    return EngineLoader(folder, manifest, current_target("cpu"), modules, 2, FallbackPolicy.REFUSE)


# 176x208 has 143 tokens, padded to 160: a dynamic number of padding tokens was once compiled wrongly.
@pytest.mark.parametrize("point", [ShapePoint(1, 32, 256, 256), ShapePoint(3, 64, 176, 208), ShapePoint(8, 32, 64, 64)])
@pytest.mark.parametrize("component", list(Component))
def test_the_package_agrees_with_eager(loader: EngineLoader, component: Component, point: ShapePoint) -> None:
    dimensions = loader.manifest.checkpoint.dimensions
    spec = component_specs(dimensions)[component]
    inputs = example_inputs(spec, point, dimensions, seed=9)
    got, use = loader.load_all()[component].run(inputs)
    with torch.inference_mode():
        expected = loader.modules[component](**inputs)
    assert use.backend is Backend.AOTINDUCTOR
    error = (got.double() - expected.double()).norm() / expected.double().norm()
    assert error <= spec.tolerance[loader.manifest.precision]


def test_the_manifest_says_which_cpus_can_run_it(loader: EngineLoader) -> None:
    assert cpu_instructions()
    assert {engine.instructions for engine in loader.manifest.engines} == {cpu_instructions()}


def test_the_engine_and_eager_share_one_copy_of_the_weights(loader: EngineLoader) -> None:
    dimensions = loader.manifest.checkpoint.dimensions
    spec = component_specs(dimensions)[Component.DENOISER]
    inputs = example_inputs(spec, ShapePoint(1, 32, 64, 64), dimensions)
    engine = loader.load_all()[Component.DENOISER]
    bias = loader.modules[Component.DENOISER].final_layer.linear.bias  # type: ignore[union-attr]
    before, _ = engine.run(inputs)
    with torch.no_grad():
        bias.add_(1.0)  # type: ignore[operator]
        after, _ = engine.run(inputs)
        bias.sub_(1.0)  # type: ignore[operator]
    assert torch.allclose(after, before - 1.0, atol=1e-5)


def test_opening_a_package_does_not_import_the_compiler(loader: EngineLoader) -> None:
    """It would take seconds of every start of a worker."""
    done = subprocess.run(
        [sys.executable, "-c", OPENING, str(loader.folder)], capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"


def test_its_packages_are_held_against_fp32_and_timed(
    aoti_repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--model", str(aoti_repository / NAME), "--device", "cpu", "--size", "64x64", "--size", "96x64")
    assert bench.main(["packages", "--checkpoint", str(CHECKPOINT), *options]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    opened = {r["case"]["component"]: r for r in told["rows"] if r["case"]["size"] == "any"}
    compared = [r for r in told["rows"] if r["case"]["size"] != "any"]
    assert set(opened) == set(Component)
    assert all(r["open_s"] > 0 for r in opened.values())
    assert len(compared) == 1 + 2 + 2  # the prompt encoder knows no size
    assert all(r["engine_to_fp32"]["relative_error"] <= 1e-3 for r in compared)
    assert all(r["eager_to_fp32"]["relative_error"] == 0 for r in compared), "eager is fp32 on a CPU"
    assert told["failed"] == []


def test_the_server_draws_the_same_with_it(aoti_repository: Path, server: ServerProcess) -> None:
    with server.client() as client:
        expected = np.asarray(client.draw(PROMPT, seed=7).images[0].pillow()).astype(int)
    with ServerProcess(aoti_repository, "--require-engine") as compiled, compiled.client() as client:
        drawing = client.draw(PROMPT, seed=7)
    assert {e.backend for e in drawing.completed.engines} == {"aotinductor"}
    assert np.abs(np.asarray(drawing.images[0].pillow()).astype(int) - expected).max() <= 1
