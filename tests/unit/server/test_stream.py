"""A stream's answers: each request has a last one that says so, whatever has become of it."""

from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import pytest
from tritonclient.grpc import service_pb2 as pb

from server.errors import ModelNotFoundError
from server.rpc.triton.stream import InferStream
from server.rpc.triton.tensors import FINAL, InferCall
from server.tensors import InferRequest, InferResponse, ModelSpec


class Silent:
    """Ends a request without a response."""

    def __init__(self, *, decoupled: bool) -> None:
        self.spec = ModelSpec("silent", "1", "fake", (), (), decoupled=decoupled)

    async def infer(self, request: InferRequest) -> AsyncGenerator[InferResponse, None]:
        for response in ():
            yield response


async def answers(model: Silent | None) -> list[tuple[str, str, bool]]:
    """Error, id and whether it is the last one of each response to one request."""

    async def begin(request: pb.ModelInferRequest) -> tuple[Any, InferCall, None]:
        if model is None:
            raise ModelNotFoundError("no such model")
        asked = InferRequest(model.spec, request.id, {})
        return model, InferCall(asked, empty_final=False, outputs={}, regions=None), None  # type: ignore[arg-type]

    async def requests() -> AsyncIterator[pb.ModelInferRequest]:
        yield pb.ModelInferRequest(id="mine")

    stream = InferStream(begin, lambda trace: None, fail_call=False)
    return [
        (r.error_message, r.infer_response.id, r.infer_response.parameters[FINAL].bool_param)
        async for r in stream.run(requests())
    ]


async def test_a_request_that_cannot_begin_has_its_last_answer() -> None:
    assert await answers(None) == [("no such model", "mine", True)]


@pytest.mark.parametrize("decoupled", [False, True])
async def test_only_a_decoupled_model_may_say_nothing(decoupled: bool) -> None:
    model = Silent(decoupled=decoupled)
    nothing = [] if decoupled else [("model 'silent' gave no response", "mine", True)]
    assert await answers(model) == nothing
