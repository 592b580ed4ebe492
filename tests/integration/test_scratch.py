"""Temporary files of servers that are killed."""

import os
import signal
from pathlib import Path

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
