"""On an NVIDIA GPU: what `make demo` does there, and what its engines are worth. Run by `make test-gpu`.

One export of the demo model (bf16, AOTInductor), as `make demo` makes it, serves all of these tests. They need no
plugin of pytest; where there is none, `python -m pytest -c /dev/null tests/gpu` runs them.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from demo.run import MODEL, PICTURES
from demo.scenes import sample_scenes
from demo.score import score
from export.devices import current_target
from export.manifest import Backend, Manifest
from export.packages import open_package
from export.repository import versions
from export.spec import Component, Precision, ShapePoint, component_specs, example_inputs
from server.config import FallbackPolicy
from server.engines.eager import EagerModules
from server.engines.load import EngineLoader
from server.engines.recorded import Recording
from tests.conftest import CHECKPOINT, ROOT
from tests.integration.process import ServerProcess
from verify import parity

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
POINT = ShapePoint(2, 32, 256, 208)


@pytest.fixture(scope="module")
def demo() -> str:
    """What `make demo` prints; it exports into models/, serves and draws."""
    done = subprocess.run([sys.executable, "-m", "demo.run"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def version(demo: str) -> Path:
    """The version's folder."""
    model = ROOT / "models" / MODEL
    return model / str(versions(model)[-1])


@pytest.fixture(scope="module")
def loader(version: Path) -> EngineLoader:
    manifest = Manifest.read(version)
    modules = EagerModules(CHECKPOINT, manifest.precision, "cuda")
    return EngineLoader(version, manifest, current_target("cuda"), modules, 2, FallbackPolicy.REFUSE)


@pytest.fixture(scope="module")
def server(version: Path) -> Iterator[ServerProcess]:
    with ServerProcess(version.parent.parent, "--require-engine") as running:
        yield running


def test_the_demo_draws_with_compiled_engines(demo: str) -> None:
    rows = [line for line in demo.splitlines() if any(line.endswith(p.prompt) for p in PICTURES)]
    assert len(rows) == len(PICTURES)
    assert all(row.count("aotinductor") == 3 and "(!)" not in row for row in rows), demo
    assert "the server stopped cleanly" in demo


def test_the_engines_are_for_this_gpu(loader: EngineLoader) -> None:
    manifest = loader.manifest
    assert manifest.precision is Precision.BF16
    assert {e.backend for e in manifest.engines} == {Backend.AOTINDUCTOR}
    assert {e.built_for for e in manifest.engines} == {(current_target("cuda"),)}


def test_the_engines_agree_with_the_fp32_reference(loader: EngineLoader) -> None:
    """Closer than a tolerance to eager in the same precision is what the export made sure of; this is to the model."""
    dimensions = loader.manifest.checkpoint.dimensions
    reference = EagerModules(CHECKPOINT, Precision.FP32, "cuda")
    engines = loader.load_all()
    for component, spec in component_specs(dimensions).items():
        inputs = {name: t.cuda() for name, t in example_inputs(spec, POINT, dimensions, seed=4).items()}
        got, use = engines[component].run(inputs)
        with torch.inference_mode():
            expected = reference[component](**inputs)
        assert use.backend is Backend.AOTINDUCTOR
        error = float((got.double() - expected.double()).norm() / expected.double().norm())
        assert error <= spec.tolerance[Precision.BF16], component


