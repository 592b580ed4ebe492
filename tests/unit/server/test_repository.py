"""What is loaded, tried again, dropped and left behind; with models that are ordinary objects."""

import asyncio
import gc
import os
import shutil
from pathlib import Path

import pytest

from server.backends.base import Host
from server.errors import (
    EngineLoadError,
    InvalidRequestError,
    ModelNotFoundError,
    ModelNotReadyError,
    OvertakenError,
    ShuttingDownError,
)
from server.frontend import served_model as module
from server.frontend.repository import Repository
from server.frontend.versions import ModelState, Override, folder_mark
from tests.fakes import FakeBackend, FakeModel

ALL = "version_policy { all {} }"
FAILS = "parameters { key: 'fails' value { string_value: 'yes' } }"


class Setup:
    """A repository over a folder of its own, and what its models are made of."""

    def __init__(self, folder: Path) -> None:
        self.models, self.scratch = folder / "models", folder / "scratch"
        self.models.mkdir()
        self.scratch.mkdir()
        self.backend = FakeBackend()
        self.changed = asyncio.Event()
        self.backend.changed = self.changed.set
        host = Host(None, None, self.scratch, self.changed.set)  # type: ignore[arg-type]
        self.repository = Repository(self.models, host, lambda name: self.backend)

    def write(self, config: str = "", versions: tuple[str, ...] = ("1",), name: str = "m") -> Path:
        for version in versions:
            (self.models / name / version).mkdir(parents=True, exist_ok=True)
        (self.models / name / "config.pbtxt").write_text(config)
        return self.models / name

    async def begin(self, models: int = 1) -> "asyncio.Task[None]":
        """A load that is held while it has so many models to load."""
        self.backend.go.clear()
        task = asyncio.create_task(self.repository.load("m"))
        for _ in range(models):
            await self.backend.loading.get()
        return task

    @property
    def ready(self) -> bool:
        """Whether all that is to be served is."""
        return all(self.repository.readiness().values())

    @property
    def unloaded(self) -> list[bool]:
        return [m.unloaded.is_set() for m in self.backend.made]

    async def until(self, condition: object) -> None:
        while not condition():  # type: ignore[operator]
            self.changed.clear()
            await self.changed.wait()


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    return Setup(tmp_path)


def touch(model: Path) -> None:
    """As if the config had been written again a second later."""
    config = model / "config.pbtxt"
    os.utime(config, ns=(0, config.stat().st_mtime_ns + 10**9))


async def test_a_load_goes_on_when_its_client_has_left(setup: Setup) -> None:
    setup.write()
    load = await setup.begin()
    load.cancel()
    assert isinstance((await asyncio.gather(load, return_exceptions=True))[0], asyncio.CancelledError)
    assert not setup.ready
    setup.backend.go.set()
    await setup.until(lambda: setup.ready)
    assert setup.repository.find("m") is setup.backend.made[0]


async def test_closing_ends_loads_and_frees_what_they_began(setup: Setup) -> None:
    setup.write(ALL, ("1", "2"))
    load = await setup.begin(models=2)
    await setup.repository.close()
    assert setup.unloaded == [True, True]
    with pytest.raises(ShuttingDownError):
        await load
    with pytest.raises(ShuttingDownError):
        await setup.repository.load("m")


async def test_what_a_failed_load_has_begun_is_freed_even_when_it_is_cancelled_meanwhile(setup: Setup) -> None:
    setup.write(FAILS)
    with pytest.raises(EngineLoadError, match="it is to fail"):
        await setup.repository.load("m")
    assert setup.unloaded == [True]
    setup.backend.unloads = asyncio.Event()
    load = asyncio.create_task(setup.repository.load("m"))
    await setup.until(lambda: len(setup.backend.made) == 2 and setup.backend.made[1].unloading)
    closing = asyncio.create_task(setup.repository.close())
    await asyncio.sleep(0)  # it is cancelled now
    setup.backend.unloads.set()
    await closing
    assert setup.unloaded == [True, True]
    assert isinstance((await asyncio.gather(load, return_exceptions=True))[0], ShuttingDownError)
    assert setup.repository.live == []


async def test_closing_frees_a_version_whose_sibling_is_still_loading(setup: Setup) -> None:
    model = setup.write(ALL, ("1", "2"))
    await setup.repository.load("m")
    touch(model)
    setup.backend.stuck = {"2"}
    reload = asyncio.create_task(setup.repository.load("m"))
    await setup.until(lambda: len(setup.backend.made) == 4 and setup.backend.made[2].ready)
    await setup.repository.close()
    assert setup.unloaded == [True] * 4
    assert isinstance((await asyncio.gather(reload, return_exceptions=True))[0], ShuttingDownError)


