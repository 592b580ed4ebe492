"""What `--dry-run` says of a checkpoint on a hub, and what is refused before it is downloaded."""

import errno
import importlib
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import modelscope_hub.config
import psutil
import pytest
from modelscope_hub.errors import FileDownloadError

from export import dry_run
from export.cli import NOT_POSSIBLE, main
from export.dry_run import print_dry_run
from export.errors import ResourcesError, VersionExistsError
from export.hubs import Hub
from export.repository import Existing
from export.request import ExportRequest
from export.sources import Source
from tests.conftest import CHECKPOINT
from tests.unit.export.fake_hub import FakeHub
from tests.unit.export.test_estimate import Free
from tests.unit.export.test_exporter import DENOISER, FakeBuilder, request_, run  # noqa: F401 a fixture
from tests.unit.export.test_sources import NAME, huggingface_cache, modelscope_cache, offline

HUBS = [Hub.HUGGINGFACE, Hub.MODELSCOPE]
CACHES = {Hub.HUGGINGFACE: huggingface_cache, Hub.MODELSCOPE: modelscope_cache}
# In the order in which `huggingface_cache` numbers its blobs, as the fake hub does its files.
SIZES = {str(p.relative_to(CHECKPOINT)): p.stat().st_size for p in sorted(CHECKPOINT.rglob("*")) if p.is_file()}
# As published: the transformer in fp32, the text encoder and the VAE in bf16.
REAL = SIZES | {
    "transformer/diffusion_pytorch_model.safetensors": 24_600_000_000,
    "text_encoder/model.safetensors": 8_000_000_000,
    "vae/diffusion_pytorch_model.safetensors": 200_000_000,
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """Both hubs' libraries ask this one."""
    with FakeHub(NAME, REAL) as fake:
        point_at(fake.url, monkeypatch)
        yield fake


def point_at(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    constants: Any = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", url)
    monkeypatch.setattr(modelscope_hub.config, "_default_config", None)


@pytest.fixture(autouse=True)
def plenty(monkeypatch: pytest.MonkeyPatch) -> None:
    there_is(Free(), monkeypatch)


def there_is(free: Free, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: free)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)


def export(kind: Hub, folder: Path, *arguments: str) -> int:
    source = ["--checkpoint", NAME, "--source", kind, "--cache-dir", str(folder / "cache")]
    where = ["--repository", str(folder / "models"), "--name", "m", "--device", "cpu"]
    return main([*source, *where, *arguments])


@pytest.mark.parametrize("kind", HUBS)
def test_what_is_not_cached_is_told_with_its_size_and_what_its_export_needs(
    kind: Hub, hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(kind, tmp_path, "--dry-run", "--backend", "tensorrt_rtx", "--target", "sm89") == 0
    said = capsys.readouterr().out
    assert f"download   {len(SIZES)} of {len(SIZES)} files, 32.8 GB, of {NAME} from {kind}" in said
    assert f"into {tmp_path / 'cache'}, where 1099.5 GB are free" in said
    assert "denoiser        weights   12.30 to  24.60 GB" in said
    assert "prompt_encoder  weights    4.00 to   8.00 GB" in said
    assert "memory      26.60 to  51.20 GB" in said
    assert not hub.downloads
    assert hub.listings == 1
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize("kind", HUBS)
def test_copies_of_the_weights_in_another_type_are_not_counted_as_weights(
    kind: Hub, hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are not read; of weights in several files all are."""
    stem = "transformer/diffusion_pytorch_model"
    whole = hub.files.pop(f"{stem}.safetensors")
    hub.files |= {f"{stem}-0000{n}-of-00003.safetensors": whole // 3 for n in (1, 2, 3)}
    hub.files[f"{stem}.fp16.safetensors"] = whole // 2
    assert export(kind, tmp_path, "--dry-run", "--backend", "tensorrt_rtx", "--target", "sm89") == 0
    assert "denoiser        weights   12.30 to  24.60 GB" in capsys.readouterr().out


@pytest.mark.parametrize("kind", HUBS)
def test_of_what_is_partly_cached_the_rest_is_told(
    kind: Hub, hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.files = dict(SIZES)
    snapshot = CACHES[kind](tmp_path / "cache")
    assert export(kind, tmp_path, "--dry-run") == 0
    assert "download   nothing; the checkpoint is" in capsys.readouterr().out
    for name in ("vae/config.json", "text_encoder/model.safetensors"):
        (snapshot / name).resolve().unlink()
    assert export(kind, tmp_path, "--dry-run") == 0
    assert f"download   2 of {len(SIZES)} files, 0.0 GB" in capsys.readouterr().out


def test_what_another_revision_has_cached_is_not_downloaded_again(
    hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.files = dict(SIZES)
    snapshot = huggingface_cache(tmp_path / "cache")
    snapshot.rename(snapshot.with_name("0" * 40))
    assert export(Hub.HUGGINGFACE, tmp_path, "--dry-run") == 0
    assert f"download   nothing; the checkpoint is {snapshot}" in capsys.readouterr().out
    assert not hub.downloads


def test_what_is_cached_is_still_found_offline_after_its_hub_was_asked_for_a_newer_one(
    hub: FakeHub, tmp_path: Path
) -> None:
    hub.files = {**SIZES, "transformer/another.safetensors": 1000}
    snapshot = huggingface_cache(tmp_path / "cache")
    older = snapshot.rename(snapshot.with_name("0" * 40))
    (snapshot.parent.parent / "refs" / "main").write_text(older.name)
    assert export(Hub.HUGGINGFACE, tmp_path, "--dry-run") == 0
    assert offline(Hub.HUGGINGFACE, tmp_path / "cache").fetch() == older


def test_modelscope_downloads_the_revision_asked_for_beside_another_that_is_cached(
    hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without its hub, and without --revision, the library itself takes any that is cached."""
    hub.files = dict(SIZES)
    snapshot = modelscope_cache(tmp_path / "cache")
    snapshot.rename(snapshot.with_name("v1.0"))
    assert export(Hub.MODELSCOPE, tmp_path, "--dry-run") == 0
    assert f"download   {len(SIZES)} of {len(SIZES)} files" in capsys.readouterr().out
    assert export(Hub.MODELSCOPE, tmp_path, "--dry-run", "--revision", "v1.0") == 0
    assert "download   nothing; the checkpoint is" in capsys.readouterr().out


def test_modelscope_goes_on_with_a_part_of_a_file(hub: FakeHub, tmp_path: Path) -> None:
    hub.files = dict(SIZES)
    weights = modelscope_cache(tmp_path) / "text_encoder" / "model.safetensors"
    weights.rename(f"{weights}.incomplete")
    with Path(f"{weights}.incomplete").open("r+b") as f:
        f.truncate(1_000_000)
    listing = Source(Hub.MODELSCOPE, NAME, cache_dir=tmp_path).listing()
    assert listing is not None
    assert listing.missing_bytes == SIZES["text_encoder/model.safetensors"] - 1_000_000


TOO_LITTLE = [
    (Free(free=20_000_000_000), "aotinductor", "needs 33.0 GB of disk at .*cache and .*models and 20.0 GB are free"),
    (Free(free=33_000_000_000), "onnxruntime", "needs 65.8 GB of disk at .*--cache-dir or --repository"),
    (Free(available=5_000_000_000), "aotinductor", "needs 26.6 GB of memory and 5.0 GB are available"),
]


@pytest.mark.parametrize("kind", HUBS)
@pytest.mark.parametrize(("has", "backend", "says"), TOO_LITTLE)
def test_too_little_is_refused_before_the_download(
    has: Free,
    backend: str,
    says: str,
    kind: Hub,
    hub: FakeHub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    there_is(has, monkeypatch)
    for how in (["--dry-run"], []):
        assert export(kind, tmp_path, "--backend", backend, *how) == NOT_POSSIBLE
        said = capsys.readouterr().err
        assert re.search(says, said), said
    assert not hub.downloads


@pytest.mark.parametrize("kind", HUBS)
def test_without_its_hub_what_is_cached_will_do_and_what_is_not_is_an_error(
    kind: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    point_at("http://127.0.0.1:9", monkeypatch)
    assert export(kind, tmp_path, "--dry-run") == 1
    assert f"cannot be had from {kind}" in capsys.readouterr().err
    CACHES[kind](tmp_path / "cache")
    assert export(kind, tmp_path, "--dry-run") == 0
    assert "download   nothing" in capsys.readouterr().out


@pytest.mark.parametrize("dry_run", [["--dry-run"], []])
def test_a_version_that_is_there_is_refused_before_the_download(
    dry_run: list[str], hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "models" / "m" / "7").mkdir(parents=True)
    assert export(Hub.HUGGINGFACE, tmp_path, "--version", "7", *dry_run) == 1
    assert "7 is already there; --force replaces it" in capsys.readouterr().err
    assert export(Hub.HUGGINGFACE, tmp_path, "--version", "7", "--force", "--dry-run") == 0
    assert "version    7, replacing the one that is there" in capsys.readouterr().out
    assert export(Hub.HUGGINGFACE, tmp_path, "--dry-run") == 0
    assert "version    8; what still holds of earlier exports is taken from them" in capsys.readouterr().out
    assert not hub.downloads


def test_what_would_be_reused_is_told(
    request_: ExportRequest,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(dry_run, "builder_for", lambda backend, options: FakeBuilder())

    def told(request: ExportRequest) -> str:
        print_dry_run(request)
        return capsys.readouterr().out

    assert "taken from" not in told(request_)
    with pytest.raises(KeyboardInterrupt):
        run(request_, FakeBuilder(stop_at=DENOISER), monkeypatch)
    said = told(request_)
    assert "version    1\n  prompt_encoder  is not built again, but taken from an interrupted export" in said
    assert said.count("taken from") == 1
    assert f"disk      {0.12:7.2f} GB" in said, "of the two that are left"
    assert "prompt_encoder  weights" not in said
    run(request_, FakeBuilder(), monkeypatch)
    assert "version    1 is what is asked for; nothing is built" in told(request_)
    (request_.model / "1" / "denoiser.pt2").write_text("engine damaged!")
    said = told(request_)
    assert said.count("is not built again, but taken from version 1") == 2
    assert "version    2\n" in said
    assert "taken from" not in told(replace(request_, existing=Existing.REPLACE))
    with pytest.raises(VersionExistsError):
        print_dry_run(replace(request_, version=1))


def full_disk(*arguments: object, **options: object) -> str:
    raise OSError(errno.ENOSPC, "No space left on device")


def full_disk_in_rust(*arguments: object, **options: object) -> str:
    raise RuntimeError("Data processing error: I/O error: No space left on device (os error 28)")


def full_disk_of_a_snapshot(*arguments: object, **options: object) -> str:
    raise FileDownloadError("1 of 9 file(s) failed", failed_files={"a": OSError(errno.ENOSPC, "No space left")})


@pytest.mark.parametrize(
    ("kind", "download"),
    [
        (Hub.HUGGINGFACE, full_disk),
        (Hub.HUGGINGFACE, full_disk_in_rust),
        (Hub.MODELSCOPE, full_disk),
        (Hub.MODELSCOPE, full_disk_of_a_snapshot),
    ],
)
def test_a_disk_that_fills_up_is_not_the_networks_fault(
    kind: Hub, download: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = "huggingface_hub" if kind is Hub.HUGGINGFACE else "modelscope.hub.snapshot_download"
    monkeypatch.setattr(importlib.import_module(module), "snapshot_download", download)
    with pytest.raises(ResourcesError, match=f"the disk of {tmp_path} was full .* give another --cache-dir"):
        Source(kind, NAME, cache_dir=tmp_path).open()
