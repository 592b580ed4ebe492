"""Names, progress and requests of the client."""

import io
import re
import tomllib
from itertools import permutations
from pathlib import Path

import pytest
from PIL import Image

from client import AsyncZImageClient, GeneratedImage, ZImageClient, cli
from client.messages import Drawing, ImageRequest, write_file
from client.names import output_paths, slug
from client.progress import StepBar
from protos.zserve.v1 import image_generation_pb2 as pb


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("A red circle, on white!", "a-red-circle-on-white"),
        ("红色背景上，一个蓝色圆形", "红色背景上-一个蓝色圆形"),
        ("../../etc/passwd", "etc-passwd"),
        ("?!", "image"),
        ("x" * 200, "x" * 60),
        ("हिन्दी में", "हिन्दी-में"),
    ],
)
def test_a_prompt_becomes_a_file_name(prompt: str, name: str) -> None:
    assert slug(prompt) == name


def test_outputs_are_files_or_folders() -> None:
    assert output_paths(["a"], Path("x.png"), "png", 1) == [[Path("x.png")]]
    assert output_paths(["a"], Path("x.png"), "png", 2) == [[Path("x-1.png"), Path("x-2.png")]]
    assert output_paths(["a", "a", "b"], Path("out"), "jpg", 1) == [
        [Path("out/a.jpg")],
        [Path("out/a-2.jpg")],
        [Path("out/b.jpg")],
    ]


