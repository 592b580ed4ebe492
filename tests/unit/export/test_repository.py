"""A reader never sees half a version."""

import multiprocessing
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from export.errors import VersionExistsError
from export.repository import Existing, ServingDefaults, kept_settings, locked, new_version, versions, write_config
from server.backends.image_config import image_config
from server.rpc.triton.model_config import read_model_file


@contextmanager
def exporting(model: Path, number: int | None = None, existing: Existing = Existing.KEEP) -> Iterator[Path]:
    """As an export writes a version; the folder that it builds in."""
    with locked(model), new_version(model, number, existing) as (folder, _):
        yield folder


def test_versions_are_numbered_and_appear_whole(tmp_path: Path) -> None:
    model = tmp_path / "m"
    for expected in ([1], [1, 2]):
        with exporting(model) as folder:
            (folder / "engine").write_text("x")
            assert versions(model) == expected[:-1]
        assert versions(model) == expected
        assert (model / str(expected[-1]) / "engine").read_text() == "x"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failed_export_publishes_nothing_and_leaves_its_work_to_the_next(
    tmp_path: Path, error: type[BaseException]
) -> None:
    with pytest.raises(error), exporting(tmp_path / "m") as folder:
        (folder / "engine").write_text("finished")
        raise error
    assert versions(tmp_path / "m") == []
    with exporting(tmp_path / "m") as folder:
        assert (folder / "engine").read_text() == "finished"
    assert versions(tmp_path / "m") == [1]


def _die_while_building(model: Path) -> None:
    with exporting(model) as folder:
        (folder / "engine").write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_export_leaves_no_version_and_no_lock(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_die_while_building, args=(tmp_path / "m",))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert versions(tmp_path / "m") == []
    with exporting(tmp_path / "m"):
        pass
    assert versions(tmp_path / "m") == [1]


def test_an_existing_number_is_kept_unless_it_is_to_be_replaced(tmp_path: Path) -> None:
    model = tmp_path / "m"
    for text in ("old", "new"):
        with exporting(model, 3, Existing.REPLACE) as folder:
            (folder / "engine").write_text(text)
    assert (model / "3" / "engine").read_text() == "new"
    with pytest.raises(VersionExistsError, match="--force replaces it"), exporting(model, 3):
        pass
    assert sorted(p.name for p in model.iterdir() if p.is_dir()) == ["3"]


@pytest.mark.parametrize("existing", Existing)
def test_the_next_number_is_that_of_nothing_there_be_it_a_version_or_not(tmp_path: Path, existing: Existing) -> None:
    """As a link to a disk that is not mounted, which --force without --version must not replace either."""
    model = tmp_path / "m"
    (model / "1").mkdir(parents=True)
    (model / "2").symlink_to(tmp_path / "not mounted")
    (model / "3").touch()
    with exporting(model, existing=existing):
        pass
    assert versions(model) == [1, 4]
    assert (model / "2").is_symlink()
    assert (model / "3").is_file()


@pytest.mark.parametrize("number", [None, 1])
def test_a_version_that_appears_while_another_is_built_is_not_replaced(tmp_path: Path, number: int | None) -> None:
    """As when one is copied from another machine meanwhile, which asks for no lock."""
    model = tmp_path / "m"
    with pytest.raises(VersionExistsError, match="1 is already there"), exporting(model, number) as folder:
        (folder / "engine").write_text("built")
        (model / "1").mkdir()
        (model / "1" / "engine").write_text("copied")
    assert (model / "1" / "engine").read_text() == "copied"
    with exporting(model) as folder:
        assert (folder / "engine").read_text() == "built", "it is not built again"
    assert versions(model) == [1, 2]


def _die_between_the_renames(model: Path) -> None:
    rename = Path.rename

    def last(path: Path, target: Path) -> Path:
        renamed = rename(path, target)
        os.kill(os.getpid(), signal.SIGKILL)
        return renamed

    with exporting(model, 1, Existing.REPLACE) as folder:
        (folder / "engine").write_text("new")
        Path.rename = last  # type: ignore[method-assign, assignment]


