"""What is measured: diffusers' pipeline as its users run it, and the components over the same weights by engine."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor, nn

from benchmarks.choice import Choice, backend_of
from benchmarks.engines import checked_version
from benchmarks.record import BenchmarkError
from export.checkpoint import open_checkpoint
from export.devices import current_target
from export.manifest import Backend, CheckpointRecord, Manifest, PreviewProjection
from export.modules import build_components
from export.modules.load import TORCH_DTYPES
from export.spec import Component, ComponentSpec, Precision, component_specs
from export.validity import source_hash
from server.config import FallbackPolicy, cpu_threads
from server.engines.base import Shapes
from server.engines.eager import EagerModules
from server.engines.load import EngineLoader
from server.engines.served import ServedComponent
from server.heap import settle

if TYPE_CHECKING:
    from diffusers import ZImagePipeline


class Counted:
    """An engine that counts its calls, and fails if another one would answer in its place."""

    def __init__(self, served: ServedComponent, expected: Backend) -> None:
        self._served, self.backend, self.calls = served, expected, 0
        self._check(served.use.backend, served.use.fallback_reason)

    def fits(self, shapes: Shapes) -> bool:
        """Everything is tried: what does not fit should fail, not be measured on eager."""
        return True

    def run(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """See `Engine`.

        Raises:
            BenchmarkError: another engine answered.
        """
        output, use = self._served.run(inputs)
        self._check(use.backend, use.fallback_reason)
        self.calls += 1
        return output

    def close(self) -> None:
        """See `Engine`."""
        self._served.close()

    def _check(self, backend: Backend, reason: str) -> None:
        if backend is not self.backend or reason:
            component, why = self._served.use.component, reason or f"there is no engine of {self.backend}"
            raise BenchmarkError(f"{component}: {self.backend} is to be measured, and {backend} answers: {why}")


class SharedModules(EagerModules):
    """The components over a pipeline in memory: diffusers, eager and engines that borrow weights share one copy."""

    def __init__(self, pipeline: "ZImagePipeline", precision: Precision, device: str) -> None:
        super().__init__(Path(), precision, device)
        built = build_components(pipeline)  # whose own tables are still on the CPU; the weights stay where they are
        self._modules: dict[Component, nn.Module] = {c: m.to(self.device) for c, m in built.items()}


Engines = dict[Component, Counted]


@dataclass(frozen=True)
class Subject:
    """One model on one device, through every engine that is to be measured."""

    choice: Choice
    manifest: Manifest  # of the model alone, without engines
    engines: Mapping[str, Engines]  # by row

    @property
    def device(self) -> torch.device:
        """The device that everything is on."""
        return torch.device(self.choice.device)

    @property
    def specs(self) -> dict[Component, ComponentSpec]:
        """The components' specs."""
        return component_specs(self.manifest.checkpoint.dimensions)

    @property
    def tokenizer(self) -> Path:
        """The folder whose `tokenizer` turns prompts into ids."""
        return self.choice.checkpoint

    def served(self, backend: str) -> dict[Component, ServedComponent]:
        """The components as the server's executor takes them, with nothing to fall back on."""
        return {c: ServedComponent(self.specs[c], engine, _no_fallback) for c, engine in self.engines[backend].items()}


def open_subject(choice: Choice) -> "tuple[Subject, ZImagePipeline]":
    """Loads diffusers' pipeline, and eager and the engines of all chosen backends over the same weights.

    Raises:
        BenchmarkError: an engine is not there, is of another model, or would fall back.
        ExportError, ZServeError: the checkpoint is broken, or an engine cannot be built or loaded.
    """
    pipeline = load_pipeline(choice)
    modules = SharedModules(pipeline, choice.precision, choice.device)
    subject = _open(choice, modules, (Backend.EAGER, *choice.compiled))
    settle()
    return subject, pipeline


def open_served(choice: Choice, backend: str) -> Subject:
    """Loads the engines of one backend alone, as a worker does; raises like `open_subject`."""
    return _open(choice, EagerModules(choice.checkpoint, choice.precision, choice.device), (backend,))


def _open(choice: Choice, modules: EagerModules, backends: Sequence[str]) -> Subject:
    torch.set_num_threads(cpu_threads(1))
    model = describe(choice)
    engines = {str(row): _load_row(choice, model, modules, str(row)) for row in backends}
    return Subject(choice, model, engines)


def describe(choice: Choice) -> Manifest:
    """The model as a manifest without engines."""
    checkpoint = CheckpointRecord.of(open_checkpoint(choice.checkpoint))
    return Manifest(
        name="benchmark",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        checkpoint=checkpoint,
        precision=choice.precision,
        max_batch=choice.max_batch,
        max_size=choice.max_size,
        default_size=choice.sizes[0],
        engines=(),
        preview=PreviewProjection(((0.0, 0.0, 0.0),) * checkpoint.dimensions.latent_channels, (0.0, 0.0, 0.0)),
        source=source_hash(),
    )


def load_pipeline(choice: Choice) -> "ZImagePipeline":
    """diffusers' pipeline, without progress bars.

    Raises:
        CheckpointError: the checkpoint is incomplete.
    """
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    whole, dtype = open_checkpoint(choice.checkpoint).path, TORCH_DTYPES[choice.precision]
    pipeline = diffusers.ZImagePipeline.from_pretrained(whole, dtype=dtype, low_cpu_mem_usage=False)
    pipeline = pipeline.to(choice.device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _load_row(choice: Choice, model: Manifest, modules: EagerModules, row: str) -> Engines:
    backend = backend_of(row)
    if backend is Backend.EAGER:
        return _load(Path(), model, modules, backend)
    folder, manifest = checked_version(choice, row)
    return _load(folder, manifest, modules, backend)


def _load(folder: Path, manifest: Manifest, modules: EagerModules, backend: Backend) -> Engines:
    target = current_target(str(modules.device))
    loader = EngineLoader(folder, manifest, target, modules, cpu_threads(1), FallbackPolicy.REFUSE)
    return {component: Counted(served, backend) for component, served in loader.load_all().items()}


def _no_fallback() -> NoReturn:
    raise BenchmarkError("the engine failed, and eager is not to be measured in its place")
