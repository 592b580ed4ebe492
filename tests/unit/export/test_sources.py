"""Checkpoints from hubs, through the libraries' own offline modes, over local copies of their caches' layouts."""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from export.checkpoint import open_checkpoint
from export.errors import CheckpointError, DamagedFileError, SourceError
from export.hubs import Hub
from export.sources import Network, Source
from tests.conftest import CHECKPOINT, ROOT

NAME = "Tongyi-MAI/Z-Image-Turbo"
COMMIT = "f332072aa78be7aecdf3ee76d5c247082da564a6"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def huggingface_cache(cache: Path) -> Path:
    """refs/main -> a commit -> a snapshot whose files are links to blobs, as huggingface_hub keeps them."""
    root = cache / f"models--{NAME.replace('/', '--')}"
    snapshot = root / "snapshots" / COMMIT
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    (root / "blobs").mkdir()
    for number, file in enumerate(sorted(p for p in CHECKPOINT.rglob("*") if p.is_file())):
        blob, link = root / "blobs" / f"{number:040x}", snapshot / file.relative_to(CHECKPOINT)
        shutil.copy(file, blob)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    return snapshot


def modelscope_cache(cache: Path) -> Path:
    """snapshots/<revision> with plain files, as modelscope >= 1.38 keeps them."""
    snapshot = cache / "models" / NAME.replace("/", "--") / "snapshots" / "master"
    shutil.copytree(CHECKPOINT, snapshot)
    return snapshot


def older_modelscope_cache(cache: Path) -> Path:
    """models/<owner>/<name>, as modelscope <= 1.37 kept them."""
    snapshot = cache / "models" / NAME
    shutil.copytree(CHECKPOINT, snapshot)
    return snapshot


CACHES = [
    (Hub.HUGGINGFACE, huggingface_cache),
    (Hub.MODELSCOPE, modelscope_cache),
    (Hub.MODELSCOPE, older_modelscope_cache),
]


def offline(hub: Hub, cache: Path, revision: str | None = None) -> Source:
    return Source(hub, NAME, revision, cache, Network.OFFLINE)


@pytest.mark.parametrize(("hub", "make"), CACHES)
def test_a_cached_checkpoint_opens_offline(hub: Hub, make: Callable[[Path], Path], tmp_path: Path) -> None:
    snapshot = make(tmp_path)
    checkpoint = offline(hub, tmp_path).open()
    assert checkpoint.path == snapshot.resolve()
    assert checkpoint.fingerprint == open_checkpoint(CHECKPOINT).fingerprint, "the same files are the same checkpoint"


@pytest.mark.parametrize(("hub", "make"), CACHES)
def test_damage_is_named_with_the_command_that_repairs_it(
    hub: Hub, make: Callable[[Path], Path], tmp_path: Path
) -> None:
    file = make(tmp_path) / WEIGHTS
    with file.resolve().open("r+b") as f:
        f.truncate(1000)
    with pytest.raises(DamagedFileError) as caught:
        offline(hub, tmp_path, "main" if hub is Hub.HUGGINGFACE else "master").open()
    command = {
        Hub.HUGGINGFACE: f"hf download {NAME} {WEIGHTS} --force-download --revision main --cache-dir {tmp_path}",
        Hub.MODELSCOPE: f"modelscope download {NAME} {WEIGHTS} --force --revision master --cache-dir {tmp_path}",
    }[hub]
    assert f"repair it: {command}" in str(caught.value)


@pytest.mark.parametrize(("hub", "make"), CACHES)
def test_a_file_that_was_never_downloaded_is_named(hub: Hub, make: Callable[[Path], Path], tmp_path: Path) -> None:
    (make(tmp_path) / "vae" / "config.json").unlink()
    with pytest.raises(DamagedFileError, match=r"is missing from the checkpoint; repair it: .*vae/config\.json"):
        offline(hub, tmp_path).open()


@pytest.mark.parametrize(("hub", "make"), CACHES[:2])
def test_a_revision_is_pinned(hub: Hub, make: Callable[[Path], Path], tmp_path: Path) -> None:
    snapshot = make(tmp_path)
    if hub is Hub.HUGGINGFACE:
        assert offline(hub, tmp_path, COMMIT).open().path == snapshot
    with pytest.raises(SourceError, match=r"at revision v2\.0 cannot be had from the cache"):
        offline(hub, tmp_path, "v2.0").open()


@pytest.mark.parametrize("hub", [Hub.HUGGINGFACE, Hub.MODELSCOPE])
def test_what_is_not_cached_is_told_with_the_command_that_fetches_it(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(SourceError) as caught:
        offline(hub, tmp_path).open()
    program = {Hub.HUGGINGFACE: "hf", Hub.MODELSCOPE: "modelscope"}[hub]
    assert f"{program} download {NAME} --include model_index.json" in str(caught.value)
    assert f"--cache-dir {tmp_path}" in str(caught.value)


OPEN_IN_FRESH_PROCESS = """
import sys
from export.sources import Hub, Source, network_from_environment
print(Source(Hub(sys.argv[1]), sys.argv[2], network=network_from_environment()).open().path)
"""


@pytest.mark.parametrize(("hub", "make"), CACHES[:2])
def test_the_libraries_own_environment_is_respected(hub: Hub, make: Callable[[Path], Path], tmp_path: Path) -> None:
    cache = tmp_path / "hub" if hub is Hub.HUGGINGFACE else tmp_path
    snapshot = make(cache)
    variables = {"HF_HOME": str(tmp_path), "MODELSCOPE_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", OPEN_IN_FRESH_PROCESS, hub, NAME],
        cwd=ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines()[-1:] == [str(snapshot)], done.stderr


@pytest.mark.parametrize(
    ("value", "network"), [("1", "offline"), ("TRUE", "offline"), ("false", "online"), ("", "online")]
)
def test_the_switch_means_what_it_means_to_its_library(value: str, network: str) -> None:
    program = "from export.sources import network_from_environment; print(network_from_environment().value)"
    environment = {**os.environ, "HF_HUB_OFFLINE": value}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout == f"{network}\n", done.stderr


def test_a_hub_that_breaks_off_is_a_clear_error(tmp_path: Path) -> None:
    """The HTTP library's own errors are none of Python's."""
    program = "import sys; from export.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = ["--checkpoint", NAME, "--source", "huggingface", "--cache-dir", str(tmp_path), "--name", "m"]
    with socket.create_server(("127.0.0.1", 0)) as hub, ThreadPoolExecutor(1) as pool:
        pool.submit(hang_up, hub)
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments],
            cwd=ROOT,
            env={**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{hub.getsockname()[1]}", "NO_PROXY": "127.0.0.1"},
            capture_output=True,
            text=True,
            check=False,
        )
        hub.shutdown(socket.SHUT_RDWR)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert f"{NAME} " in done.stderr


def hang_up(hub: socket.socket) -> None:
    """Takes calls and answers none, until the socket is shut."""
    while True:
        try:
            connection, _ = hub.accept()
        except OSError:
            return
        with connection:
            connection.recv(4096)


def test_a_folder_that_is_not_there_names_the_other_sources() -> None:
    with pytest.raises(CheckpointError, match="--source huggingface or --source modelscope"):
        Source(Hub.LOCAL, NAME).open()
