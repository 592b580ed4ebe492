"""TensorRT plans, of both flavours: they share a Python API, and differ in what a plan is built for and with.

`tensorrt_rtx` builds ahead of time, on any machine, for the GPUs it is told; without weights for one, where there is a
GPU. `tensorrt` builds for the GPU it runs on, and keeps a timing cache beside the versions. A plan is strongly typed:
the graph itself carries the precision.
"""

from pathlib import Path
from typing import BinaryIO

import onnx_ir as ir
import torch
from torch import nn

from export.build.base import BuildInputs, BuildOptions, Built, Runner
from export.build.plan_callbacks import build_monitor, plan_writer
from export.build.plan_graph import fit_for_tensorrt
from export.build.plan_runner import PlanRunner
from export.build.shared_plans import find_plan
from export.devices import current_target
from export.errors import BuildError, UnsupportedError
from export.manifest import Backend, PlanRecord, PlanWeights, Verbosity, content_digest
from export.onnx import LIBRARIES, outline_graph
from export.plans import Foreign, described, failure, import_flavour, logger
from export.rebuild import target_name
from export.repository import take
from export.spec import ComponentSpec, Precision
from export.validity import BINDING_LIBRARIES

TIMING_CACHE = "tensorrt.timing_cache"
# TensorRT-RTX has neither bf16 nor products of fp32 matrices for Turing (SM75; seen with 1.7.1), and fp16 is too small.
OLDEST_RTX = 80
OLDEST_NATIVE = (10, 15)  # whose parser supports ONNX's Attention (10.14) and RMSNormalization


class TensorRtBuilder:
    """One `.plan` per component with all its profiles; without weights, it has the graph and the weights beside it."""

    def __init__(self, backend: Backend, options: BuildOptions) -> None:
        (self._library,) = BINDING_LIBRARIES[backend]
        self._backend = backend
        self._options = options
        self.libraries: tuple[str, ...] = (self._library, *LIBRARIES)

    def check(self, precision: Precision) -> None:
        trt = import_flavour(self._library)
        if self._backend is Backend.TENSORRT:
            _check_native(trt, self._options, precision)
        else:
            _check_ahead_of_time(trt, self._options)

    def build(self, inputs: BuildInputs, folder: Path) -> Built:
        plan = folder / f"{inputs.spec.component}.plan"
        graph, weights = plan.with_suffix(".onnx"), plan.with_suffix(".safetensors")
        outlined = outline_graph(inputs.source, inputs.spec)
        outlined.attach(inputs.source, weights)
        attention = fit_for_tensorrt(outlined.model)
        ir.save(outlined.model, graph)
        record = PlanRecord(
            profiles=inputs.profiles,
            weights=self._options.weights,
            verbosity=self._options.verbosity,
            graph=content_digest(graph),
            fused_attention=attention.fused,
            decomposed_attention=attention.decomposed,
        )
        if self._options.weights is PlanWeights.STRIPPED:
            shared = inputs.repository and find_plan(inputs.repository, self._backend, record, self._options.targets)
            if shared is None:
                self.write_plan(graph, inputs, plan)
            else:
                take([shared], folder)
            return Built((plan, graph, weights), record)
        self.write_plan(graph, inputs, plan)
        graph.unlink()
        weights.unlink()
        return Built((plan,), record)

    def load(self, path: Path, module: nn.Module, spec: ComponentSpec) -> Runner:
        return PlanRunner(import_flavour(self._library), path, spec, self._backend)

    def write_plan(self, graph: Path, inputs: BuildInputs, path: Path) -> None:
        """Compiles the ONNX file `graph` into `path`."""
        trt = import_flavour(self._library)
        log = logger(trt)
        log.forget()
        builder = trt.Builder(log)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, log)
        if not parser.parse_from_file(str(graph)):
            raise BuildError(f"{self._backend} cannot read the graph of {inputs.spec.component}: {log.said()}")
        _check_tensors(trt, network, inputs.spec)
        config = self._config(trt, builder, inputs)
        cache = path.parent.parent / TIMING_CACHE  # beside the versions, so that the next one is built faster
        if self._backend is Backend.TENSORRT:
            _use_timing_cache(config, cache)
        monitor = build_monitor(trt, inputs.report)  # has to live as long as the configuration
        config.progress_monitor = monitor
        with path.open("wb") as file:
            built = _build(trt, builder, (network, config), file)
        inputs.report()  # if that is what ended the build
        if not built:
            raise failure(f"{self._backend} could not build {inputs.spec.component}", log.said(), BuildError)
        if self._backend is Backend.TENSORRT:
            cache.write_bytes(config.get_timing_cache().serialize())

    def _config(self, trt: Foreign, builder: Foreign, inputs: BuildInputs) -> Foreign:
        config = builder.create_builder_config()
        config.clear_flag(trt.BuilderFlag.TF32)  # on by default, and not what fp32 promises
        if self._options.verbosity is Verbosity.DETAILED:
            config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        if self._options.weights is PlanWeights.STRIPPED:
            config.set_flag(trt.BuilderFlag.STRIP_PLAN)
            config.set_flag(trt.BuilderFlag.REFIT)  # with any weights, not just with those stripped
        if self._backend is Backend.TENSORRT_RTX:
            names = [target_name(t).upper() for t in self._options.targets]
            config.num_compute_capabilities = len(names)
            for index, name in enumerate(names):
                config.set_compute_capability(getattr(trt.ComputeCapability, name), index)
            if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):  # without it, calls may not be captured as graphs
                config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
        for profile in inputs.profiles:
            shapes = builder.create_optimization_profile()
            for name, bounds in profile.input_shapes(inputs.spec):
                shapes.set_shape(name, *bounds)
            config.add_optimization_profile(shapes)
        return config


