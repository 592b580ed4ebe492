"""Every error class through a real channel: its status, its text, and nothing of what was not foreseen."""

from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from dataclasses import replace

import grpc
import grpc.aio
import pytest

from protos.zserve.v1 import image_generation_pb2 as pb
from protos.zserve.v1 import image_generation_pb2_grpc as pb_grpc
from server import errors
from server.config import ModelConfig
from server.errors import ZServeError, error_of_status
from server.requests import Event, GenerationRequest, Queued
from server.rpc.health import enable_reflection
from server.rpc.images import WAITED, ImageGenerationClient, ImageGenerationServicer
from server.rpc.interceptors import ErrorInterceptor
from server.service import ModelStatus
from tests.fakes import a_request


class FailingService:
    """An image service that admits every request and then raises."""

    def __init__(self) -> None:
        self.error: Exception = ZServeError("")
        self.closed = 0
        self.asked: list[GenerationRequest] = []

    def model(self, name: str) -> ModelStatus:
        return ModelStatus(ModelConfig("demo"), (), ready=True)

    def models(self) -> list[ModelStatus]:
        raise self.error

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        self.asked.append(request)
        try:
            yield Queued(0)
            raise self.error
        finally:
            self.closed += 1


def subclasses(kind: type[ZServeError]) -> Iterator[type[ZServeError]]:
    """The tree of `server.errors`; a translation of it for another protocol is not part of it."""
    yield kind
    for sub in kind.__subclasses__():
        if sub.__module__ == errors.__name__:
            yield from subclasses(sub)


