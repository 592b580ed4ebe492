"""The folder of a model: its versions, what a load request puts in its place, and how a change is noticed."""

import os
from itertools import pairwise
from pathlib import Path

import pytest

from server.errors import ConfigError, InvalidRequestError
from server.frontend.versions import ModelState, Override, Version, check_version, chosen_folders, folder_mark


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model with a version, and a file whose name looks like another."""
    (folder := tmp_path / "models" / "m").joinpath("1").mkdir(parents=True)
    (folder / "1" / "weights").write_text("a")
    (folder / "2").touch()
    (folder / "config.pbtxt").write_text("backend: 'identity'")
    return folder


def lay_out(override: Override, model: Path, tmp_path: Path) -> dict[str, str]:
    """The files of the folder that comes of it, by name."""
    (scratch := tmp_path / "scratch").mkdir()
    laid_out = override.lay_out(model, scratch)
    folders = [laid_out, *(p for p in laid_out.iterdir() if p.is_dir())]
    files = [p for folder in folders for p in folder.iterdir() if p.is_file()]
    return {str(p.relative_to(laid_out)): p.read_text("utf-8") for p in files}


def test_the_files_of_a_load_request_are_there_instead_of_the_versions(model: Path, tmp_path: Path) -> None:
    override = Override("name: 'é'", {"7/weights": b"b"})
    assert lay_out(override, model, tmp_path) == {"7/weights": "b", "config.pbtxt": "name: 'é'"}


def test_a_config_alone_goes_with_the_versions_of_a_repository_that_was_named_from_here(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = lay_out(Override("x"), model.relative_to(tmp_path), tmp_path)
    assert found == {"1/weights": "a", "config.pbtxt": "x"}


def test_a_config_that_is_no_text_is_refused(model: Path, tmp_path: Path) -> None:
    """JSON can name half of a character."""
    with pytest.raises(ConfigError, match="what the load request brings cannot be written"):
        lay_out(Override("name: '\ud800'"), model, tmp_path)


def test_versions_are_folders_and_there_has_to_be_one(model: Path) -> None:
    assert [folder.version for folder in chosen_folders(model)] == ["1"]
    (model / "config.pbtxt").write_text("backend: 'identity' version_policy { specific { versions: [2] } }")
    with pytest.raises(ConfigError, match="has none that the version policy asks for"):
        chosen_folders(model)
    (model / "1").rename(model / "draft")
    with pytest.raises(ConfigError, match="m holds no version; finish its export"):
        chosen_folders(model)


def test_a_version_that_could_not_be_loaded_has_nothing_to_unload(model: Path) -> None:
    version = Version(chosen_folders(model)[0])
    version.rest("it is broken")
    version.retire()
    assert (version.state, version.standing) == (ModelState.UNAVAILABLE, "it is broken")


@pytest.mark.parametrize("text", ["0", "-1", "", "1.5", "latest", "+1", "9" * 20, "x" * 1000])
def test_what_is_no_version_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequestError, match="version should be an integral value > 0") as refusal:
        check_version(text)
    assert len(str(refusal.value)) < 200


def test_a_version_is_a_whole_number() -> None:
    check_version("1")
    check_version(str(2**63 - 1))


def test_a_change_of_any_file_of_a_version_is_noticed(model: Path) -> None:
    (nested := model / "1" / "parts" / "0").parent.mkdir()
    nested.write_text("a")
    weights, marks = model / "1" / "weights", [folder_mark(model)]
    at = weights.stat().st_mtime_ns
    nested.write_text("aa")
    marks.append(folder_mark(model))
    weights.write_text("other")
    os.utime(weights, ns=(at, at))  # its size alone tells
    marks.append(folder_mark(model))
    (model / "1").rename(model / "3")
    marks.append(folder_mark(model))
    (model / "config.pbtxt").unlink()
    marks.append(folder_mark(model))
    assert all(mark != before for before, mark in pairwise(marks))
