"""The client's own promises, with servers that cost nothing."""

import asyncio
from pathlib import Path

import grpc
import pytest

from client import AsyncZImageClient, GenerationFailedError, ImageRequest, ZImageClient, cli
from tests.fakes import FakeImages


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


async def generate(url: str, *arguments: str) -> int:
    return await asyncio.to_thread(cli.main, [*arguments, "--url", url])


async def test_images_that_have_arrived_are_kept_when_a_later_one_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with FakeImages(3, grpc.StatusCode.UNAVAILABLE).serving() as url:
        assert await generate(url, "a cat", "--images", "4", "-o", str(tmp_path)) == 1
    assert names(tmp_path) == ["a-cat-1.png", "a-cat-2.png", "a-cat-3.png"]
    said = capsys.readouterr().err
    assert "a-cat-3.png  seed 2" in said
    assert "a cat: UNAVAILABLE: that is all" in said


async def test_an_image_that_cannot_be_saved_does_not_stop_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    async with FakeImages(1, grpc.StatusCode.UNAVAILABLE).serving() as url:
        assert await generate(url, "a", "b", "-o", str(tmp_path / "file")) == 1
    said = capsys.readouterr().err
    assert "a: [Errno" in said
    assert "b: [Errno" in said


async def test_a_second_run_leaves_the_first_ones_images(tmp_path: Path) -> None:
    async with FakeImages(1, grpc.StatusCode.UNAVAILABLE).serving() as url:
        for _ in range(2):
            await generate(url, "a cat", "-o", str(tmp_path))
    assert names(tmp_path) == ["a-cat-2.png", "a-cat.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a", "-o", "a.gif"), "files end in .png"),
        (("a", "-o", "a.png", "--format", "jpeg"), "a.png is no name for --format jpeg"),
        (("a", "b", "-o", "a.png"), "a file takes one prompt, and there are 2"),
        (("a", "--seed", "99999999999999999999999"), "seed: 99999999999999999999999 is not accepted"),
        (("a", "--timeout", "nan"), "timeout: nan is not accepted"),
        (("a", "--cert", "LICENSE"), "--cert and --key need each other"),
        (("a", "--root-cert", "/nowhere"), "No such file"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_drawn(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*arguments, "--url", "127.0.0.1:9"]) == 2
    assert message in capsys.readouterr().err


async def test_a_mark_at_the_beginning_of_a_file_is_not_of_its_first_prompt(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\n", "utf-8-sig")
    arguments = cli.parser().parse_args(["--file", str(tmp_path / "prompts.txt")])
    assert cli._prompts(arguments) == ["a cat"]


async def test_closing_a_client_ends_its_calls_as_cancelled() -> None:
    async with FakeImages(1, None).serving() as url:
        client = AsyncZImageClient(url)
        events = client.generate(ImageRequest("a cat"))
        await anext(events)
        waiting = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0)
        await client.close()
        with pytest.raises(GenerationFailedError, match="CANCELLED"):
            await waiting


def test_a_closed_client_says_so() -> None:
    client = ZImageClient("127.0.0.1:9")
    client.close()
    for call in (client.model, client.models, lambda: client.draw("a cat")):
        with pytest.raises(GenerationFailedError, match="CANCELLED: the client is closed"):
            call()


@pytest.mark.parametrize("used", [False, True])
async def test_a_closed_asyncio_client_says_so(used: bool) -> None:
    client = AsyncZImageClient("127.0.0.1:9")
    if used:
        with pytest.raises(GenerationFailedError, match="UNAVAILABLE"):
            await client.models()
    await client.close()
    for call in (client.model, client.models, lambda: client.draw("a cat")):
        with pytest.raises(GenerationFailedError, match="CANCELLED: the client is closed"):
            await call()


async def test_a_task_that_is_cancelled_stays_so() -> None:
    images = FakeImages(1, None)
    async with images.serving() as url, AsyncZImageClient(url) as client:
        drawing = asyncio.create_task(client.draw("a cat"))
        await images.asked.wait()
        drawing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await drawing


def test_a_client_may_be_made_before_the_loop_that_it_is_used_in() -> None:
    client = AsyncZImageClient("127.0.0.1:9")
    with pytest.raises(GenerationFailedError, match="UNAVAILABLE"):
        asyncio.run(client.models())


def test_the_sync_client_says_the_same_of_a_server_that_is_not_there() -> None:
    with ZImageClient("127.0.0.1:9") as client, pytest.raises(GenerationFailedError, match="UNAVAILABLE") as told:
        client.models()
    assert told.value.retry_after is None