async def test_closing_frees_what_has_been_replaced_and_still_answers(setup: Setup) -> None:
    model = setup.write()
    await setup.repository.load("m")
    old = setup.backend.made[0]
    with old.statistics.request():
        touch(model)
        reload = asyncio.create_task(setup.repository.load("m"))
        await old.retired.wait()
        assert setup.repository.find("m") is setup.backend.made[1]
        assert setup.unloaded == [False, False]
        await setup.repository.close()
    assert setup.unloaded == [True, True]
    await asyncio.gather(reload, return_exceptions=True)


async def test_an_unload_ends_a_load_that_is_under_way(setup: Setup) -> None:
    """And one that waits for its turn; what is asked for later is loaded."""
    model = setup.write()
    await setup.repository.load("m")
    old = await setup.backend.loading.get()
    touch(model)
    with old.statistics.request():
        load = await setup.begin()
        waiting = asyncio.create_task(setup.repository.load("m"))
        await asyncio.sleep(0)
        setup.repository.unload_soon("m")
        assert old.retired.is_set()
        with pytest.raises(ModelNotReadyError, match="unloading"):
            setup.repository.find("m")
        later = asyncio.create_task(setup.repository.load("m"))
        for overtaken in (load, waiting):
            with pytest.raises(OvertakenError, match="'m' was unloaded before it was loaded"):
                await overtaken
        assert setup.unloaded == [False, True]
        assert setup.repository.loaded() == []
        assert setup.ready  # nothing has failed
    setup.backend.go.set()
    await later
    assert setup.repository.find("m") is setup.backend.made[2]


async def test_an_unload_retires_a_version_whose_sibling_is_still_loading(setup: Setup) -> None:
    model = setup.write(ALL, ("1", "2"))
    await setup.repository.load("m")
    touch(model)
    setup.backend.stuck = {"2"}
    reload = asyncio.create_task(setup.repository.load("m"))
    await setup.until(lambda: len(setup.backend.made) == 4 and setup.backend.made[2].ready)
    setup.repository.unload_soon("m")
    with pytest.raises(OvertakenError):
        await reload
    await setup.until(lambda: all(setup.unloaded))
    assert setup.repository.loaded() == []


async def test_an_unload_ends_a_first_load_before_it_has_looked_at_the_folder(setup: Setup) -> None:
    setup.write()
    load = asyncio.create_task(setup.repository.load("m"))
    await asyncio.sleep(0)
    setup.repository.unload_soon("m")
    with pytest.raises(OvertakenError):
        await load
    assert setup.backend.made == []


