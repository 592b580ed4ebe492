"""TLS, restricted groups of calls, bearer tokens and the limit of calls per client, on servers of their own."""

import asyncio
import contextlib
import queue
import socket
import socketserver
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from client import AsyncZImageClient, GenerationFailedError, ZImageClient, cli
from tests.integration.process import PATIENCE, ServerProcess, wait_for
from tests.integration.triton.conftest import ENDLESS, some_bytes, under_way
from tests.integration.triton.test_errors import status_of

Start = Callable[..., ServerProcess]


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root, and a certificate that it signed for the server and the client alike."""
    folder = tmp_path_factory.mktemp("certificates")
    root = "req -x509 -newkey rsa:2048 -nodes -days 2 -keyout root.key -out root.pem -subj /CN=root"
    request = "req -newkey rsa:2048 -nodes -keyout key.pem -out request.pem -subj /CN=localhost"
    (folder / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1")
    sign = "x509 -req -in request.pem -CA root.pem -CAkey root.key -CAcreateserial -out cert.pem -days 2 -extfile names"
    for command in (root, request, sign):
        subprocess.run(["openssl", *command.split()], cwd=folder, check=True, capture_output=True)
    return folder


def tls(folder: Path, *more: str) -> list[str]:
    return [
        "--grpc-use-ssl",
        "--grpc-server-cert",
        f"{folder}/cert.pem",
        "--grpc-server-key",
        f"{folder}/key.pem",
        *more,
    ]


def test_tls(identity_server: Start, certificates: Path) -> None:
    server = identity_server(*tls(certificates))
    root = str(certificates / "root.pem")
    with triton.InferenceServerClient(server.url, ssl=True, root_certificates=root) as client:
        assert client.infer("identity", [some_bytes()]).as_numpy("OUTPUT0").size == 5
    with triton.InferenceServerClient(server.url) as plain:
        assert status_of(lambda: plain.is_server_live(client_timeout=5))[0] in ("UNAVAILABLE", "DEADLINE_EXCEEDED")


def test_mutual_tls(identity_server: Start, certificates: Path) -> None:
    root = str(certificates / "root.pem")
    server = identity_server(*tls(certificates, "--grpc-use-ssl-mutual", "--grpc-root-cert", root))
    mine = {"private_key": str(certificates / "key.pem"), "certificate_chain": str(certificates / "cert.pem")}
    with triton.InferenceServerClient(server.url, ssl=True, root_certificates=root, **mine) as client:
        assert client.is_server_live()
    with triton.InferenceServerClient(server.url, ssl=True, root_certificates=root) as nobody:
        assert status_of(lambda: nobody.is_server_live(client_timeout=5))[0] in ("UNAVAILABLE", "DEADLINE_EXCEEDED")


def test_restricted_groups(identity_server: Start) -> None:
    server = identity_server("--grpc-restricted-protocol", "inference,model-config:key=secret")
    with triton.InferenceServerClient(server.url) as client:
        assert client.is_server_ready()
        expected = ("UNAVAILABLE", "This protocol is restricted, expecting header 'triton-grpc-protocol-key'")
        assert status_of(lambda: client.infer("identity", [some_bytes()])) == expected
        wrong = {"triton-grpc-protocol-key": "other"}
        assert status_of(lambda: client.get_model_config("identity", headers=wrong)) == expected
        right = {"triton-grpc-protocol-key": "secret"}
        assert client.infer("identity", [some_bytes()], headers=right).as_numpy("OUTPUT0").size == 5
        assert client.get_model_config("identity", headers=right).config.name == "identity"


def test_a_restricted_stream_and_the_image_service_beside_it(identity_server: Start) -> None:
    server = identity_server("--grpc-restricted-protocol", "inference:key=secret")
    errors: queue.Queue[InferenceServerException] = queue.Queue()
    with triton.InferenceServerClient(server.url) as client:
        client.start_stream(lambda result, error: errors.put(error))
        assert "restricted" in errors.get(timeout=PATIENCE).message()  # before anything is sent
    with ZImageClient(server.url, timeout=PATIENCE) as images, pytest.raises(GenerationFailedError, match="restricted"):
        images.draw("a red circle")


def test_a_bearer_token(identity_server: Start, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("abc\n")
    server = identity_server("--grpc-bearer-token", str(tmp_path / "token"), "--log-verbose=1")
    with triton.InferenceServerClient(server.url) as client:
        assert client.is_server_ready()  # probes have no token
        assert status_of(lambda: client.infer("identity", [some_bytes()]))[0] == "UNAUTHENTICATED"
        wait_for(lambda: "UNAUTHENTICATED: this call needs the header" in server.log)
        token = {"authorization": "Bearer abc"}
        assert client.infer("identity", [some_bytes()], headers=token).as_numpy("OUTPUT0").size == 5


def test_the_client_of_the_project_on_a_secured_server(
    identity_server: Start, certificates: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It gets as far as the model's answer, which is that it draws nothing."""
    (tmp_path / "token").write_text("abc\n")
    root, cert, key = (str(certificates / name) for name in ("root.pem", "cert.pem", "key.pem"))
    mutual = ("--grpc-use-ssl-mutual", "--grpc-root-cert", root, "--grpc-bearer-token", str(tmp_path / "token"))
    server = identity_server(*tls(certificates, *mutual))
    credentials = grpc.ssl_channel_credentials(*(Path(file).read_bytes() for file in (root, key, cert)))
    secured = {"timeout": PATIENCE, "credentials": credentials}
    with ZImageClient(server.url, metadata=[("authorization", "Bearer abc")], **secured) as client:
        assert client.models() == []
    with ZImageClient(server.url, **secured) as nobody, pytest.raises(GenerationFailedError, match="UNAUTHENTICATED"):
        nobody.models()

    async def models() -> int:
        async with AsyncZImageClient(server.url, metadata=[("authorization", "Bearer abc")], **secured) as client:
            return len(await client.models())

    assert asyncio.run(models()) == 0
    certified = ["--url", server.url, "--root-cert", root, "--cert", cert, "--key", key, "-o", str(tmp_path / "out")]
    assert cli.main(["x", "--model", "identity", *certified, "--token-file", str(tmp_path / "token")]) == 1
    assert "NOT_FOUND" in capsys.readouterr().err
    assert cli.main(["x", "--model", "identity", *certified, "--header", "authorization:Bearer abd"]) == 1
    assert "UNAUTHENTICATED" in capsys.readouterr().err


