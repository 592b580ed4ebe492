"""The one place that falls back at load: the version's compiled engine, otherwise eager."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from export.errors import StaleEngineError
from export.manifest import Backend, EngineRecord, Manifest, Target
from export.rebuild import rebuild_command
from export.spec import Component, ComponentSpec, component_specs
from export.validity import check_engine
from server.config import FallbackPolicy
from server.engines.base import Engine
from server.engines.eager import EagerEngine, EagerModules
from server.engines.served import ServedComponent
from server.errors import EngineLoadError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineLoader:
    """Loads the components of one version onto one device."""

    folder: Path  # of the version
    manifest: Manifest
    target: Target
    modules: EagerModules
    threads: int
    policy: FallbackPolicy
    disabled: Mapping[Component, str] = field(default_factory=dict)  # engines not to be loaded, and why
    announce: Callable[[Component], None] = lambda component: None  # told what is loaded next

    def load_all(self) -> dict[Component, ServedComponent]:
        """Every component, on its compiled engine or on eager with the reason.

        Raises:
            EngineLoadError: an engine cannot be used and the policy refuses to fall back.
        """
        borrowing = [e.component for e in self.manifest.engines if e.backend is Backend.AOTINDUCTOR]
        eager_only = [c for c in Component if self.manifest.engine(c) is None]
        self.modules.load([*borrowing, *eager_only])
        specs = component_specs(self.manifest.checkpoint.dimensions)
        return {component: self._load(component, specs[component]) for component in Component}

    def _load(self, component: Component, spec: ComponentSpec) -> ServedComponent:
        record = self.manifest.engine(component)

        def eager() -> Engine:
            return EagerEngine(self.modules[component], self.threads)

        if record is None:
            return ServedComponent(spec, eager(), eager)
        try:
            if component in self.disabled:
                raise EngineLoadError(self.disabled[component])
            self.announce(component)
            return ServedComponent(spec, self._compiled(record, spec), eager)
        except (StaleEngineError, EngineLoadError) as error:
            if self.policy is FallbackPolicy.REFUSE:
                raise EngineLoadError(f"{error} (and --require-engine forbids eager)") from error
            log.warning("%s falls back to eager: %s", component, error)
            return ServedComponent(spec, eager(), eager, reason=str(error))

    def _compiled(self, record: EngineRecord, spec: ComponentSpec) -> Engine:
        rebuild = rebuild_command(self.manifest, self.folder.parent, record, self.target)
        check_engine(record, self.folder, self.target, rebuild)
        path, profile = self.folder / record.file, self.manifest.served_shapes
        match record.backend:
            case Backend.TENSORRT | Backend.TENSORRT_RTX:
                from server.engines.tensorrt import TensorRtEngine

                return TensorRtEngine(path, spec, record, self.modules.device)
            case Backend.ONNXRUNTIME:
                from server.engines.onnxruntime import OnnxRuntimeEngine

                return OnnxRuntimeEngine(path, spec, profile, self.threads)
            case Backend.AOTINDUCTOR:
                from server.engines.aotinductor import AotInductorEngine

                return AotInductorEngine(path, spec, profile, self.modules[spec.component], self.threads)
            case Backend.EAGER:
                raise EngineLoadError("the manifest lists eager as a compiled engine; export the model again")
