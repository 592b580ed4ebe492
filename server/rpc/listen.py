"""A gRPC server on its port: transport options, certificates, compression."""

import ssl
from collections.abc import Sequence

import grpc
import grpc.aio

from server.errors import ConfigError
from server.rpc.images import CHANNEL_OPTIONS
from server.settings import Compression, GrpcConfig, TlsConfig

MOST_PENDING = 2**31 - 1  # calls; the largest number that gRPC takes


def make_server(config: GrpcConfig, interceptors: Sequence[grpc.aio.ServerInterceptor]) -> grpc.aio.Server:
    """A server that is not listening yet."""
    compressed = config.compression is not Compression.NONE
    return grpc.aio.server(
        interceptors=interceptors,
        options=[*CHANNEL_OPTIONS, *transport_options(config)],
        compression=grpc.Compression.Gzip if compressed else None,
    )


def transport_options(config: GrpcConfig) -> list[tuple[str, int]]:
    """The options under gRPC's names."""
    options = [
        # Off by default: otherwise a second server would share the port and get half of the requests.
        ("grpc.so_reuseport", int(config.reuse_port)),
        ("grpc.keepalive_time_ms", config.keepalive_time),
        ("grpc.keepalive_timeout_ms", config.keepalive_timeout),
        ("grpc.keepalive_permit_without_calls", int(config.keepalive_permit_without_calls)),
        ("grpc.http2.max_pings_without_data", config.http2_max_pings_without_data),
        ("grpc.http2.min_ping_interval_without_data_ms", config.http2_min_recv_ping_interval_without_data),
        ("grpc.http2.max_ping_strikes", config.http2_max_ping_strikes),
        # By default gRPC keeps 1,000 calls that Python has not accepted yet, and answers more and more of the others
        # with CANCELLED. Which requests are refused, and with what advice, is for the models' queues to decide.
        ("grpc.server.max_pending_requests", MOST_PENDING),
        ("grpc.server.max_pending_requests_hard_limit", MOST_PENDING),
    ]
    if config.max_connection_age:
        options.append(("grpc.max_connection_age_ms", config.max_connection_age))
    if config.max_connection_age_grace:
        options.append(("grpc.max_connection_age_grace_ms", config.max_connection_age_grace))
    return options


def bind(server: grpc.aio.Server, config: GrpcConfig) -> int:
    """Binds the port, and returns its number.

    Raises:
        ConfigError: it is not free, or a certificate cannot be read.
    """
    host = f"[{config.address}]" if ":" in config.address else config.address  # an IPv6 address
    address = f"{host}:{config.port}"
    try:
        if config.tls is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, _credentials(config.tls))
    except RuntimeError as error:
        raise ConfigError(
            f"cannot listen on {address}: {error}; choose another --grpc-port or --grpc-address"
        ) from error


def _credentials(tls: TlsConfig) -> grpc.ServerCredentials:
    try:
        check = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)  # gRPC itself would only say that it cannot listen
        check.set_ciphers("DEFAULT:@SECLEVEL=0")  # their required strength is not for this check to decide
        check.load_cert_chain(tls.server_cert, tls.server_key, password="")
        if tls.root_cert is not None:
            check.load_verify_locations(tls.root_cert)
        pair = (tls.server_key.read_bytes(), tls.server_cert.read_bytes())
        roots = tls.root_cert.read_bytes() if tls.root_cert is not None else None
    except OSError as error:
        raise ConfigError(f"cannot use {tls.server_cert} with {tls.server_key}: {error}") from error
    return grpc.ssl_server_credentials([pair], roots, require_client_auth=roots is not None)
