"""ModelStreamInfer: many requests and responses on one call.

Every request is a task; responses of decoupled models go out as they come, those of others in the order of the
requests. An error belongs to its request alone and travels in-band, unless the client's metadata asks for the call to
end with it.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2 as pb

from server.backends.base import Model, taking
from server.errors import EngineRunError
from server.rpc.interceptors import reported, unreadable
from server.rpc.triton.errors import translate
from server.rpc.triton.tensors import FINAL, InferCall
from server.tensors import InferResponse
from server.tracing import Trace

MAX_OPEN = 1024  # requests of one stream under way; more are not read from the wire until some end
MAX_UNSENT = 64  # responses that wait for the client to take them

Begin = Callable[[pb.ModelInferRequest], Awaitable[tuple[Model, InferCall, Trace | None]]]
End = Callable[[Trace | None], None]


@dataclass(eq=False)
class _Outgoing:
    """A response on its way to the client."""

    message: pb.ModelStreamInferResponse
    written: asyncio.Event = field(default_factory=asyncio.Event)


class InferStream:
    """One call."""

    def __init__(self, begin: Begin, end: End, *, fail_call: bool) -> None:
        self._begin, self._end, self._fail_call = begin, end, fail_call
        self._outgoing: asyncio.Queue[_Outgoing | Exception | None] = asyncio.Queue(MAX_UNSENT)
        self._open = asyncio.Semaphore(MAX_OPEN)
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self, requests: AsyncIterator[pb.ModelInferRequest]) -> AsyncIterator[pb.ModelStreamInferResponse]:
        """Answers `requests` until they end, or the client goes away.

        Raises:
            Exception: that of the first request to fail, if the client asked for that.
        """
        reader = asyncio.create_task(self._read(requests))
        try:
            while (response := await self._outgoing.get()) is not None:
                if isinstance(response, Exception):
                    raise response
                yield response.message
                response.written.set()
        finally:
            for task in {reader, *self._tasks}:
                task.cancel()
            await asyncio.gather(reader, *self._tasks, return_exceptions=True)

    async def _read(self, requests: AsyncIterator[pb.ModelInferRequest]) -> None:
        """Reads all requests; a message that cannot be parsed ends the call."""
        try:
            await self._read_all(requests)
        except DecodeError as error:
            await self._outgoing.put(unreadable(error))
        else:
            await self._outgoing.put(None)

    async def _read_all(self, requests: AsyncIterator[pb.ModelInferRequest]) -> None:
        previous: asyncio.Task[None] | None = None
        async for request in requests:
            await self._open.acquire()
            previous = asyncio.create_task(self._answer(request, previous))
            self._tasks.add(previous)
            previous.add_done_callback(self._ended)
        await asyncio.gather(*self._tasks)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._open.release()

    async def _answer(self, request: pb.ModelInferRequest, previous: asyncio.Task[None] | None) -> None:
        try:
            model, call, trace = await self._begin(request)
        except Exception as error:  # noqa: BLE001 - the process boundary
            response = pb.ModelInferResponse(id=request.id)
            response.parameters[FINAL].bool_param = True
            await self._fail(error, response, previous)
            return
        before = None if model.spec.decoupled else previous
        try:
            with nullcontext() if trace is None else trace.answering():
                await self._respond(model, call, trace, before)
        except Exception as error:  # noqa: BLE001 - the process boundary
            spec = model.spec
            response = pb.ModelInferResponse(model_name=spec.name, model_version=spec.version, id=request.id)
            response.parameters[FINAL].bool_param = True
            await self._fail(error, response, before)
        finally:
            self._end(trace)
        if model.spec.decoupled and previous is not None:
            await asyncio.wait({previous})  # who waits for this one waits for all before it

    async def _respond(
        self, model: Model, call: InferCall, trace: Trace | None, before: asyncio.Task[None] | None
    ) -> None:
        given = final = False
        async with taking(model.infer(call.request)) as responses:
            async for response in responses:
                given = True
                if before is not None:
                    await asyncio.wait({before})
                final = response.final
                await self._send(call, response, trace)
        if not given and not model.spec.decoupled:
            raise EngineRunError(f"model {model.spec.name!r} gave no response")
        if not final and call.empty_final:
            await self._send(call, InferResponse(), trace)

    async def _send(self, call: InferCall, response: InferResponse, trace: Trace | None) -> None:
        outgoing = _Outgoing(pb.ModelStreamInferResponse())
        await call.encode(response, outgoing.message.infer_response)
        outgoing.message.infer_response.parameters[FINAL].bool_param = response.final
        if trace is None:
            await self._outgoing.put(outgoing)
            return
        trace.keep(outputs=response.outputs)
        with trace.sending():
            await self._outgoing.put(outgoing)
            await outgoing.written.wait()

    async def _fail(self, error: Exception, response: Any, before: asyncio.Task[None] | None) -> None:
        if before is not None:
            await asyncio.wait({before})
        if self._fail_call:
            await self._outgoing.put(error)
            return
        text = reported(translate(error))[1]
        message = pb.ModelStreamInferResponse(error_message=text, infer_response=response)
        await self._outgoing.put(_Outgoing(message))
