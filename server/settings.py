"""Settings of logs and traces, which clients may change while the server runs; and of metrics, telemetry, access and
the gRPC transport.
"""

import logging
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path

from server.errors import InvalidRequestError, UnsupportedError
from server.log_file import LogFile

REQUEST_LOGGER = "server.rpc.interceptors"  # logs every refused request, at INFO
# gRPC's error, with a traceback, where a call was over before it was answered: cancelled in that moment, for example.
TOO_LATE = "ExecuteBatchError raised in core"


class LogFormat(StrEnum):
    """Triton's names for log formats."""

    DEFAULT = "default"
    ISO8601 = "ISO8601"


@dataclass(frozen=True)
class LogSettings:
    """Triton's log settings."""

    log_file: str = ""  # "": standard error
    log_info: bool = True
    log_warning: bool = True
    log_error: bool = True
    log_verbose_level: int = 0  # from 1 on, every refused request is logged too
    log_format: LogFormat = LogFormat.DEFAULT

    def apply(self, who: str = "") -> None:
        """Applies the settings to this process; `who` tells apart processes that log to one place."""
        handler = LogFile(self.log_file) if self.log_file else logging.StreamHandler(sys.stderr)
        dates = "%Y-%m-%dT%H:%M:%S%z" if self.log_format is LogFormat.ISO8601 else None
        form = "%(asctime)s %(levelname)s " + (who and who.replace("%", "%%") + " ") + "%(name)s: %(message)s"
        handler.setFormatter(logging.Formatter(form, dates))
        handler.addFilter(_calmed)
        handler.addFilter(self._wanted)
        logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
        verbose = logging.INFO if self.log_verbose_level else logging.WARNING
        logging.getLogger(REQUEST_LOGGER).setLevel(verbose)

    def _wanted(self, record: logging.LogRecord) -> bool:
        if record.levelno >= logging.ERROR:
            return self.log_error
        return self.log_warning if record.levelno >= logging.WARNING else self.log_info


def _calmed(record: logging.LogRecord) -> bool:
    """Makes what happens with any client that cancels a line that nobody has to look at."""
    if str(record.msg).startswith(TOO_LATE):
        record.levelno, record.levelname, record.exc_info, record.exc_text = logging.INFO, "INFO", None, None
    return True


class TraceLevel(StrEnum):
    """Triton's trace levels, of which several may be on."""

    TIMESTAMPS = "TIMESTAMPS"
    TENSORS = "TENSORS"


class TraceMode(StrEnum):
    """Triton's ways to write traces: its own JSON, or OpenTelemetry."""

    TRITON = "triton"
    OPENTELEMETRY = "opentelemetry"


@dataclass(frozen=True)
class TraceSettings:
    """Triton's trace settings of one model, or of all."""

    trace_level: frozenset[TraceLevel] = frozenset()
    trace_rate: int = 1000  # one request in this many; 0: only those that bring a trace context
    trace_count: int = -1  # traces left to make; -1: no end
    log_frequency: int = 0  # traces per file; 0: one file that is written as they come
    trace_file: str = ""
    trace_mode: TraceMode = TraceMode.TRITON

    @property
    def active(self) -> bool:
        """Whether there is something to trace and somewhere to write it."""
        return bool(self.trace_level) and (self.trace_mode is TraceMode.OPENTELEMETRY or bool(self.trace_file))

    @property
    def tensors(self) -> bool:
        """Whether tensors are recorded; spans have no place for them."""
        return TraceLevel.TENSORS in self.trace_level and self.trace_mode is TraceMode.TRITON

    def changed(self, wanted: Mapping[str, list[str]], defaults: "TraceSettings") -> "TraceSettings":
        """A copy with `wanted` set; an empty list of values resets a setting to its default.

        Raises:
            InvalidRequestError: no such setting, or no such value.
            UnsupportedError: the setting cannot be changed while the server runs.
        """
        changes = {name: _read(name, values, defaults) for name, values in wanted.items()}
        return replace(self, **changes)  # type: ignore[arg-type]

    def shown(self) -> dict[str, list[str]]:
        """Every setting as text."""
        shown = {name: [str(value)] for name, value in vars(self).items()}
        return shown | {"trace_level": sorted(map(str, self.trace_level)) or [OFF]}


@dataclass(frozen=True)
class TelemetryConfig:
    """Where OpenTelemetry spans go; Triton's names and defaults."""

    url: str = "http://localhost:4318/v1/traces"
    resource: tuple[tuple[str, str], ...] = (("service.name", "zserve"),)
    max_queue_size: int = 2048  # spans
    schedule_delay: int = 5000  # ms between two exports
    max_export_batch_size: int = 512  # spans


OFF = "OFF"


def trace_levels(values: Iterable[str]) -> frozenset[TraceLevel]:
    """The levels of these names; OFF stands for none.

    Raises:
        ValueError: there is no such level.
    """
    wanted = frozenset(values) - {OFF}
    for unknown in wanted - set(TraceLevel):
        raise ValueError(f"{unknown!r} is not accepted; {OFF}, {' and '.join(TraceLevel)} are")
    return frozenset(map(TraceLevel, wanted))


