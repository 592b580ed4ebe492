"""`identity`: returns its inputs. For measuring the server itself, and for the tests of clients.

Input i becomes output i. The parameter `execute_delay_ms` of the model or of a request makes every execution take that
long; on a decoupled model a request's `repeat` is the number of responses.
"""

import asyncio
import math
from collections.abc import AsyncGenerator
from dataclasses import replace

from server.backends.base import Host, ModelFolder, unloaded
from server.backends.batcher import Batcher
from server.errors import ConfigError, InvalidRequestError
from server.statistics import Statistics
from server.tensors import InferRequest, InferResponse

MAX_REPEAT = 100_000
MAX_DELAY_MS = 3_600_000.0


class IdentityModel:
    """See the module."""

    def __init__(self, folder: ModelFolder, host: Host) -> None:
        self.spec = folder.spec()
        self.statistics = Statistics()
        self.ready = False
        self._delay_ms = folder.file.parameters.get("execute_delay_ms", "0")
        self._batcher = Batcher(
            self._execute,
            self.statistics,
            policy=folder.file.queue,
            max_batch_size=folder.file.rows_together,
            instances=folder.file.instances,
        )

    async def load(self) -> None:
        """See `Model`."""
        if [(t.datatype, t.dims) for t in self.spec.inputs] != [(t.datatype, t.dims) for t in self.spec.outputs]:
            raise ConfigError(f"identity model {self.spec.name!r}: its outputs must be just like its inputs, in order")
        if not 0 <= _float(self._delay_ms) <= MAX_DELAY_MS:
            raise ConfigError(
                f"execute_delay_ms: {self._delay_ms!r} is not accepted; a number from 0 to {MAX_DELAY_MS:g} is"
            )
        self.ready = True

    def retire(self) -> None:
        """See `Model`."""

    async def unload(self) -> None:
        """See `Model`."""
        self.ready = False
        self._batcher.close(unloaded(self.spec))

    async def infer(self, request: InferRequest) -> AsyncGenerator[InferResponse, None]:
        """See `Model`."""
        with self.statistics.request() as record:
            record.inferences = request.batch_size
            _number(request, "execute_delay_ms", self._delay_ms, MAX_DELAY_MS)
            outputs = tuple(
                replace(request.inputs[i.name], name=o.name)
                for i, o in zip(self.spec.inputs, self.spec.outputs, strict=True)
                if i.name in request.inputs
            )
            repeat = _whole_number(request, "repeat", 1, MAX_REPEAT) if self.spec.decoupled else 1
            for number in range(1, repeat + 1):
                record.spent = await self._batcher.run(request)
                record.responded()
                record.succeeded = number == repeat
                yield InferResponse(outputs, final=number == repeat)

    async def _execute(self, requests: list[InferRequest]) -> None:
        delay = max(_number(r, "execute_delay_ms", self._delay_ms, MAX_DELAY_MS) for r in requests)
        if delay:
            await asyncio.sleep(delay / 1e3)


def _number(request: InferRequest, name: str, default: int | str, high: float) -> float:
    """A parameter of the request, given as a number or as its text."""
    text = request.parameters.get(name, default)
    value = _float(text)
    if not 0 <= value <= high:
        raise InvalidRequestError.of(name, text, f"a number from 0 to {high:g} is")
    return value


def _whole_number(request: InferRequest, name: str, default: int, high: int) -> int:
    value = _number(request, name, default, high)
    if value != int(value):
        raise InvalidRequestError.of(name, value, f"a whole number from 0 to {high} is")
    return int(value)


def _float(text: float | str) -> float:
    """`text` as a number; NaN, which is in no range, if it is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan
