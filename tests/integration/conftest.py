"""One server for all tests that leave it as it was."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from client import ZImageClient
from tests.integration.process import ServerProcess


@pytest.fixture(scope="session")
def server(repository: Path) -> Iterator[ServerProcess]:
    with ServerProcess(repository, "--require-engine") as running:
        yield running


@pytest.fixture
def client(server: ServerProcess) -> Iterator[ZImageClient]:
    with server.client() as connected:
        yield connected