def test_a_client_has_so_many_calls_at_a_time(identity_server: Start) -> None:
    server = identity_server("--grpc-max-calls-per-client", "2")
    with triton.InferenceServerClient(server.url) as client:
        stub = client._client_stub
        slow = triton._utils._get_inference_request(
            model_name="identity",
            inputs=[some_bytes()],
            model_version="",
            request_id="",
            outputs=None,
            sequence_id=0,
            sequence_start=False,
            sequence_end=False,
            priority=0,
            timeout=None,
            parameters=ENDLESS,
        )
        calls = [stub.ModelInfer.future(slow) for _ in range(3)]
        wait_for(lambda: any(call.done() for call in calls))
        assert sorted(call.done() for call in calls) == [False, False, True]
        assert [call.code().name for call in calls if call.done()] == ["UNAVAILABLE"]
        for call in calls:
            call.cancel()
        wait_for(lambda: under_way(server, "identity") == 0)
        assert client.infer("identity", [some_bytes()]).as_numpy("OUTPUT0").size == 5


def test_a_stream_past_a_clients_share_is_told_so(identity_server: Start) -> None:
    server = identity_server("--grpc-max-calls-per-client", "1")
    ends: queue.Queue[InferenceServerException | None] = queue.Queue()
    with triton.InferenceServerClient(server.url) as client, triton.InferenceServerClient(server.url) as other:
        client.start_stream(lambda result, error: ends.put(error))
        client.async_stream_infer("identity", [some_bytes()])
        assert ends.get(timeout=PATIENCE) is None
        other.start_stream(lambda result, error: ends.put(error))
        error = ends.get(timeout=PATIENCE)
        assert error is not None
        assert error.status() == "StatusCode.UNAVAILABLE"
        assert error.message() == "1 inference calls of this client are open; wait for one to end"
        client.stop_stream()
        wait_for(lambda: idle(other))


def idle(client: triton.InferenceServerClient) -> bool:
    """Whether the client's share is free again."""
    try:
        client.infer("identity", [some_bytes()])
    except InferenceServerException:
        return False
    return True


class CountingRelay(socketserver.ThreadingTCPServer):
    """Passes bytes on to a server and counts those that come back."""

    daemon_threads = True  # those that still wait for a connection to end are not waited for

    def __init__(self, url: str) -> None:
        host, _, port = url.rpartition(":")
        self.target, self.received = (host, int(port)), 0
        super().__init__(("127.0.0.1", 0), RelayHandler)


class RelayHandler(socketserver.BaseRequestHandler):
    server: CountingRelay

    def handle(self) -> None:
        with socket.create_connection(self.server.target) as target:
            threading.Thread(target=self.copy, args=(self.request, target), daemon=True).start()
            self.copy(target, self.request, count=True)

    def copy(self, source: socket.socket, target: socket.socket, count: bool = False) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                self.server.received += len(data) if count else 0
                target.sendall(data)


@pytest.mark.parametrize(("level", "fewer"), [("none", False), ("high", True)])
def test_compressed_responses(identity_server: Start, level: str, fewer: bool) -> None:
    server = identity_server("--grpc-infer-response-compression-level", level)
    with CountingRelay(server.url) as relay:
        threading.Thread(target=relay.serve_forever, daemon=True).start()
        with triton.InferenceServerClient(f"127.0.0.1:{relay.server_address[1]}") as client:
            assert client.infer("identity", [some_bytes(100_000)]).as_numpy("OUTPUT0").size == 100_000
        relay.shutdown()
    assert (relay.received < 50_000) is fewer
