"""Signals that come while the server starts."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from server.config import ServeConfig
from server.frontend.app import Frontend
from server.settings import GrpcConfig
from tests.conftest import ROOT
from tests.integration.frontend import light_repository
from tests.integration.process import PATIENCE

# A library that is being imported may do so.
SWALLOWS = """
import os, signal
from server import cli

def read_config(arguments):
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    except BaseException:
        pass
    raise cli.ConfigError("it goes on")

cli.read_config = read_config
raise SystemExit(cli.main([]))
"""


def test_a_signal_counts_even_where_exceptions_are_swallowed() -> None:
    command = [sys.executable, "-c", SWALLOWS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert (done.returncode, done.stderr) == (os.EX_OK, "")


async def test_told_to_stop_once_it_listens_it_ends_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is raised there instead leaves gRPC's server behind, which complains, or crashes."""
    light_repository(tmp_path / "models")
    config = ServeConfig(tmp_path / "models", grpc=GrpcConfig("127.0.0.1", port=0), allow_metrics=False)
    frontend, began, before = Frontend(config, tmp_path), [], signal.signal(signal.SIGTERM, signal.SIG_IGN)
    listen = frontend._listen

    async def listen_and_be_told() -> object:
        server = await listen()
        os.kill(os.getpid(), signal.SIGTERM)
        began.append(await asyncio.wait_for(frontend.until_stopping(), 10.0))
        return server

    monkeypatch.setattr(frontend, "_listen", listen_and_be_told)
    try:
        assert await asyncio.wait_for(frontend.run(), PATIENCE) == os.EX_OK
        assert began
    finally:
        signal.signal(signal.SIGTERM, before)
