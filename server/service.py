"""The seam between the wire and what answers: the frontend's dispatcher and a worker both implement it."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol

from server.config import ModelConfig
from server.requests import Event, GenerationRequest, InstanceInfo


@dataclass(frozen=True)
class ModelStatus:
    """A model as it stands now."""

    config: ModelConfig
    instances: tuple[InstanceInfo, ...]
    ready: bool
    reason: str = ""  # why it is not ready


class ImageService(Protocol):
    """Draws images and describes its models."""

    def model(self, name: str) -> ModelStatus:
        """The model called `name`, or the only one where `name` is empty.

        Raises:
            ModelNotFoundError: there is none of that name.
        """

    def models(self) -> list[ModelStatus]:
        """All models, by name."""

    def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """The events that answer `request`; closing the generator cancels it.

        Raises:
            ZServeError: the request cannot be served; raised before or between events.
        """
