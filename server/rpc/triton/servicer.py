"""`inference.GRPCInferenceService`: decode, call, encode."""

from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from typing import Any

import grpc.aio
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc as pb_grpc

from server.backends.base import Model, taking
from server.config import ControlMode, ServeConfig
from server.errors import (
    EngineRunError,
    InvalidRequestError,
    ModelNotFoundError,
    ModelNotReadyError,
    ShuttingDownError,
    UnavailableError,
    UnsupportedError,
)
from server.frontend.repository import Repository
from server.frontend.versions import ModelState
from server.rpc.tracing import end_with_call
from server.rpc.triton import settings
from server.rpc.triton.cuda_memory import CudaRegion
from server.rpc.triton.model_config import complete_config
from server.rpc.triton.shared_memory import SharedMemory
from server.rpc.triton.statistics import encode_statistics
from server.rpc.triton.stream import InferStream
from server.rpc.triton.system_memory import SystemRegion
from server.rpc.triton.tensors import InferCall, decode_call
from server.statistics import OBSERVER
from server.tensors import Delivery, InferRequest, InferResponse, ModelSpec, TensorSpec
from server.tracing import Call, Trace, Tracer, trace_context

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
EXTENSIONS = (
    "model_repository",
    "model_repository(unload_dependents)",
    "schedule_policy",
    "model_configuration",
    "binary_tensor_data",
    "parameters",
    "statistics",
    "trace",
    "logging",
)
GRPC_ERROR = ("triton_grpc_error", "true")  # metadata of a client that wants a stream to end at its first error

Context = grpc.aio.ServicerContext[Any, Any]


@dataclass
class ServerState:
    """Where the server is in its life cycle."""

    ready: bool = False
    stopping: bool = False


@dataclass(frozen=True)
class TritonServer:
    """What the protocol's calls act on."""

    config: ServeConfig
    version: str
    repository: Repository
    state: ServerState
    memory: SharedMemory
    tracer: Tracer


def add_to(server: grpc.aio.Server, context: TritonServer) -> None:
    """Answers the protocol on `server`."""
    pb_grpc.add_GRPCInferenceServiceServicer_to_server(TritonServicer(context), server)


