"""Where the engines of a benchmark come from: a version that is there, an export, or weights that are in memory."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from benchmarks import published
from benchmarks.choice import Choice, pixels
from benchmarks.record import BenchmarkError
from export.build import BuildInputs, BuildOptions, builder_for
from export.devices import current_target
from export.errors import ManifestError
from export.manifest import FILE_NAME, Backend, EngineRecord, FileRecord, Manifest, check_engine, installed_version
from export.onnx import GraphLimits, GraphSource
from export.profiles import serving_profiles
from export.repository import versions
from export.spec import Component, component_specs
from server.engines.eager import EagerModules


def version_folder(choice: Choice, backend: Backend) -> Path:
    """The version to measure: the one given with --model, else one that `zserve export` makes or finds valid."""
    if backend in choice.models:
        return choice.models[backend]
    name = f"{backend}-{choice.sizes[0]}"
    settings = {
        "checkpoint": saved_checkpoint(choice),
        "repository": choice.repository,
        "name": name,
        "backend": backend,
        "precision": choice.precision,
        "device": choice.device,
        "default-size": choice.sizes[0],
        "max-batch": choice.max_batch,
        "max-size": choice.max_size,
    }
    options = [text for key, value in settings.items() for text in (f"--{key}", str(value))]
    print(f"exporting {name} ...", file=sys.stderr, flush=True)
    done = subprocess.run([sys.executable, "-m", "zserve", "export", *options], stdout=sys.stderr, check=False)
    if done.returncode != 0:
        raise BenchmarkError(f"{backend} cannot be measured: its export failed, for the reason above")
    return choice.repository / name / str(versions(choice.repository / name)[-1])


def saved_checkpoint(choice: Choice) -> Path:
    """The checkpoint as a folder, which a server needs; random weights are written there once (20.5 GB)."""
    if choice.checkpoint is not None:
        return choice.checkpoint
    folder = choice.repository / "random-weights"
    if not folder.is_dir():
        draft = folder.with_suffix(".incomplete")
        published.random_pipeline(choice.device, choice.precision).save_pretrained(draft)
        draft.rename(folder)
    return folder


def built_in_memory(choice: Choice, model: Manifest, modules: EagerModules, backend: Backend) -> Manifest:
    """Engines over weights that are nowhere but in memory, built or found valid; their manifest.

    Raises:
        BenchmarkError: the backend builds from files.
    """
    if backend is not Backend.AOTINDUCTOR:
        raise BenchmarkError(
            f"{backend} cannot be built from --random-weights; {Backend.AOTINDUCTOR} can, and {backend} is measured "
            "with --checkpoint or --model"
        )
    wanted = replace(model, name=f"random-{backend}-{choice.sizes[0]}")
    folder = choice.repository / wanted.name / "1"
    folder.mkdir(parents=True, exist_ok=True)
    manifest = _still_holding(folder, wanted, choice.device)
    for component in Component:
        if manifest.engine(component) is None:
            record = _build(choice, wanted, modules, component, folder)
            manifest = replace(manifest, engines=(*manifest.engines, record))
            manifest.write(folder)
    return manifest


def _still_holding(folder: Path, wanted: Manifest, device: str) -> Manifest:
    """The manifest of what an earlier run built, where that still holds; else `wanted`."""
    if not (folder / FILE_NAME).is_file():
        return wanted
    try:
        found = Manifest.read(folder)
        for record in found.engines:
            check_engine(record, folder, current_target(device), "it is built again now")
    except ManifestError:
        return wanted
    return found if replace(found, created=wanted.created, engines=()) == wanted else wanted


def _build(choice: Choice, model: Manifest, modules: EagerModules, component: Component, folder: Path) -> EngineRecord:
    print(f"building {component} for {Backend.AOTINDUCTOR} ...", file=sys.stderr, flush=True)
    builder = builder_for(Backend.AOTINDUCTOR, BuildOptions())
    assert builder is not None
    limits = GraphLimits(2 * model.max_batch, model.max_size)
    dimensions = model.checkpoint.dimensions
    inputs = BuildInputs(
        source=GraphSource(Path(), dimensions, model.precision, limits),
        spec=component_specs(dimensions)[component],
        profiles=serving_profiles(pixels(choice.sizes[0]), limits.max_rows, limits.max_size),
        repository=choice.repository,
        module=lambda: modules[component],
    )
    built = builder.build(inputs, folder)
    return EngineRecord(
        component=component,
        backend=Backend.AOTINDUCTOR,
        files=tuple(FileRecord.of(path) for path in built.files),
        built_with={name: installed_version(name) or "" for name in builder.libraries},
        built_for=(current_target(choice.device),),
        parity=None,
    )
