"""Builders by backend. Heavy imports happen inside the factories."""

from export.build.base import Builder, BuildInputs, BuildOptions, Built, Runner
from export.manifest import Backend

__all__ = ["BuildInputs", "BuildOptions", "Builder", "Built", "Runner", "builder_for"]


def builder_for(backend: Backend, options: BuildOptions) -> Builder | None:
    """The builder of `backend`; None for eager, which needs no engine files."""
    match backend:
        case Backend.TENSORRT | Backend.TENSORRT_RTX:
            from export.build.tensorrt import TensorRtBuilder

            return TensorRtBuilder(backend, options)
        case Backend.ONNXRUNTIME:
            from export.build.onnxruntime import OnnxRuntimeBuilder

            return OnnxRuntimeBuilder(options)
        case Backend.AOTINDUCTOR:
            from export.build.aotinductor import AotInductorBuilder

            return AotInductorBuilder()
        case Backend.EAGER:
            return None