class TritonServicer(pb_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """All 20 calls."""

    def __init__(self, server: TritonServer) -> None:
        self._server, self._repository, self._memory = server, server.repository, server.memory
        self._tracer, self._logs = server.tracer, server.config.log

    async def ServerLive(self, request: pb.ServerLiveRequest, context: Context) -> pb.ServerLiveResponse:
        if self._server.state.stopping:
            raise ShuttingDownError("Server exiting")
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: pb.ServerReadyRequest, context: Context) -> pb.ServerReadyResponse:
        if self._server.state.stopping:
            raise ShuttingDownError("Server exiting")
        return pb.ServerReadyResponse(ready=self._server.state.ready)

    async def ModelReady(self, request: pb.ModelReadyRequest, context: Context) -> pb.ModelReadyResponse:
        try:
            model = self._repository.find(request.name, request.version)
        except (ModelNotFoundError, ModelNotReadyError):  # Triton, too, answers false where there is no such model
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=model.ready)

    async def ServerMetadata(self, request: pb.ServerMetadataRequest, context: Context) -> pb.ServerMetadataResponse:
        extensions = [*EXTENSIONS, *await self._memory.extensions()]
        return pb.ServerMetadataResponse(
            name=self._server.config.id, version=self._server.version, extensions=extensions
        )

    async def ModelMetadata(self, request: pb.ModelMetadataRequest, context: Context) -> pb.ModelMetadataResponse:
        spec = self._repository.find(request.name, request.version).spec
        versions = [m.spec.version for m in self._repository.loaded(spec.name)]
        return pb.ModelMetadataResponse(
            name=spec.name,
            versions=[request.version] if request.version else versions,
            platform=spec.backend,
            inputs=_tensors(spec, spec.inputs),
            outputs=_tensors(spec, spec.outputs),
        )

    async def ModelConfig(self, request: pb.ModelConfigRequest, context: Context) -> pb.ModelConfigResponse:
        model = self._repository.find(request.name, request.version)
        return pb.ModelConfigResponse(config=complete_config(self._repository.file(model), model.spec))

    async def ModelStatistics(self, request: pb.ModelStatisticsRequest, context: Context) -> pb.ModelStatisticsResponse:
        models = self._repository.loaded(request.name)
        if request.name and not models:
            raise InvalidRequestError(f"requested model '{request.name}' is not available")
        wanted = [m for m in models if request.version in ("", m.spec.version)]
        if request.version and not wanted:
            raise InvalidRequestError(f"requested model version is not available for model '{request.name}'")
        return pb.ModelStatisticsResponse(model_stats=[encode_statistics(m) for m in wanted])

    async def ModelInfer(self, request: pb.ModelInferRequest, context: Context) -> pb.ModelInferResponse:
        model, call, trace = await self._begin(request, context, Delivery.ONE)
        message = pb.ModelInferResponse()
        if trace is None:
            await _answer(model, call, message)
            return message
        end_with_call(self._tracer, trace, context)
        with trace.answering():
            response = await _answer(model, call, message)
            trace.keep(outputs=response.outputs)
        return message

    async def ModelStreamInfer(
        self, requests: AsyncIterator[pb.ModelInferRequest], context: Context
    ) -> AsyncIterator[pb.ModelStreamInferResponse]:
        async def begin(request: pb.ModelInferRequest) -> tuple[Model, InferCall, Trace | None]:
            return await self._begin(request, context, Delivery.MANY)

        fail_call = GRPC_ERROR in (context.invocation_metadata() or ())
        async for response in InferStream(begin, self._tracer.end, fail_call=fail_call).run(requests):
            yield response

    async def RepositoryIndex(self, request: pb.RepositoryIndexRequest, context: Context) -> pb.RepositoryIndexResponse:
        _check_repository_name(request.repository_name)
        entries = [e for e in self._repository.index() if not request.ready or e.state is ModelState.READY]
        models = [
            pb.RepositoryIndexResponse.ModelIndex(name=e.name, version=e.version, state=e.state or "", reason=e.reason)
            for e in entries
        ]
        return pb.RepositoryIndexResponse(models=models)

    async def RepositoryModelLoad(
        self, request: pb.RepositoryModelLoadRequest, context: Context
    ) -> pb.RepositoryModelLoadResponse:
        _check_repository_name(request.repository_name)
        self._check_explicit()
        await self._repository.load(request.model_name, settings.decode_override(request.parameters))
        return pb.RepositoryModelLoadResponse()

    async def RepositoryModelUnload(
        self, request: pb.RepositoryModelUnloadRequest, context: Context
    ) -> pb.RepositoryModelUnloadResponse:
        _check_repository_name(request.repository_name)
        self._check_explicit()
        self._repository.unload_soon(request.model_name)
        return pb.RepositoryModelUnloadResponse()

    async def SystemSharedMemoryStatus(
        self, request: pb.SystemSharedMemoryStatusRequest, context: Context
    ) -> pb.SystemSharedMemoryStatusResponse:
        regions = {
            name: pb.SystemSharedMemoryStatusResponse.RegionStatus(
                name=name, key=region.key, offset=region.offset, byte_size=region.byte_size
            )
            for name, region in self._memory.status(SystemRegion, request.name).items()
        }
        return pb.SystemSharedMemoryStatusResponse(regions=regions)

    async def SystemSharedMemoryRegister(
        self, request: pb.SystemSharedMemoryRegisterRequest, context: Context
    ) -> pb.SystemSharedMemoryRegisterResponse:
        await self._memory.register_system(request.name, request.key, request.offset, request.byte_size)
        return pb.SystemSharedMemoryRegisterResponse()

    async def SystemSharedMemoryUnregister(
        self, request: pb.SystemSharedMemoryUnregisterRequest, context: Context
    ) -> pb.SystemSharedMemoryUnregisterResponse:
        await self._memory.unregister(SystemRegion, request.name)
        return pb.SystemSharedMemoryUnregisterResponse()

    async def CudaSharedMemoryStatus(
        self, request: pb.CudaSharedMemoryStatusRequest, context: Context
    ) -> pb.CudaSharedMemoryStatusResponse:
        regions = {
            name: pb.CudaSharedMemoryStatusResponse.RegionStatus(
                name=name, device_id=region.device_id, byte_size=region.byte_size
            )
            for name, region in self._memory.status(CudaRegion, request.name).items()
        }
        return pb.CudaSharedMemoryStatusResponse(regions=regions)

    async def CudaSharedMemoryRegister(
        self, request: pb.CudaSharedMemoryRegisterRequest, context: Context
    ) -> pb.CudaSharedMemoryRegisterResponse:
        await self._memory.register_cuda(request.name, request.raw_handle, request.device_id, request.byte_size)
        return pb.CudaSharedMemoryRegisterResponse()

    async def CudaSharedMemoryUnregister(
        self, request: pb.CudaSharedMemoryUnregisterRequest, context: Context
    ) -> pb.CudaSharedMemoryUnregisterResponse:
        await self._memory.unregister(CudaRegion, request.name)
        return pb.CudaSharedMemoryUnregisterResponse()

    async def TraceSetting(self, request: pb.TraceSettingRequest, context: Context) -> pb.TraceSettingResponse:
        if request.model_name:
            self._repository.find(request.model_name)
        wanted = {name: list(setting.value) for name, setting in request.settings.items()}
        found = self._tracer.update(request.model_name, wanted) if wanted else self._tracer.settings(request.model_name)
        return settings.encode_trace(found)

    async def LogSettings(self, request: pb.LogSettingsRequest, context: Context) -> pb.LogSettingsResponse:
        if request.settings:
            self._logs = settings.decode_log(request.settings, self._logs)
            self._logs.apply()
        return settings.encode_log(self._logs)

    async def _begin(
        self, request: pb.ModelInferRequest, context: Context, delivery: Delivery
    ) -> tuple[Model, InferCall, Trace | None]:
        """Finds the model and decodes the request for it."""
        if self._server.state.stopping:
            raise ShuttingDownError("GRPC server is shutting down and has stopped accepting new requests.")
        model = self._repository.find(request.model_name, request.model_version)
        if model.spec.decoupled and delivery is Delivery.ONE:
            raise UnsupportedError("ModelInfer RPC doesn't support models with decoupled transaction policy")
        seconds_left = context.time_remaining()
        call = await decode_call(request, model.spec, self._memory, seconds_left=seconds_left, delivery=delivery)
        trace = self._trace(call.request, context)
        OBSERVER.set(trace)
        return model, call, trace

    def _trace(self, request: InferRequest, context: Context) -> Trace | None:
        spec, method = request.model, "ModelInfer" if request.delivery is Delivery.ONE else "ModelStreamInfer"
        if not self._tracer.settings(spec.name).active:
            return None
        call = Call(f"{SERVICE_NAME}/{method}", trace_context(context.invocation_metadata()))
        trace = self._tracer.begin(spec.name, spec.version, request.id, call)
        if trace is not None:
            trace.keep(inputs=request.inputs.values())
        return trace

    def _check_explicit(self) -> None:
        if self._server.config.model_control_mode is not ControlMode.EXPLICIT:
            raise UnavailableError("explicit model load / unload is not allowed if polling is enabled")


async def _answer(model: Model, call: InferCall, message: pb.ModelInferResponse) -> InferResponse:
    """Writes the one response of a model that is not decoupled into `message`, and returns it."""
    found = None
    async with taking(model.infer(call.request)) as responses:
        async for response in responses:
            found = response
            message.Clear()  # if there are several, the last one counts
            await call.encode(response, message)
    if found is None:
        raise EngineRunError(f"model {model.spec.name!r} gave no response")
    return found


def _tensors(spec: ModelSpec, tensors: Iterable[TensorSpec]) -> list[pb.ModelMetadataResponse.TensorMetadata]:
    return [
        pb.ModelMetadataResponse.TensorMetadata(name=t.name, datatype=t.datatype, shape=spec.batched(t.dims))
        for t in tensors
    ]


def _check_repository_name(name: str) -> None:
    if name:
        raise UnsupportedError("'repository_name' specification is not supported")
