"""Temporary files of servers that are killed."""

import os
import signal
import tempfile
from pathlib import Path
from typing import Any

import pytest

from server.frontend.scratch import LOCK, scratch_folder
from tests.integration.process import ServerProcess
from tests.integration.triton.conftest import IDENTITIES, write_model


def test_what_a_killed_server_leaves_is_removed_by_the_next_and_nothing_else_is(tmp_path: Path) -> None:
    repository, temporary = tmp_path / "models", tmp_path / "tmp"
    write_model(repository, "identity", IDENTITIES["identity"])
    others = {temporary / "zserve-of-a-user", temporary / "another"}
    for folder in others:
        folder.mkdir(parents=True)
        (folder / "file").touch()

    def start() -> ServerProcess:
        return ServerProcess(repository, environment={"TMPDIR": str(temporary)})

    def folders() -> set[Path]:
        return set(temporary.iterdir()) - others

    with start() as killed, start() as lives:
        assert len(left := folders()) == 2
        killed.stop(signal.SIGKILL)
        assert folders() == left
        with start() as third:
            assert len(folders()) == 2  # of `lives` and `third`
            assert third.log.count("which a server that was killed had left") == 1
        assert len(folders()) == 1
        assert lives.stop() == os.EX_OK
    assert not folders()
    assert all((folder / "file").exists() for folder in others)


def test_a_removal_that_is_interrupted_is_continued_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left, rmdir, asked = tmp_path / "zserve-left", os.rmdir, []
    for number in range(50):  # so that the lock is hardly ever the last of what is found there
        (left / str(number)).mkdir(parents=True)
    (left / LOCK).touch()

    def interrupted(*arguments: Any, **options: Any) -> None:
        asked.append(arguments)
        if len(asked) == 50:
            raise KeyboardInterrupt
        rmdir(*arguments, **options)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(os, "rmdir", interrupted)
        with scratch_folder():
            pass
    assert left.exists()
    with scratch_folder():
        assert not left.exists()