def test_replayed_calls_give_what_plain_ones_give(loader: EngineLoader, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every component, on the default stream and on another, with shapes and inputs that alternate."""
    replays: list[Recording] = []
    replay = Recording.replay

    def counted(self: Recording, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        replays.append(self)
        return replay(self, inputs)

    monkeypatch.setattr(Recording, "replay", counted)
    manifest, side = loader.manifest, torch.cuda.Stream()
    points = (POINT, ShapePoint(1, 32, 256, 256), ShapePoint(1, 96, 64, 128))
    for component, spec in component_specs(manifest.checkpoint.dimensions).items():
        record = manifest.engine(component)
        assert record is not None
        plain = open_package(loader.folder / record.file, loader.modules[component])
        engine = loader.load_all()[component]
        replays.clear()
        for turn in range(4):
            for point in points:
                inputs = example_inputs(spec, point, manifest.checkpoint.dimensions, seed=turn)
                inputs = {name: tensor.cuda() for name, tensor in inputs.items()}
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side if turn % 2 else torch.cuda.current_stream()), torch.inference_mode():
                    got, use = engine.run(inputs)
                torch.cuda.synchronize()
                with torch.inference_mode():
                    expected = plain(*(inputs[t.name] for t in spec.inputs))
                assert use.backend is Backend.AOTINDUCTOR, use
                error = float((got.double() - expected.double()).norm() / expected.double().norm())
                assert error <= 1e-3, (component, point, turn)
        assert len(replays) == 3 * len(points), component
        engine.close()


def test_engine_and_eager_share_one_copy_of_the_weights(loader: EngineLoader) -> None:
    dimensions = loader.manifest.checkpoint.dimensions
    spec = component_specs(dimensions)[Component.DENOISER]
    inputs = {name: t.cuda() for name, t in example_inputs(spec, POINT, dimensions).items()}
    weights = sum(p.nbytes for c in Component for p in loader.modules[c].parameters())
    held = torch.cuda.memory_allocated()
    engine = loader.load_all()[Component.DENOISER]
    assert torch.cuda.memory_allocated() - held < weights / 10
    bias = loader.modules[Component.DENOISER].final_layer.linear.bias  # type: ignore[union-attr]
    for _ in range(3):  # the last of these is replayed
        before, _ = engine.run(inputs)
    with torch.no_grad():
        bias.add_(1.0)  # type: ignore[operator]
        after, _ = engine.run(inputs)
        bias.sub_(1.0)  # type: ignore[operator]
    moved = before - after  # rounded to bf16, where numbers around 16 lie 0.125 apart
    assert abs(float(moved.mean()) - 1) < 0.01, "changing eager's weights changed the engine's"
    assert float((moved - 1).abs().max()) <= 0.25


def test_numbers_and_images_are_within_tolerance(version: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = parity.main([str(version.parent), "--json", "--images", "4"])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert status == 0, report
    assert [c["backend"] for c in report["components"]] == ["aotinductor"] * 3


def test_the_server_draws_what_was_asked(server: ServerProcess) -> None:
    scenes = sample_scenes(32, seed=5)
    with server.client() as client:
        drawings = [client.draw(scene.prompt, seed=i) for i, scene in enumerate(scenes)]
        (instance,) = client.model().instances
    assert all({e.backend for e in d.completed.engines} == {"aotinductor"} for d in drawings)
    right = [score(np.asarray(d.images[0].pillow()), s).all_correct for d, s in zip(drawings, scenes, strict=True)]
    # The checkpoint's own share is 0.988 in fp32 (demo/README.md), so this leaves room; other scenes score near 0.
    assert sum(right) / len(right) >= 0.85
    assert instance.device.startswith("cuda (")
    assert 0 < instance.memory.device_loaded <= instance.memory.device_peak


def test_a_damaged_engine_falls_back_and_draws_the_same(server: ServerProcess, version: Path, tmp_path: Path) -> None:
    prompt = "a red circle on a white background"
    with server.client() as client:
        expected = np.asarray(client.draw(prompt, seed=7).images[0].pillow()).astype(int)
    model = tmp_path / "models" / MODEL
    shutil.copytree(version, model / "1")
    shutil.copy(version.parent / "config.pbtxt", model)
    package = model / "1" / "denoiser.pt2"
    package.write_bytes(package.read_bytes()[:1000])
    with ServerProcess(model.parent) as broken, broken.client() as client:
        drawing = client.draw(prompt, seed=7)
    used = {e.component: (e.backend, e.fallback_reason) for e in drawing.completed.engines}
    assert used["denoiser"][0] == "eager"
    assert "denoiser.pt2 expected, 1000 found" in used["denoiser"][1]
    assert used["prompt_encoder"] == ("aotinductor", "")
    drawn = np.asarray(drawing.images[0].pillow()).astype(int)
    assert np.abs(drawn - expected).mean() < 2.0, "grey levels"
