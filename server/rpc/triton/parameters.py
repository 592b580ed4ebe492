"""The parameters of a Triton request: those that the server itself handles, and the model's."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from server.errors import InvalidRequestError
from server.tensors import Parameter

RESERVED = "triton_"
EMPTY_FINAL = "triton_enable_empty_final_response"
NUMBER = ("int64_param", "uint64_param")
# What the server itself handles, and the types it may have.
KNOWN = {
    "sequence_id": ("int64_param", "string_param"),
    "sequence_start": ("bool_param",),
    "sequence_end": ("bool_param",),
    "priority": NUMBER,
    "timeout": ("int64_param",),
    EMPTY_FINAL: ("bool_param",),
}
CUSTOM = ("int64_param", "bool_param", "string_param", "double_param")


@dataclass(frozen=True)
class RequestParameters:
    """The parameters of one request."""

    priority: int = 0
    queue_timeout: float | None = None  # seconds
    empty_final: bool = False  # end with an empty response if none was marked final
    custom: Mapping[str, Parameter] = field(default_factory=dict)


def decode_parameters(wire: Mapping[str, Any]) -> RequestParameters:
    """The request's parameters.

    Raises:
        InvalidRequestError: one is of a wrong type, or takes a reserved name.
    """
    if not wire:
        return _NONE
    known = {key: _known(key, value) for key, value in wire.items() if key in KNOWN}
    if known.get("priority", 0) < 0:
        raise InvalidRequestError("invalid value for 'priority', expected value >= 0.")
    microseconds = known.get("timeout", 0)
    return RequestParameters(
        priority=known.get("priority", 0),
        queue_timeout=microseconds / 1e6 if microseconds > 0 else None,
        empty_final=known.get(EMPTY_FINAL, False),
        custom={key: _custom(key, value) for key, value in wire.items() if key not in KNOWN},
    )


def encode_parameters(parameters: Mapping[str, Parameter], target: Any) -> None:
    """Writes `parameters` into a message's map."""
    for key, value in parameters.items():
        match value:
            case bool():
                target[key].bool_param = value
            case int():
                target[key].int64_param = value
            case float():
                target[key].double_param = value
            case str():
                target[key].string_param = value


_NONE = RequestParameters()


def _known(key: str, value: Any) -> Any:
    kind = value.WhichOneof("parameter_choice")
    if kind not in KNOWN[key]:
        expected = " or ".join(KNOWN[key])
        raise InvalidRequestError(f"invalid value type for '{key}' parameter, expected {expected}.")
    return getattr(value, kind)


def _custom(key: str, value: Any) -> Parameter:
    if key.startswith(RESERVED):
        raise InvalidRequestError(
            f"parameter keys starting with '{RESERVED}' are reserved for Triton usage. Only the following keys "
            f"starting with '{RESERVED}' are allowed: {EMPTY_FINAL}"
        )
    kind = value.WhichOneof("parameter_choice")
    if kind not in CUSTOM:
        raise InvalidRequestError(
            f"invalid value type for '{key[:64]}' parameter, expected int64_param, bool_param, or string_param."
        )
    found: Parameter = getattr(value, kind)
    return found
