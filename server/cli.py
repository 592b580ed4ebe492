"""`zserve serve`: serve a model repository over gRPC. Flags with Triton's meaning have its names and defaults."""

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path

from server import observation
from server.config import ControlMode, FallbackPolicy, ServeConfig
from server.errors import ConfigError, ZServeError
from server.flags import byte_size, count, device, port, positive_seconds, reader, seconds, switch
from server.settings import Compression, GrpcConfig, LogSettings, Restriction, TlsConfig
from server.signals import stopping_signals

STATUSES = """exit status: 0 told to stop, by SIGTERM, SIGHUP or Ctrl-C; 1 it could not start: options that do not fit
together, a port that is taken, models that cannot be loaded; 2 bad arguments"""
# Fields of ServeConfig with a flag of the same name, and their defaults; the others are made of several flags.
OTHERS = {"load_model", "fallback"}
DEFAULTS = {f.name: f.default for f in fields(ServeConfig) if f.default is not MISSING and f.name not in OTHERS}
# Fields of GrpcConfig that are plain numbers or switches, and their help; the flag is --grpc- and the name.
TRANSPORT = {
    "keepalive_time": "ms between pings on a quiet connection",
    "keepalive_timeout": "ms to wait for the answer to a ping",
    "keepalive_permit_without_calls": "also ping while no call is open",
    "http2_max_pings_without_data": "pings without data between them; 0: any number",
    "http2_min_recv_ping_interval_without_data": "ms that a client must leave between pings without data",
    "http2_max_ping_strikes": "bad pings before the connection is closed; 0: any number",
    "max_connection_age": "ms after which a connection is closed, 0: never",
    "max_connection_age_grace": "ms that calls then get to finish",
    "max_calls_per_client": "inference calls that one address may have open at a time, 0: any number",
}