def test_a_version_whose_replacement_never_came_is_put_back(tmp_path: Path) -> None:
    model = tmp_path / "m"
    with exporting(model) as folder:
        (folder / "engine").write_text("old")
    process = multiprocessing.get_context("spawn").Process(target=_die_between_the_renames, args=(model,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert versions(model) == []
    with exporting(model):
        assert versions(model) == [1]
        assert (model / "1" / "engine").read_text() == "old"
    assert versions(model) == [1, 2]


def test_what_could_not_be_deleted_does_not_fail_the_export_and_goes_with_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(path: Path) -> None:
        raise OSError(f"{path} is busy")

    model = tmp_path / "m"
    for text in ("old", "new"):
        with monkeypatch.context() as during, exporting(model, 1, Existing.REPLACE) as folder:
            (folder / "engine").write_text(text)
            during.setattr(shutil, "rmtree", busy)
    assert (model / "1" / "engine").read_text() == "new"
    assert (model / ".replaced-1" / "engine").read_text() == "old"
    with monkeypatch.context() as during:
        during.setattr(shutil, "rmtree", busy)
        with pytest.raises(OSError, match=r"replaced-1 is busy"), exporting(model, 1, Existing.REPLACE):
            pytest.fail("what was built could not take the place of what is there")
    with exporting(model):
        assert not (model / ".replaced-1").exists()


def test_a_version_that_is_a_link_can_be_replaced_again_and_again(tmp_path: Path) -> None:
    model, elsewhere = tmp_path / "m", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "engine").write_text("elsewhere")
    model.mkdir()
    for text in ("first", "second"):
        if not (model / "1").exists():
            (model / "1").symlink_to(elsewhere)
        with exporting(model, 1, Existing.REPLACE) as folder:
            (folder / "engine").write_text(text)
        assert (model / "1" / "engine").read_text() == text
        assert not list(model.glob(".replaced-*"))
    assert (elsewhere / "engine").read_text() == "elsewhere"


def test_two_exports_of_one_model_do_not_meet(tmp_path: Path) -> None:
    with (
        exporting(tmp_path / "m"),
        pytest.raises(VersionExistsError, match="another export"),
        exporting(tmp_path / "m"),
    ):
        pass


def test_the_servers_reader_understands_the_config(tmp_path: Path) -> None:
    model = tmp_path / "m"
    model.mkdir()
    write_config(model, ServingDefaults(default_size="512x256", warmup_sizes=("256x256",), max_batch=2, max_size=1024))
    config = image_config(read_model_file(model))
    assert config.default_size == (512, 256)
    assert config.warmup_sizes == ((512, 256), (256, 256))
    assert (config.max_batch_size, config.max_size, config.default_num_inference_steps) == (2, 1024, 8)


def test_an_existing_config_is_the_operators(tmp_path: Path) -> None:
    (tmp_path / "config.pbtxt").write_text('name: "mine"')
    write_config(tmp_path, ServingDefaults())
    assert (tmp_path / "config.pbtxt").read_text() == 'name: "mine"'


def test_what_an_existing_config_says_otherwise_is_told(tmp_path: Path) -> None:
    asked = ServingDefaults(default_size="512x512", max_batch=2)
    assert kept_settings(tmp_path, asked) == ()
    write_config(tmp_path, asked)
    assert kept_settings(tmp_path, asked) == ()
    (tmp_path / "config.pbtxt").write_text("dynamic_batching {}\nmax_batch_size: 2")
    assert kept_settings(tmp_path, asked)[0] == "default_size is not set, and 512x512 was asked for"
    (tmp_path / "config.pbtxt").write_text("colour: red")
    assert "it cannot be read" in kept_settings(tmp_path, asked)[0]
    (tmp_path / "config.pbtxt").write_bytes("# Größe".encode("latin-1"))
    assert "it cannot be read" in kept_settings(tmp_path, asked)[0]
