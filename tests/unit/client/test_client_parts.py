"""Names, progress and requests of the client."""

import io
from pathlib import Path

import pytest

from client.messages import ImageRequest
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


def test_a_request_sends_only_what_was_said() -> None:
    message = ImageRequest("a cat", width=512, seed=0).to_message()
    assert message.HasField("width")
    assert message.HasField("seed")
    assert not message.HasField("height")
    assert not message.HasField("guidance_scale")


@pytest.mark.parametrize("bad", [{"seed": -1}, {"image_format": "gif"}, {"num_images": -2}])
def test_what_the_wire_cannot_carry_is_refused_before(bad: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="is not accepted"):
        ImageRequest("a cat", **bad).to_message()  # type: ignore[arg-type]


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


def test_the_bar_leaves_it_to_the_server_to_refuse_no_images() -> None:
    assert "image 0/0" in StepBar(images=0, stream=Terminal()).line()


def test_the_bar_is_silent_off_a_terminal() -> None:
    stream = io.StringIO()
    bar = StepBar(images=1, stream=stream)
    bar.see(0, pb.GenerateEvent(progress=pb.Progress(step=4, of=8)))
    bar.close()
    assert stream.getvalue() == ""