def parser() -> argparse.ArgumentParser:
    """The command line; its defaults are those of the config classes."""
    p = argparse.ArgumentParser(
        prog="zserve serve",
        description=__doc__,
        epilog=STATUSES,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _add_models(p.add_argument_group("models"))
    _add_workers(p.add_argument_group("workers"))
    _add_grpc(p.add_argument_group("gRPC"))
    _add_access(p.add_argument_group("access"))
    observation.add_flags(p.add_argument_group("metrics, logs and traces"))
    p.set_defaults(**DEFAULTS)
    return p


def _add_models(g: "argparse._ArgumentGroup") -> None:
    g.add_argument("--model-repository", "--model-store", type=Path, default=Path("models"), help="folder of models")
    g.add_argument(
        "--model-control-mode",
        type=ControlMode,
        choices=list(ControlMode),
        help="when models are loaded",
    )
    g.add_argument(
        "--load-model",
        action="append",
        default=[],
        metavar="NAME",
        help="with explicit control: load it at the start; * for all",
    )
    g.add_argument("--repository-poll-secs", type=positive_seconds, help="with poll control: seconds between looks")
    switch(g, "strict-readiness", "ready only while every model is")
    switch(g, "exit-on-error", "end when any model cannot be loaded at the start, as Triton does by default")
    g.add_argument(
        "--exit-timeout-secs",
        type=seconds,
        help="how long requests may take to finish when the server is told to stop",
    )
    g.add_argument(
        "--response-cache-byte-size",
        type=byte_size,
        help="for models with response_cache { enable: true }",
    )
    g.add_argument("--id", help="the server's name in its metadata")


def _add_workers(g: "argparse._ArgumentGroup") -> None:
    g.add_argument(
        "--require-engine",
        action="store_true",
        help="no eager PyTorch in the place of an engine that cannot be loaded; implies --exit-on-error",
    )
    g.add_argument("--device", type=device, help="cpu, cuda, cuda:1 ...; auto: cuda where there is one")
    g.add_argument(
        "--max-retries",
        type=count,
        help="how often a request is started over when its worker process is lost",
    )
    g.add_argument(
        "--worker-timeout-secs",
        type=positive_seconds,
        help="how long a worker, or its device, may not answer before it is replaced",
    )
    g.add_argument(
        "--worker-start-timeout-secs",
        type=positive_seconds,
        help="how long a worker may take to load and warm up before it is given up",
    )


def _add_grpc(g: "argparse._ArgumentGroup") -> None:
    g.add_argument("--grpc-address", default=GrpcConfig.address, help="address to listen on")
    g.add_argument("--grpc-port", type=port, default=GrpcConfig.port, help="port to listen on; 0: any free one")
    switch(g, "reuse-grpc-port", "share the port with other servers", default=GrpcConfig.reuse_port)
    g.add_argument(
        "--grpc-infer-response-compression-level",
        type=Compression,
        choices=list(Compression),
        default=GrpcConfig.compression,
        help="gzip for responses, at any level but none",
    )
    for name, text in TRANSPORT.items():
        default = getattr(GrpcConfig, name)
        if isinstance(default, bool):
            switch(g, f"grpc-{name.replace('_', '-')}", text, default=default)
        else:
            g.add_argument(f"--grpc-{name.replace('_', '-')}", type=count, default=default, help=text)


def _add_access(g: "argparse._ArgumentGroup") -> None:
    switch(g, "grpc-use-ssl", "TLS")
    switch(g, "grpc-use-ssl-mutual", "TLS, and clients need a certificate that --grpc-root-cert signed")
    for name in ("server-cert", "server-key", "root-cert"):
        g.add_argument(f"--grpc-{name}", type=Path, help="PEM file")
    g.add_argument(
        "--grpc-restricted-protocol",
        action="append",
        default=[],
        type=reader(Restriction.restricted),
        metavar="GROUP,...:KEY=VALUE",
        help="calls of these groups need the header triton-grpc-protocol-KEY with VALUE",
    )
    g.add_argument(
        "--grpc-bearer-token",
        action="append",
        default=[],
        type=reader(Restriction.bearer),
        metavar="[GROUP,...:]FILE",
        help="calls of these groups (all but health) need the token in FILE as 'authorization: Bearer'",
    )
    switch(g, "allow-client-shm", "let clients register shared memory, of a GPU too")


def main(argv: Sequence[str]) -> int:
    """Serves; returns the exit status."""
    for number in stopping_signals():  # until the server installs its own handlers, which let requests finish
        # Not by an exception: a library that is being imported may swallow it.
        signal.signal(number, lambda *_: os._exit(os.EX_OK))
    arguments = parser().parse_args(argv)
    try:
        config = read_config(arguments)
        config.log.apply()
        from server.frontend.app import serve

        return asyncio.run(serve(config))
    except (ZServeError, OSError) as error:
        print(f"zserve serve: {error}", file=sys.stderr)
        return 1


def read_config(arguments: argparse.Namespace) -> ServeConfig:
    """The options as the server takes them.

    Raises:
        ConfigError: they do not fit together.
    """
    a = arguments
    if a.load_model and a.model_control_mode is not ControlMode.EXPLICIT:
        raise ConfigError("--load-model needs --model-control-mode explicit")
    same = {name: getattr(a, name) for name in ("model_repository", *DEFAULTS)}
    return ServeConfig(
        **same
        | {
            "load_model": tuple(a.load_model),
            "fallback": FallbackPolicy.REFUSE if a.require_engine else FallbackPolicy.EAGER,
            "grpc": _grpc(a),
            "log": LogSettings(a.log_file, a.log_info, a.log_warning, a.log_error, a.log_verbose, a.log_format),
            "metrics": observation.read_metrics(a.metrics_config),
            "trace": observation.read_trace(a.trace_config),
            "telemetry": observation.read_telemetry(a.trace_config),
        }
    )


def _grpc(a: argparse.Namespace) -> GrpcConfig:
    return GrpcConfig(
        address=a.grpc_address,
        port=a.grpc_port,
        reuse_port=a.reuse_grpc_port,
        compression=a.grpc_infer_response_compression_level,
        tls=_tls(a),
        restrictions=(*a.grpc_restricted_protocol, *a.grpc_bearer_token),
        **{name: getattr(a, f"grpc_{name}") for name in TRANSPORT},
    )


def _tls(a: argparse.Namespace) -> TlsConfig | None:
    files = (a.grpc_server_cert, a.grpc_server_key, a.grpc_root_cert)
    if not (a.grpc_use_ssl or a.grpc_use_ssl_mutual):
        if any(files):
            raise ConfigError("certificates and keys are for TLS, which --grpc-use-ssl switches on")
        return None
    if not (a.grpc_server_cert and a.grpc_server_key):
        raise ConfigError("TLS needs --grpc-server-cert and --grpc-server-key")
    if a.grpc_use_ssl_mutual and not a.grpc_root_cert:
        raise ConfigError("--grpc-use-ssl-mutual needs --grpc-root-cert")
    return TlsConfig(a.grpc_server_cert, a.grpc_server_key, a.grpc_root_cert if a.grpc_use_ssl_mutual else None)
