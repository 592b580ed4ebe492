"""The flags of metrics, logs and traces, and what they mean together."""

import argparse
import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from server.errors import ConfigError
from server.flags import boolean, count, one_of, port, positive, reader, switch
from server.settings import (
    OFF,
    Latencies,
    LogFormat,
    LogSettings,
    MetricsConfig,
    TelemetryConfig,
    TraceMode,
    TraceSettings,
    trace_levels,
    whole_setting,
)

# Settings by their names in --trace-config, prefixed with their mode if they have one, and how their text is read.
TRACE: dict[str, tuple[str, Callable[[str], Any]]] = {
    "level": ("trace_level", lambda text: next(iter(trace_levels([text.upper()])), OFF)),
    "rate": ("trace_rate", partial(whole_setting, "trace_rate")),
    "count": ("trace_count", partial(whole_setting, "trace_count")),
    "mode": ("trace_mode", one_of(TraceMode)),
    "triton,file": ("trace_file", str),
    "triton,log-frequency": ("log_frequency", partial(whole_setting, "log_frequency")),
}
TELEMETRY: dict[str, tuple[str, Callable[[str], Any]]] = {
    "opentelemetry,url": ("url", str),
    "opentelemetry,resource": ("resource", lambda text: text.partition("=")[::2]),
    "opentelemetry,bsp_max_queue_size": ("max_queue_size", positive),
    "opentelemetry,bsp_schedule_delay": ("schedule_delay", positive),
    "opentelemetry,bsp_max_export_batch_size": ("max_export_batch_size", positive),
}
TRACE_NAMES = {"file": "triton,file", "log-frequency": "triton,log-frequency"}  # also accepted without their mode


def add_flags(g: "argparse._ArgumentGroup") -> None:
    """Adds the flags to the command line; `ServeConfig` has the defaults of those that are named like its fields."""
    switch(g, "allow-metrics", "serve Prometheus metrics")
    g.add_argument("--metrics-address", help="address to listen on")
    g.add_argument("--metrics-port", type=port, help="port to listen on; 0: any free one")
    switch(g, "allow-gpu-metrics", "with metrics: those of the GPUs too")
    switch(g, "allow-cpu-metrics", "with metrics: those of the CPU and its memory too")
    g.add_argument(
        "--metrics-interval-ms",
        type=positive,
        metavar="MS",
        help="how often the metrics of GPUs and CPU are read",
    )
    g.add_argument(
        "--metrics-config",
        action="append",
        default=[],
        type=reader(_metrics_setting),
        metavar="NAME=VALUE",
        help="counter_latencies, histogram_latencies or summary_latencies=BOOL, summary_quantiles=0.5:0.05,...",
    )
    for kind in ("info", "warning", "error"):
        switch(g, f"log-{kind}", f"log {kind}s", default=getattr(LogSettings, f"log_{kind}"))
    g.add_argument(
        "--log-verbose",
        type=count,
        nargs="?",
        const=1,
        default=LogSettings.log_verbose_level,
        metavar="LEVEL",
        help="from 1 on, also log every refused request",
    )
    g.add_argument(
        "--log-format", type=LogFormat, choices=list(LogFormat), default=LogSettings.log_format, help="form of the time"
    )
    g.add_argument("--log-file", default=LogSettings.log_file, help="file to log to, instead of standard error")
    g.add_argument(
        "--trace-config",
        action="append",
        default=[],
        type=reader(_trace_setting),
        metavar="[MODE,]NAME=VALUE",
        help="level=TIMESTAMPS, level=TENSORS, rate=1000, count=-1, mode=triton, triton,file=PATH, "
        "triton,log-frequency=0; mode=opentelemetry, opentelemetry,url=URL, opentelemetry,resource=KEY=VALUE, "
        "opentelemetry,bsp_max_queue_size=2048, opentelemetry,bsp_schedule_delay=5000, "
        "opentelemetry,bsp_max_export_batch_size=512",
    )


def read_metrics(pairs: Iterable[tuple[str, Any]]) -> MetricsConfig:
    """What all --metrics-config flags together ask for."""
    settings = dict(pairs)
    defaults = MetricsConfig()
    wanted = {kind: settings.get(kind, kind in defaults.latencies) for kind in Latencies}
    latencies = frozenset(kind for kind, on in wanted.items() if on)
    return MetricsConfig(latencies, settings.get("summary_quantiles", defaults.quantiles))


def read_trace(pairs: Iterable[tuple[str, Any]]) -> TraceSettings:
    """What all --trace-config flags together say about traces; levels add up."""
    settings = [(TRACE[name][0], value) for name, value in pairs if name in TRACE]
    levels = frozenset(value for field, value in settings if field == "trace_level") - {OFF}
    return TraceSettings(**dict(settings) | {"trace_level": levels})


def read_telemetry(pairs: Iterable[tuple[str, Any]]) -> TelemetryConfig:
    """What they say about OpenTelemetry; resources add up."""
    settings = [(TELEMETRY[name][0], value) for name, value in pairs if name in TELEMETRY]
    resource = tuple(value for field, value in settings if field == "resource")
    config = TelemetryConfig(**dict(settings) | {"resource": (*TelemetryConfig.resource, *resource)})
    if config.max_export_batch_size > config.max_queue_size:
        raise ConfigError(
            f"--trace-config: bsp_max_export_batch_size is {config.max_export_batch_size}, and may be at most "
            f"bsp_max_queue_size, {config.max_queue_size}"
        )
    return config


def _metrics_setting(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    if name == "summary_quantiles":  # in Triton each has an error bound; ours are exact over the latest requests
        return name, tuple(_quantile(part.partition(":")[0]) for part in value.split(","))
    return one_of((*Latencies, "summary_quantiles"))(name), boolean(value)


def _quantile(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise ValueError(f"{text!r} is no quantile; a number from 0 to 1 is accepted")
    return value


def _trace_setting(text: str) -> tuple[str, Any]:
    """A setting and its value from Triton's `level=TIMESTAMPS` or `triton,file=PATH`."""
    name, equals, value = text.partition("=")
    name = TRACE_NAMES.get(name, name)
    known = TRACE | TELEMETRY
    if not equals or name not in known:
        raise ValueError(f"{', '.join(known)} are known, as NAME=VALUE")
    return name, known[name][1](value)