def _build(trt: Foreign, builder: Foreign, what: tuple[Foreign, Foreign], file: BinaryIO) -> bool:
    """Builds a network as its configuration says and writes the plan; False if TensorRT could not."""
    if not hasattr(builder, "build_serialized_network_to_stream"):
        plan = builder.build_serialized_network(*what)
        return plan is not None and bool(file.write(plan))
    writer = plan_writer(trt, file)  # so that the plan is not in memory as well
    built = bool(builder.build_serialized_network_to_stream(*what, writer))
    if writer.error is not None:
        raise writer.error
    return built


def _check_native(trt: Foreign, options: BuildOptions, precision: Precision) -> None:
    if tuple(map(int, trt.__version__.split(".")[:2])) < OLDEST_NATIVE:
        raise UnsupportedError(
            f"TensorRT {trt.__version__} cannot read these graphs; "
            f"{'.'.join(map(str, OLDEST_NATIVE))} is the oldest that can: pip install --upgrade tensorrt"
        )
    if not torch.cuda.is_available():
        raise UnsupportedError(
            "--backend tensorrt builds on the GPU that is to run the engine, and this machine has none; run this "
            "there, or build for RTX GPUs from here: --backend tensorrt_rtx --target sm89"
        )
    here = current_target("cuda")
    if options.targets != (here,) or options.targets[0].model != here.model:  # --target names no model
        raise UnsupportedError(f"--backend tensorrt builds for the GPU it runs on, {here}; leave --target out")
    if precision is not Precision.FP32 and float(here.compute_capability or 0) < 8:
        raise UnsupportedError(
            f"--backend tensorrt has no {precision} for {here}, but for compute capability 8.0 and newer; give "
            "--precision fp32, or export on such a GPU"
        )


def _check_ahead_of_time(trt: Foreign, options: BuildOptions) -> None:
    names = [name for name in trt.ComputeCapability.__members__ if name.startswith("SM")]
    known = [name for name in names if int(name[2:]) >= OLDEST_RTX]
    for target in options.targets:
        if target_name(target).upper() not in known:
            raise UnsupportedError(
                f"TensorRT-RTX {trt.__version__} does not build this model for {target}; it does for "
                f"{', '.join(name.lower() for name in known)}. For other NVIDIA GPUs use --backend tensorrt there"
            )
    if options.weights is PlanWeights.STRIPPED and (len(options.targets) > 1 or not torch.cuda.is_available()):
        # Seen with 1.7.1, and documented in "CPU-Only AOT and TensorRT-RTX Engines", section "Weightless Engines".
        raise UnsupportedError(
            "TensorRT-RTX builds plans without weights for one target and on a machine with a GPU only; leave out "
            "--strip-weights, or run this there with one --target"
        )


def _check_tensors(trt: Foreign, network: Foreign, spec: ComponentSpec) -> None:
    """Checks that the parser has not renamed, dropped or fixed anything: the engine is run by the spec alone."""
    found = [network.get_input(i) for i in range(network.num_inputs)]
    found += [network.get_output(i) for i in range(network.num_outputs)]
    has = [(t.name, t.dtype, tuple(t.shape)) for t in found]
    wanted = [described(trt, tensor) for tensor in (*spec.inputs, spec.output)]
    if has != wanted:
        raise BuildError(f"the network of {spec.component} has tensors {has}; its spec says {wanted}")


def _use_timing_cache(config: Foreign, file: Path) -> None:
    """Reuses what earlier builds measured; a cache of another GPU or version is refused and started anew."""
    kept = file.read_bytes() if file.is_file() else b""
    if not config.set_timing_cache(config.create_timing_cache(kept), False):
        config.set_timing_cache(config.create_timing_cache(b""), False)
