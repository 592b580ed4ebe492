"""The seam between Triton's protocol and what answers it: every backend makes a `Model` from a `ModelFolder`."""

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

from server.config import ServeConfig
from server.errors import ModelNotReadyError
from server.frontend.dispatcher import Dispatcher
from server.frontend.workers import COMMAND
from server.queue_policy import QueuePolicy
from server.statistics import Statistics
from server.tensors import InferRequest, InferResponse, ModelSpec, TensorSpec

Item = TypeVar("Item")


@dataclass(frozen=True)
class VersionPolicy:
    """Which versions of a folder are served: the `latest` N, `specific` ones, or all if neither is set."""

    latest: int = 1
    specific: tuple[str, ...] = ()

    def choose(self, versions: list[str]) -> list[str]:
        """Those of `versions` that are served, oldest first."""
        ordered = sorted(versions, key=int)
        if self.specific:
            return [v for v in ordered if v in self.specific]
        return ordered[-self.latest :] if self.latest else ordered


@dataclass(frozen=True)
class InstanceGroup:
    """`count` instances on each of `gpus`; without any, where `kind` says."""

    kind: str  # in Triton's words
    count: int = 1
    gpus: tuple[int, ...] = ()


@dataclass(frozen=True)
class ModelFile:
    """A model's config.pbtxt, read once per load; what its parameters mean is up to the backend."""

    name: str
    backend: str
    text: str
    max_batch_size: int = 0
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    decoupled: bool = False
    groups: tuple[InstanceGroup, ...] = ()
    versions: VersionPolicy = field(default_factory=VersionPolicy)
    queue: QueuePolicy = field(default_factory=QueuePolicy)
    dynamic_batching: bool = False
    parameters: Mapping[str, str] = field(default_factory=dict)
    response_cache: bool = False
    warmup: tuple[str, ...] = ()  # the names of its samples

    @property
    def instances(self) -> int:
        """How many executions run at a time, where they do not depend on the device."""
        return sum(group.count for group in self.groups) or 1

    @property
    def rows_together(self) -> int:
        """How many rows of several requests may share an execution; 1 without dynamic batching."""
        return self.max_batch_size if self.dynamic_batching else 1


@dataclass(frozen=True)
class ModelFolder:
    """One version of a model in the repository."""

    path: Path  # holds config.pbtxt and the versions' folders
    version: str
    file: ModelFile

    def spec(self) -> ModelSpec:
        """The signature that the config declares."""
        f = self.file
        return ModelSpec(f.name, self.version, f.backend, f.inputs, f.outputs, f.max_batch_size, f.decoupled)


@dataclass(frozen=True)
class Host:
    """What the server offers a backend. Few need any of it."""

    config: ServeConfig
    dispatcher: Dispatcher
    sockets: Path  # a folder for Unix sockets and other temporary files
    changed: Callable[[], None]  # to be called when a model's readiness has changed
    worker_command: Sequence[str] = COMMAND


class Model(Protocol):
    """One version of a model, as tensors. Runs on the event loop: heavy work belongs in a process or a thread."""

    spec: ModelSpec
    statistics: Statistics

    async def load(self) -> None:
        """Returns once it serves. If it raises anything, `unload` is called.

        Raises:
            ZServeError: it cannot be served; the message is shown as the version's reason.
        """

    def retire(self) -> None:
        """Accepts no more requests; those under way continue."""

    async def unload(self) -> None:
        """Frees everything, including what a cancelled `load` has begun; requests under way end with `unloaded`."""

    @property
    def ready(self) -> bool:
        """Whether it serves at this moment. If no version does, requests still come, and wait or fail."""

    def infer(self, request: InferRequest) -> AsyncGenerator[InferResponse, None]:
        """The responses to `request`; closing the generator cancels it, throwing an error into it makes it a failure.

        Raises:
            ZServeError: it cannot be answered.
        """


@asynccontextmanager
async def taking(items: AsyncGenerator[Item, None]) -> AsyncIterator[AsyncGenerator[Item, None]]:
    """Closes `items` at the end, as `aclosing` does, after throwing an error of the body into it.

    So a request whose response cannot be delivered counts as a failure, although the model has answered it.
    """
    async with aclosing(items):
        try:
            yield items
        except Exception as error:
            await items.athrow(error)
            raise


def unloaded(spec: ModelSpec) -> ModelNotReadyError:
    """The error of requests that are still under way when their model is unloaded."""
    return ModelNotReadyError(
        f"version {spec.version} of model {spec.name!r} was unloaded before the request was done; send it again where "
        "another version serves",
        retry_after=1.0,
    )


Backend = Callable[[ModelFolder, Host], Model]