@pytest.fixture
async def running() -> AsyncIterator[tuple[FailingService, str]]:
    service = FailingService()
    server = grpc.aio.server(interceptors=[ErrorInterceptor()])
    pb_grpc.add_ImageGenerationServicer_to_server(ImageGenerationServicer(service), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield service, f"127.0.0.1:{port}"
    await server.stop(None)


async def test_the_log_has_one_line_of_what_a_client_made_up(
    running: tuple[FailingService, str], caplog: pytest.LogCaptureFixture
) -> None:
    service, url = running
    service.error = errors.ModelNotFoundError("no model 'x\n2026-01-01 ERROR forged 猫" + "y" * 100_000)
    with caplog.at_level("INFO", "server.rpc.interceptors"):
        await answers(url)
    lines = [record.message for record in caplog.records if record.name == "server.rpc.interceptors"]
    assert len(lines) == 3
    assert all("'x\\n2026-01-01 ERROR forged 猫y" in line and len(line) < 2000 for line in lines)


async def answers(url: str) -> list[tuple[grpc.StatusCode, str]]:
    """How each kind of call ends: unary, streaming, and unary over a stream of events."""
    ends = []
    async with grpc.aio.insecure_channel(url) as channel:
        stub = pb_grpc.ImageGenerationStub(channel)
        request = pb.GenerateRequest(prompt="a cat")
        for call in (stub.ListModels(pb.ListModelsRequest()), stub.GenerateImage(request)):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            ends.append((caught.value.code(), caught.value.details() or ""))
        stream = stub.Generate(request)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            assert [event async for event in stream] == []
        ends.append((caught.value.code(), caught.value.details() or ""))
    return ends


@pytest.mark.parametrize("kind", list(subclasses(ZServeError)), ids=lambda k: k.__name__)
async def test_an_error_arrives_with_its_status_and_text(
    running: tuple[FailingService, str], kind: type[ZServeError]
) -> None:
    service, url = running
    service.error = kind("what was wrong; what is accepted")
    assert await answers(url) == [(kind.status, "what was wrong; what is accepted")] * 3
    assert service.closed == 2


@pytest.mark.parametrize("letter", ["x", "\u3000"])
async def test_a_text_without_end_is_cut_and_its_status_kept(running: tuple[FailingService, str], letter: str) -> None:
    """A request may be named in it, and gRPC ends a call with RESOURCE_EXHAUSTED where trailers are long."""
    service, url = running
    service.error = errors.QueueFullError("no: " + 20_000 * letter, retry_after=1.0)
    for _ in range(10):  # past the soft limit gRPC refuses at random
        for code, text in await answers(url):
            assert code is errors.QueueFullError.status
            assert text.startswith("no: " + 300 * letter)
            assert text.endswith(" ...")


async def test_a_text_that_is_no_unicode_arrives_as_far_as_it_is(running: tuple[FailingService, str]) -> None:
    """A file's name may be in it."""
    service, url = running
    service.error = errors.UnavailableError("cannot read caf\udce9", retry_after=1.0)
    assert await answers(url) == [(grpc.StatusCode.UNAVAILABLE, "cannot read caf?")] * 3


async def test_what_was_not_foreseen_keeps_its_detail_in_the_log(
    running: tuple[FailingService, str], caplog: pytest.LogCaptureFixture
) -> None:
    service, url = running
    service.error = ValueError("the password is swordfish")
    for code, text in await answers(url):
        assert code is grpc.StatusCode.INTERNAL
        assert "swordfish" not in text
        reference = text.removeprefix("internal error ").partition(";")[0]
        assert reference in caplog.text
    assert "swordfish" in caplog.text


async def test_a_workers_error_is_raised_again_as_itself(running: tuple[FailingService, str]) -> None:
    service, url = running
    client = ImageGenerationClient(url)
    kinds = (errors.InvalidRequestError, errors.DeviceMemoryError, errors.DeadlinePassedError, errors.EngineError)
    for kind in kinds:
        service.error = kind("because")
        with pytest.raises(kind, match="because"):
            async for event in client.generate(a_request()):
                assert event == Queued(0)
    await client.close()


async def test_a_worker_hears_how_long_a_request_has_waited(running: tuple[FailingService, str]) -> None:
    service, url = running
    client, waited = ImageGenerationClient(url), replace(a_request(), waited=91.5, delayed=True)
    for request in (waited, a_request()):
        with pytest.raises(ZServeError):
            async for _ in client.generate(request):
                pass
    await client.close()
    assert [(asked.waited, asked.delayed) for asked in service.asked] == [(91.5, True), (0.0, False)]


async def test_a_worker_has_no_more_time_than_the_request(running: tuple[FailingService, str]) -> None:
    service, url = running
    client = ImageGenerationClient(url)
    for timeout in (60.0, None):
        with pytest.raises(ZServeError):
            async for _ in client.generate(replace(a_request(), timeout=timeout)):
                pass
    await client.close()
    limited, unlimited = (asked.timeout for asked in service.asked)
    assert limited is not None
    assert 0 < limited < 61.0  # gRPC rounds it up
    assert unlimited is None


async def test_a_request_whose_time_is_up_is_not_sent_to_a_worker(running: tuple[FailingService, str]) -> None:
    service, url = running
    client = ImageGenerationClient(url)
    with pytest.raises(errors.DeadlinePassedError):
        async for _ in client.generate(replace(a_request(), timeout=-1.0)):
            pass
    await client.close()
    assert service.asked == []


async def test_a_request_that_had_reached_the_worker_that_it_loses_says_so(running: tuple[FailingService, str]) -> None:
    """It may be what has ended the worker."""
    service, url = running
    client, service.error = ImageGenerationClient(url), errors.UnavailableError("gone")
    with pytest.raises(errors.WorkerLostError) as lost:
        async for _ in client.generate(a_request()):
            pass
    await client.close()
    assert lost.value.reached is True


async def test_no_previews_are_made_for_a_call_that_has_no_place_for_them(running: tuple[FailingService, str]) -> None:
    service, url = running
    async with grpc.aio.insecure_channel(url) as channel:
        with pytest.raises(grpc.aio.AioRpcError):
            stub = pb_grpc.ImageGenerationStub(channel)
            await stub.GenerateImage(pb.GenerateRequest(prompt="a cat", preview_interval=2))
    assert [asked.preview_interval for asked in service.asked] == [0]


async def test_a_time_of_many_digits_is_no_error(running: tuple[FailingService, str]) -> None:
    service, url = running
    service.error = errors.UnavailableError("as it should", retry_after=1.0)
    async with grpc.aio.insecure_channel(url) as channel:
        stub = pb_grpc.ImageGenerationStub(channel)
        with pytest.raises(grpc.aio.AioRpcError, match="as it should"):
            await stub.GenerateImage(pb.GenerateRequest(prompt="a cat"), metadata=[(WAITED, 400 * "9")])


@pytest.mark.parametrize("told", ["", "-1", "1e3", "nan"])
async def test_a_time_that_is_none_is_no_error(running: tuple[FailingService, str], told: str) -> None:
    """Anybody may send the frontend what it tells its workers by; it takes no notice."""
    service, url = running
    async with grpc.aio.insecure_channel(url) as channel:
        with pytest.raises(grpc.aio.AioRpcError):
            stub = pb_grpc.ImageGenerationStub(channel)
            await stub.GenerateImage(pb.GenerateRequest(prompt="a cat"), metadata=[(WAITED, told)])
    assert [asked.waited for asked in service.asked] == [0.0]


def test_the_tree_at_the_top_of_the_file_is_true() -> None:
    described = errors.__doc__ or ""
    for kind in subclasses(ZServeError):
        line = next(line for line in described.splitlines() if f" {kind.__name__} " in f" {line.strip('│├└─ ')} ")
        statuses = [code.name for code in grpc.StatusCode if f" {code.name} " in line]
        if statuses:
            assert statuses == [kind.status.name]
    assert isinstance(error_of_status(grpc.StatusCode.DATA_LOSS, "x"), ZServeError)


async def test_bytes_that_are_no_message_are_the_clients_fault_on_a_stream_too() -> None:
    server = grpc.aio.server(interceptors=[ErrorInterceptor()])
    enable_reflection(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
        with pytest.raises(grpc.aio.AioRpcError, match="the request cannot be read") as caught:
            await anext(aiter(call(iter([b"\xff\xff"]))))
    await server.stop(None)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
