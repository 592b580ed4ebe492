"""What a process of the server does with its heap before it serves."""

import gc
import tempfile
import weakref
from pathlib import Path

import pytest

from server.config import ServeConfig
from server.frontend import app
from server.heap import settle


class _Node:
    def __init__(self) -> None:
        self.me = self


def test_garbage_goes_and_what_is_made_later_is_still_collected() -> None:
    old, kept = weakref.ref(_Node()), _Node()
    try:
        settle()
        assert old() is None
        assert all(one is not kept for one in gc.get_objects())
        later = weakref.ref(_Node())
        gc.collect()
        assert later() is None
    finally:
        gc.unfreeze()


async def test_the_frontend_too_leaves_its_modules_out_of_collections(monkeypatch: pytest.MonkeyPatch) -> None:
    frozen: list[int] = []

    class Frontend:
        def __init__(self, config: ServeConfig, sockets: Path) -> None: ...

        async def run(self) -> int:
            frozen.append(gc.get_freeze_count())
            return 0

    monkeypatch.setattr(app, "Frontend", Frontend)
    try:
        assert await app.serve(ServeConfig(model_repository=Path(tempfile.gettempdir()))) == 0
    finally:
        gc.unfreeze()
    assert frozen[0] > 0