def _read(name: str, values: list[str], defaults: TraceSettings) -> object:
    if name not in vars(defaults):
        raise InvalidRequestError(f"unknown trace setting {name[:64]!r}; {', '.join(vars(defaults))} are known")
    if name == "trace_file":
        raise UnsupportedError("trace file location can not be updated through network protocol")
    if name == "trace_mode":
        raise UnsupportedError("trace mode can not be updated through network protocol")
    if not values:
        return getattr(defaults, name)
    try:
        return trace_levels(values) if name == "trace_level" else whole_setting(name, values[0])
    except ValueError:
        accepted = (
            "OFF, TIMESTAMPS or TENSORS is" if name == "trace_level" else f"a whole number from {LOWEST[name]} on is"
        )
        raise InvalidRequestError.of(name, values[0][:64], accepted) from None


LOWEST = {"trace_rate": 0, "trace_count": -1, "log_frequency": 0}


def whole_setting(name: str, text: str) -> int:
    """The value of a trace setting that is a whole number.

    Raises:
        ValueError: it is not one, or too low.
    """
    if not re.fullmatch(r"[+-]?[0-9]+", text.strip()) or int(text) < LOWEST[name]:
        raise ValueError(f"{text!r} is not accepted; a whole number from {LOWEST[name]} on is")
    return int(text)


class Latencies(StrEnum):
    """Forms in which durations are reported."""

    COUNTER = "counter_latencies"
    HISTOGRAM = "histogram_latencies"
    SUMMARY = "summary_latencies"


@dataclass(frozen=True)
class MetricsConfig:
    """Triton's --metrics-config."""

    latencies: frozenset[Latencies] = frozenset({Latencies.COUNTER})
    quantiles: tuple[float, ...] = (0.5, 0.9, 0.95, 0.99, 0.999)


class Protocol(StrEnum):
    """Triton's groups of calls, which can be restricted one by one."""

    HEALTH = "health"
    METADATA = "metadata"
    INFERENCE = "inference"
    SHARED_MEMORY = "shared-memory"
    MODEL_CONFIG = "model-config"
    MODEL_REPOSITORY = "model-repository"
    STATISTICS = "statistics"
    TRACE = "trace"
    LOGGING = "logging"


RESTRICTED_HEADER = "triton-grpc-protocol-"
BEARER_HEADER = "authorization"


@dataclass(frozen=True)
class Restriction:
    """Calls of some groups need a header with a secret value."""

    protocols: frozenset[Protocol]
    header: str
    value: str = field(repr=False)

    @classmethod
    def restricted(cls, text: str) -> "Restriction":
        """From Triton's `<group>,<group>:<key>=<value>`."""
        groups, colon, pair = text.partition(":")
        key, equals, value = pair.partition("=")
        if not (colon and equals and key and value):
            raise ValueError("GROUP,...:KEY=VALUE is accepted")
        if not re.fullmatch(r"[a-z0-9_.-]+", key.lower()):
            raise ValueError("a KEY of letters, digits, '_', '-' and '.' is accepted, as in a header's name")
        return cls(_protocols(groups), RESTRICTED_HEADER + key.lower(), _sendable(value))

    @classmethod
    def bearer(cls, text: str) -> "Restriction":
        """From `<file with the token>`, for all groups but health, or from `<group>,<group>:<file>`."""
        groups, colon, path = text.rpartition(":")
        protocols = _protocols(groups) if colon else frozenset(Protocol) - {Protocol.HEALTH}
        return cls(protocols, BEARER_HEADER, f"Bearer {_sendable(Path(path).read_text('utf-8').strip())}")


def _sendable(secret: str) -> str:
    """What a client can send as the value of a header; an empty one would let everybody in."""
    if not secret or secret != secret.strip() or not all(" " <= c <= "~" for c in secret):
        raise ValueError("a secret of printable ASCII characters in one line is accepted, and an empty one is not")
    return secret


def _protocols(text: str) -> frozenset[Protocol]:
    try:
        return frozenset(Protocol(name.strip()) for name in text.split(","))
    except ValueError:
        raise ValueError(f"{text!r}: the groups are {', '.join(Protocol)}") from None


class Compression(StrEnum):
    """Response compression in Triton's levels; all but none are one algorithm in gRPC."""

    NONE = "none"
    LOW = "low"
    MEDIUM = "medium"
    HIGH = "high"


@dataclass(frozen=True)
class TlsConfig:
    """The server's certificate and key, and whose certificates clients must show, if any; PEM files."""

    server_cert: Path
    server_key: Path
    root_cert: Path | None = None  # set: clients need a certificate that it signed


@dataclass(frozen=True)
class GrpcConfig:
    """The transport, with Triton's names and defaults. Times in milliseconds."""

    address: str = "0.0.0.0"
    port: int = 8001
    reuse_port: bool = False
    keepalive_time: int = 7_200_000
    keepalive_timeout: int = 20_000
    keepalive_permit_without_calls: bool = False
    http2_max_pings_without_data: int = 2
    http2_min_recv_ping_interval_without_data: int = 300_000
    http2_max_ping_strikes: int = 2
    max_connection_age: int = 0  # 0: no limit
    max_connection_age_grace: int = 0
    compression: Compression = Compression.NONE
    tls: TlsConfig | None = None
    restrictions: tuple[Restriction, ...] = ()
    max_calls_per_client: int = 0  # inference calls open at a time; 0: no limit
