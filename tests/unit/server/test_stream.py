"""A stream's answers: each request has a last one that says so, whatever has become of it."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import pytest
from tritonclient.grpc import service_pb2 as pb

from server.errors import ModelNotFoundError
from server.rpc.triton import stream
from server.rpc.triton.stream import InferStream
from server.rpc.triton.tensors import FINAL, InferCall
from server.tensors import InferRequest, InferResponse, ModelSpec

PATIENCE = 100.0  # seconds for what has to come about


class Silent:
    """Ends a request without a response."""

    def __init__(self, *, decoupled: bool) -> None:
        self.spec = ModelSpec("silent", "1", "fake", (), (), decoupled=decoupled)

    async def infer(self, request: InferRequest) -> AsyncGenerator[InferResponse, None]:
        for response in ():
            yield response


class Answering(Silent):
    """Answers when it is let go."""

    def __init__(self, *, decoupled: bool) -> None:
        super().__init__(decoupled=decoupled)
        self.go = asyncio.Event()

    async def infer(self, request: InferRequest) -> AsyncGenerator[InferResponse, None]:
        await self.go.wait()
        yield InferResponse()


class Broken(Silent):
    """Fails as nobody has foreseen."""

    async def infer(self, request: InferRequest) -> AsyncGenerator[InferResponse, None]:
        raise ValueError("the password is swordfish")
        yield InferResponse()


class Endless(Silent):
    """Has always one more response."""

    def __init__(self) -> None:
        super().__init__(decoupled=True)
        self.made = 0

    async def infer(self, request: InferRequest) -> AsyncGenerator[InferResponse, None]:
        while True:
            self.made += 1
            yield InferResponse(final=False)
            await asyncio.sleep(0)


def a_stream(*models: Silent | None) -> InferStream:
    """One whose requests go to `models`, each to the one that its id is the number of."""

    async def begin(request: pb.ModelInferRequest) -> tuple[Any, InferCall, None]:
        model = models[int(request.id)]
        if model is None:
            raise ModelNotFoundError("no such model")
        asked = InferRequest(model.spec, request.id, {})
        return model, InferCall(asked, empty_final=False, outputs={}, regions=None), None  # type: ignore[arg-type]

    return InferStream(begin, lambda trace: None, fail_call=False)


async def requests(*ids: str) -> AsyncIterator[pb.ModelInferRequest]:
    for one in ids:
        yield pb.ModelInferRequest(id=one)


async def others_had_their_turns() -> None:
    """More turns of the event loop than anything here needs."""
    for _ in range(30):
        await asyncio.sleep(0)


async def answers(model: Silent | None) -> list[tuple[str, str, bool]]:
    """Error, id and whether it is the last one of each response to one request."""

    return [
        (r.error_message, r.infer_response.id, r.infer_response.parameters[FINAL].bool_param)
        async for r in a_stream(model).run(requests("0"))
    ]


async def test_a_request_that_cannot_begin_has_its_last_answer() -> None:
    assert await answers(None) == [("no such model", "0", True)]


@pytest.mark.parametrize("decoupled", [False, True])
async def test_only_a_decoupled_model_may_say_nothing(decoupled: bool) -> None:
    model = Silent(decoupled=decoupled)
    nothing = [] if decoupled else [("model 'silent' gave no response", "0", True)]
    assert await answers(model) == nothing


async def test_the_order_of_requests_is_kept_around_one_of_a_decoupled_model() -> None:
    slow, decoupled, plain = (Answering(decoupled=d) for d in (False, True, False))
    decoupled.go.set(), plain.go.set()
    order = []
    async for response in a_stream(slow, decoupled, plain).run(requests("0", "1", "2")):
        order.append(response.infer_response.id)
        await others_had_their_turns()  # they may answer before the first one
        slow.go.set()
    assert order == ["1", "0", "2"]


async def test_an_error_waits_for_the_answers_to_earlier_requests() -> None:
    slow = Answering(decoupled=False)
    run = a_stream(slow, None, Silent(decoupled=False)).run(requests("0", "1", "2"))
    first = asyncio.ensure_future(anext(run))
    await others_had_their_turns()
    slow.go.set()
    assert [r.infer_response.id for r in (await first, *[r async for r in run])] == ["0", "1", "2"]


async def test_an_error_that_was_not_foreseen_keeps_its_detail_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    ((error, *rest),) = await answers(Broken(decoupled=False))
    assert error.startswith("internal error ")
    assert "swordfish" not in error
    assert rest == ["0", True]
    assert "swordfish" in caplog.text


async def test_no_more_requests_are_read_than_may_be_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "MAX_OPEN", 2)
    slow, read = Answering(decoupled=False), []

    async def noted(wanted: AsyncIterator[pb.ModelInferRequest]) -> AsyncIterator[pb.ModelInferRequest]:
        async for request in wanted:
            read.append(request.id)
            yield request

    run = a_stream(slow).run(noted(requests(*"00000")))
    first = asyncio.ensure_future(anext(run))
    await others_had_their_turns()
    assert len(read) == 3, "those that are open, and the next one"
    slow.go.set()
    async with asyncio.timeout(PATIENCE):
        assert len([await first, *[r async for r in run]]) == 5


async def test_a_model_makes_no_more_responses_than_may_wait_to_be_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "MAX_UNSENT", 2)
    model = Endless()
    run = a_stream(model).run(requests("0"))
    await anext(run)
    await others_had_their_turns()
    assert model.made == 4, "one is sent, two wait, and one has no place yet"
    await run.aclose()
