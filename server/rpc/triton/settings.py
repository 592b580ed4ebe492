"""Trace settings, log settings and load parameters, to and from the wire."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tritonclient.grpc import service_pb2 as pb

from server.errors import InvalidRequestError, UnsupportedError
from server.frontend.versions import Override
from server.rpc.triton.model_config import config_text
from server.settings import LogFormat, LogSettings, TraceSettings

FILE = "file:"
KINDS = {"log_verbose_level": "uint32_param", "log_format": "string_param", "log_file": "string_param"}


def encode_trace(found: TraceSettings) -> pb.TraceSettingResponse:
    """All settings as lists of text."""
    response = pb.TraceSettingResponse()
    for name, values in found.shown().items():
        response.settings[name].value.extend(values)
    return response


def decode_log(wire: Mapping[str, Any], now: LogSettings) -> LogSettings:
    """`now` with the changes of a request.

    Raises:
        InvalidRequestError: no such setting, or no such value.
        UnsupportedError: the log file is to be changed.
    """
    if "log_file" in wire:
        raise UnsupportedError("log file location can not be updated through network protocol")
    changes = {name: _log_value(name, value) for name, value in wire.items()}
    return replace(now, **changes)


def encode_log(found: LogSettings) -> pb.LogSettingsResponse:
    """All settings."""
    response = pb.LogSettingsResponse()
    for name, value in vars(found).items():
        setattr(response.settings[name], KINDS.get(name, "bool_param"), value)
    return response


def decode_override(wire: Mapping[str, Any]) -> Override | None:
    """What a load request brings instead of the repository's files, if anything.

    Raises:
        InvalidRequestError: an unknown parameter, no model config, or files without one.
    """
    files = {name.removeprefix(FILE): p.bytes_param for name, p in wire.items() if name.startswith(FILE)}
    for name in wire:
        if name != "config" and not name.startswith(FILE):
            raise InvalidRequestError(f"unrecognized load parameter '{name}'.")
    if "config" not in wire:
        if files:
            raise InvalidRequestError("override files need the parameter 'config' beside them")
        return None
    config = wire["config"].string_param
    if not config.lstrip().startswith("{"):  # protobuf's parser would take an empty list for an empty message
        raise InvalidRequestError.of("config", config[:32], "the JSON form of a ModelConfig, an object, is")
    return Override(config_text(config), files)


def _log_value(name: str, value: Any) -> Any:
    if name not in vars(LogSettings()):
        raise InvalidRequestError(f"unknown log setting {name[:64]!r}; {', '.join(vars(LogSettings()))} are known")
    kind = KINDS.get(name, "bool_param")
    if value.WhichOneof("parameter_choice") != kind:
        raise InvalidRequestError(f"log setting {name!r} expects {kind}")
    found = getattr(value, kind)
    if name != "log_format":
        return found
    if found not in set(LogFormat):
        raise InvalidRequestError.of(name, found, f"{' or '.join(LogFormat)} is")
    return LogFormat(found)