async def test_a_backend_that_fails_to_go_leaves_nothing_behind(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    setup.write(ALL, ("1", "2"))
    await setup.repository.load("m")
    first, second = setup.backend.made

    def kaput(model: FakeModel) -> None:
        raise RuntimeError("kaput")

    async def kaput_too(model: FakeModel) -> None:
        await FakeModel.unload(model)
        raise RuntimeError("kaput too")

    monkeypatch.setattr(first, "retire", lambda: kaput(first))
    monkeypatch.setattr(first, "unload", lambda: kaput_too(first))
    setup.repository.unload_soon("m")
    await setup.until(lambda: all(e.state is ModelState.UNAVAILABLE for e in setup.repository.index()))
    assert second.unloaded.is_set()
    await setup.repository.load("m")
    assert len(setup.repository.loaded("m")) == 2
    third, fourth = setup.backend.made[2:]
    monkeypatch.setattr(third, "unload", lambda: kaput_too(third))
    await setup.repository.close()
    assert third.unloaded.is_set()
    assert fourth.unloaded.is_set()
    assert caplog.text.count("a backend failed to unload m") == 2


async def test_a_model_without_statistics_is_not_loaded(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    setup.write()

    async def load(model: FakeModel) -> None:
        del model.statistics

    monkeypatch.setattr(FakeModel, "load", load)
    with pytest.raises(EngineLoadError, match="AttributeError"):
        await setup.repository.load("m")
    assert setup.unloaded == [True]
    assert [e.state for e in setup.repository.index()] == [ModelState.UNAVAILABLE]


async def test_who_leaves_a_load_that_fails_is_not_missed(setup: Setup) -> None:
    missed: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: missed.append(context["message"]))
    setup.write()
    load = await setup.begin()
    load.cancel()
    await asyncio.gather(load, return_exceptions=True)
    (own,) = setup.repository._tasks
    setup.repository.unload_soon("m")
    await asyncio.wait({own})
    assert setup.unloaded == [True]
    del load, own
    await asyncio.sleep(0)
    gc.collect()
    assert missed == []


async def test_requests_get_their_time_and_no_more(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DRAIN_SECONDS", 0.01)
    setup.write()
    await setup.repository.load("m")
    (model,) = setup.backend.made
    with model.statistics.request():
        setup.repository.unload_soon("m")
        assert model.retired.is_set()  # at once
        await model.unloaded.wait()


@pytest.mark.parametrize("name", ["typo", "", ".", "..", "../models/m", "m/", "m/1", ".hidden", "x" * 300, "m\0"])
async def test_a_name_without_a_folder_is_refused_and_forgotten(setup: Setup, name: str) -> None:
    setup.write()
    (setup.models / ".hidden" / "1").mkdir(parents=True)
    before = setup.repository.index()
    with pytest.raises(ModelNotFoundError, match="it has no folder of that name; there are: m"):
        await setup.repository.load(name)
    setup.repository.unload_soon(name)
    assert setup.ready
    assert setup.repository.index() == before


async def test_a_repository_that_cannot_be_read_says_why(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> None:
        raise OSError(24, "Too many open files", str(path))

    setup.write()
    monkeypatch.setattr(Path, "iterdir", fail)
    with pytest.raises(EngineLoadError, match=r"failed to load 'm', .*Too many open files"):
        await setup.repository.load("m")


async def test_a_model_that_cannot_be_loaded_is_forgotten_when_it_is_unloaded(setup: Setup) -> None:
    for number, config in enumerate(("not a config", FAILS)):
        setup.write(config, name=f"m{number}")
        with pytest.raises(EngineLoadError):
            await setup.repository.load(f"m{number}")
        assert not setup.ready
        setup.repository.unload_soon(f"m{number}")
        await setup.until(lambda: setup.ready)


async def test_a_folder_whose_name_is_not_unicode_is_left_out(setup: Setup, caplog: pytest.LogCaptureFixture) -> None:
    """The protocol's text is UTF-8: it could not be said, and nothing else with it."""
    setup.write()
    (setup.models / os.fsdecode(b"\xff")).mkdir()
    await setup.repository.poll()
    assert [entry.name for entry in setup.repository.index()] == setup.repository.names() == ["m"]
    assert [r.message for r in caplog.records if r.levelname == "WARNING"] == [
        r"the folder '\udcff' is left out: its name is not UTF-8"
    ]


async def test_requests_wait_for_a_version_that_is_not_ready_just_now_where_no_other_is(setup: Setup) -> None:
    setup.write(ALL, ("1", "2"))
    await setup.repository.load("m")
    first, second = sorted(setup.backend.made, key=lambda m: m.spec.version)
    assert setup.repository.find("m") is second
    second.ready = False
    assert setup.repository.find("m") is first
    assert setup.repository.find("m", "2") is second
    first.ready = False
    assert setup.repository.find("m") is second
    assert not setup.ready


async def test_a_failed_load_is_tried_again(setup: Setup) -> None:
    model = setup.write()
    await setup.repository.load("m")
    setup.write(FAILS)
    for _ in range(2):
        with pytest.raises(EngineLoadError, match="it is to fail"):
            await setup.repository.load("m")
    assert len(setup.backend.made) == 3
    assert setup.repository.find("m") is setup.backend.made[0]
    setup.write()
    touch(model)
    for _ in range(2):  # the second time there is nothing to do
        await setup.repository.load("m")
    assert len(setup.backend.made) == 4
    assert setup.repository.find("m") is setup.backend.made[3]


@pytest.mark.parametrize("first", ["", FAILS])
async def test_a_model_is_seen_loading_again_after_it_was_unloaded_or_had_failed(setup: Setup, first: str) -> None:
    setup.write(first)
    await asyncio.gather(setup.repository.load("m"), return_exceptions=True)
    setup.backend.loading.get_nowait()
    if not first:
        setup.repository.unload_soon("m")
        await setup.until(lambda: setup.repository.index()[0].state is ModelState.UNAVAILABLE)
    setup.write()
    load = await setup.begin()
    (line,) = setup.repository.index()
    assert (line.state, line.reason) == (ModelState.LOADING, "")
    assert not setup.ready
    with pytest.raises(ModelNotReadyError, match="not at ready state"):
        setup.repository.find("m")
    setup.backend.go.set()
    await load
    assert setup.ready


@pytest.mark.parametrize("override", [Override(ALL), Override(ALL, {"7/weights": b"x"})], ids=["config", "files"])
async def test_a_plain_load_undoes_an_override_and_nothing_is_left_of_it(setup: Setup, override: Override) -> None:
    setup.write(versions=("1", "2"))
    await setup.repository.load("m")
    await setup.repository.load("m", override)
    assert setup.repository.find("m", "7" if override.files else "1")
    (laid_out,) = setup.scratch.iterdir()
    assert setup.backend.made[-1].folder.path.parent == laid_out  # for as long as a worker may have to start again
    await setup.repository.load("m")
    assert [m.spec.version for m in setup.repository.loaded()] == ["2"]
    assert setup.backend.made[-1].folder.path == setup.models / "m"
    assert not list(setup.scratch.iterdir())


async def test_an_empty_config_is_one_too(setup: Setup) -> None:
    setup.write(FAILS)
    await setup.repository.load("m", Override(""))
    assert setup.repository.find("m") is setup.backend.made[0]


async def test_an_override_goes_with_the_model_and_when_it_fails(setup: Setup) -> None:
    setup.write()
    with pytest.raises(EngineLoadError, match="it is to fail"):
        await setup.repository.load("m", Override(FAILS))
    assert not list(setup.scratch.iterdir())
    await setup.repository.load("m", Override(ALL))
    assert list(setup.scratch.iterdir())
    setup.repository.unload_soon("m")
    await setup.until(lambda: not list(setup.scratch.iterdir()))
    assert (setup.models / "m" / "1").is_dir()


@pytest.mark.parametrize("name", ["", ".", "/etc/x", "../x", "1/../../x", "1/\0"])
def test_a_file_has_a_name_inside_the_models_folder(name: str) -> None:
    with pytest.raises(InvalidRequestError, match="a path inside the model's folder is"):
        Override("", {name: b""})


@pytest.mark.parametrize("files", [{"1": b"", "1/x": b""}, {"1/" + "x" * 300: b""}], ids=["both", "long"])
async def test_files_that_cannot_be_written_are_said(setup: Setup, files: dict[str, bytes]) -> None:
    setup.write()
    with pytest.raises(EngineLoadError, match="what the load request brings cannot be written"):
        await setup.repository.load("m", Override(ALL, files))
    assert not list(setup.scratch.iterdir())


async def test_a_running_export_is_not_a_change(setup: Setup) -> None:
    model = setup.write()
    await setup.repository.poll()
    (model / ".incomplete").mkdir()
    (model / ".incomplete" / "denoiser.onnx").write_bytes(b"half")
    (setup.models / "begun" / ".incomplete").mkdir(parents=True)
    await setup.repository.poll()
    assert len(setup.backend.made) == 1
    assert setup.ready
    (model / ".incomplete").rename(model / "2")
    await setup.repository.poll()
    assert [m.spec.version for m in setup.repository.loaded()] == ["2"]


async def test_polling_tries_again_only_what_has_changed(setup: Setup) -> None:
    model = setup.write(FAILS)
    await setup.repository.poll()
    await setup.repository.poll()
    assert len(setup.backend.made) == 1
    touch(model)
    await setup.repository.poll()
    assert len(setup.backend.made) == 2
    shutil.rmtree(model)
    await setup.repository.poll()
    assert setup.ready
    assert not setup.repository.index()


def test_a_mark_is_of_the_config_and_the_versions_and_of_what_is_there(tmp_path: Path) -> None:
    assert folder_mark(tmp_path / "gone") == folder_mark(tmp_path) == []
    version = tmp_path / "1"
    version.mkdir()
    (version / "gone").symlink_to(tmp_path / "gone")
    (version / "circle").symlink_to(version / "circle")
    (tmp_path / "config.pbtxt").write_text("")
    (version / "a").write_text("")
    before = folder_mark(tmp_path)
    for other in (tmp_path / "notes.txt", tmp_path / "config.draft", version / ".swap"):
        other.write_text("x")
    assert folder_mark(tmp_path) == before
    (version / "a").write_text("x")
    assert folder_mark(tmp_path) != before