def test_nothing_that_is_there_is_overwritten_by_a_name_that_was_made(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    (tmp_path / "b-2.png").touch()
    assert output_paths(["a", "a"], tmp_path, "png", 1) == [[tmp_path / "a-2.png"], [tmp_path / "a-3.png"]]
    assert output_paths(["b"], tmp_path, "png", 2) == [[tmp_path / "b-2-1.png", tmp_path / "b-2-2.png"]]


@pytest.mark.parametrize("prompts", list(permutations(["cat", "cat", "cat 2"])))
@pytest.mark.parametrize("count", [1, 2])
def test_no_two_images_of_a_run_have_one_name(prompts: tuple[str, ...], count: int) -> None:
    paths = [path for each in output_paths(list(prompts), Path("out"), "png", count) for path in each]
    assert len(set(paths)) == 3 * count


def test_a_folder_may_have_a_dot_if_it_is_there(tmp_path: Path) -> None:
    (folder := tmp_path / "v1.0").mkdir()
    assert output_paths(["a"], folder, "png", 1) == [[folder / "a.png"]]


@pytest.mark.parametrize(
    ("prompts", "output", "message"),
    [
        (["a"], "x.gif", r"x\.gif: files end in \.png, \.jpg"),
        (["a"], "v1.1", "a folder with a dot has to be there already"),
        (["a", "b"], "x.png", "a file takes one prompt, and there are 2"),
    ],
)
def test_an_output_that_cannot_be_is_refused(prompts: list[str], output: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        output_paths(prompts, Path(output), "png", 1)


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "x.png"
    write_file(path, b"before")

    def fill_the_disk(partial: Path, data: bytes) -> None:
        with partial.open("wb") as file:
            file.write(data[:3])
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_bytes", fill_the_disk)
    with pytest.raises(OSError, match="no space"):
        write_file(path, b"after")
    assert path.read_bytes() == b"before"
    assert list(path.parent.iterdir()) == [path]


def test_raw_pixels_are_saved_in_the_format_of_the_ending(tmp_path: Path) -> None:
    image = GeneratedImage(bytes(range(12)), "raw", width=2, height=2, seed=7, index=0)
    image.save(tmp_path / "x.PNG")
    with Image.open(tmp_path / "x.PNG") as saved:
        assert (saved.format, saved.tobytes()) == ("PNG", image.data)
    with pytest.raises(ValueError, match="no ending of an image file"):
        image.save(tmp_path / "x.raw")


def test_an_image_is_shown_without_its_bytes() -> None:
    image = GeneratedImage(b"12", "raw", width=2, height=2, seed=7, index=0)
    assert repr(image) == "GeneratedImage(format='raw', width=2, height=2, seed=7, index=0)"


def test_images_are_in_the_order_of_their_seeds_whichever_is_done_first() -> None:
    done = [pb.GenerateEvent(image=pb.Image(index=i, seed=7 + i, format=pb.IMAGE_FORMAT_PNG)) for i in (2, 0, 1)]
    assert [image.seed for image in Drawing.from_events(done).images] == [7, 8, 9]


def test_a_request_sends_only_what_was_said() -> None:
    message = ImageRequest("a cat", width=512, seed=0).to_message()
    assert message.HasField("width")
    assert message.HasField("seed")
    assert not message.HasField("height")
    assert not message.HasField("guidance_scale")


def test_a_request_sends_all_that_was_said() -> None:
    said = {
        "prompt": "a cat", "model": "m", "negative_prompt": "a dog", "width": 512, "height": 256, "seed": 2**63 - 1,
        "num_inference_steps": 4, "guidance_scale": 2.0, "num_images": 2, "quality": 80, "preview_interval": 3,
        "priority": 2**32 - 1, "request_id": "r",
    }  # fmt: skip
    message = ImageRequest(**said, image_format="webp", truncate=True).to_message()  # type: ignore[arg-type]
    wanted = pb.GenerateRequest(
        **said,  # type: ignore[arg-type]
        image_format=pb.IMAGE_FORMAT_WEBP,
        long_prompt=pb.LONG_PROMPT_TRUNCATE,
    )
    assert message == wanted
    plain = ImageRequest("a cat").to_message()
    assert (plain.num_images, plain.quality, plain.image_format) == (1, 90, pb.IMAGE_FORMAT_PNG)
    assert plain.long_prompt == pb.LONG_PROMPT_REFUSE


def test_an_image_of_the_server_is_saved_as_it_came_and_shown_in_colours(tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.new("L", (2, 1)).save(file, "PNG")
    image = GeneratedImage(file.getvalue(), "png", width=2, height=1, seed=7, index=0)
    image.save(tmp_path / "x.jpg")
    assert (tmp_path / "x.jpg").read_bytes() == file.getvalue()
    assert (image.pillow().mode, image.pillow().size) == ("RGB", (2, 1))


def test_raw_pixels_are_rows_from_the_top() -> None:
    raw = GeneratedImage(bytes(range(18)), "raw", width=3, height=2, seed=7, index=0)
    assert (raw.pillow().size, raw.pillow().getpixel((0, 1))) == ((3, 2), (9, 10, 11))


@pytest.mark.parametrize(
    "bad",
    [
        {"seed": -1},
        {"seed": 2**63},
        {"image_format": "gif"},
        {"num_images": -2},
        {"num_inference_steps": 2**32},
        {"preview_interval": -1},
        {"negative_prompt": "caf\udce9"},
        {"prompt": None},
        {"model": 7},
        {"request_id": b"r"},
        {"seed": 1.5},
        {"width": "512"},
        {"guidance_scale": "2"},
    ],
)
def test_what_the_wire_cannot_carry_is_refused_before(bad: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=rf"^{next(iter(bad))}: .*not accepted"):
        ImageRequest(**{"prompt": "a cat", **bad}).to_message()  # type: ignore[arg-type]


@pytest.mark.parametrize("client", [ZImageClient, AsyncZImageClient])
@pytest.mark.parametrize("timeout", [0.0, -1.0, float("nan"), float("inf"), 1e10])
def test_a_timeout_that_grpc_would_take_for_one_that_has_passed_is_refused(
    client: type[ZImageClient | AsyncZImageClient], timeout: float
) -> None:
    with pytest.raises(ValueError, match=r"timeout: .* is not accepted"):
        client(timeout=timeout)


@pytest.mark.parametrize("client", [ZImageClient, AsyncZImageClient])
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x-trace-bin", "s3cret", "the value of x-trace-bin is not accepted; bytes are"),
        ("authorization", "Bearer s3cret\nand another", "the value of authorization is not accepted; a line of print"),
        ("x-user", "s3crét", "the value of x-user is not accepted; a line of print"),
        ("X-User", "s3cret", "the name 'X-User' is not accepted; small letters"),
    ],
)
def test_metadata_that_grpc_would_refuse_at_every_call_is_refused_at_once_and_kept_secret(
    client: type[ZImageClient | AsyncZImageClient], name: str, value: str, message: str
) -> None:
    with pytest.raises(ValueError, match=f"^metadata: {message}") as refused:
        client(metadata=[(name, value)])
    assert "s3cr" not in str(refused.value)


def test_metadata_that_grpc_takes_is_accepted() -> None:
    ZImageClient(metadata=[("x-user", "a b~"), ("x-trace-bin", b"\xff")]).close()


def test_a_token_file_of_several_lines_is_a_bad_argument(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tokens := tmp_path / "tokens").write_text("abc\nabd\n")
    assert cli.main(["a cat", "-o", str(tmp_path / "x.png"), "--token-file", str(tokens)]) == 2
    assert "the value of authorization is not accepted; a line of printable ASCII is" in capsys.readouterr().err


def test_a_client_is_not_installed_with_libraries_that_its_generated_code_refuses() -> None:
    protos = Path("protos/zserve/v1")
    made = {
        "grpcio": re.search(r"GENERATED_VERSION = '([\d.]+)'", (protos / "image_generation_pb2_grpc.py").read_text()),
        "protobuf": re.search(
            r"Domain\.PUBLIC,\s+(\d+),\s+(\d+),\s+(\d+)", (protos / "image_generation_pb2.py").read_text()
        ),
    }
    wanted = tomllib.loads(Path("pyproject.toml").read_text())["project"]["dependencies"]
    for library, match in made.items():
        assert match is not None
        assert any(one.startswith(f"{library}>={'.'.join(match.groups())}") for one in wanted), library


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar_counts_steps_and_images() -> None:
    screen = Terminal()
    bar = StepBar(images=2, stream=screen)
    bar.see(0, pb.GenerateEvent(progress=pb.Progress(step=4, of=8)))
    bar.see(1, pb.GenerateEvent(image=pb.Image()))
    assert "step 4/16  image 1/2" in bar.line()
    assert "step 4/16" in screen.getvalue()


def test_the_bar_is_no_longer_than_a_line_of_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    screen = Terminal()
    StepBar(images=200, stream=screen).see(0, pb.GenerateEvent(progress=pb.Progress(step=4, of=8)))
    assert len(screen.getvalue().removeprefix("\r\033[K")) == 39


def test_the_bar_leaves_it_to_the_server_to_refuse_no_images() -> None:
    assert "image 0/0" in StepBar(images=0, stream=Terminal()).line()


def test_the_bar_is_silent_off_a_terminal() -> None:
    stream = io.StringIO()
    bar = StepBar(images=1, stream=stream)
    bar.see(0, pb.GenerateEvent(progress=pb.Progress(step=4, of=8)))
    bar.close()
    assert stream.getvalue() == ""
