"""The whole of zserve in one command: export, serve, draw, show. `make demo` runs it.

Exports the demo checkpoint (valid engines are reused), starts the server, waits until it is warm, sends prompts in
English, Chinese and both through the real client, several at once, and writes the images, a contact sheet and a table.
"""

import asyncio
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from PIL import Image, ImageDraw, ImageFont

from client import AsyncZImageClient, Drawing
from client.names import slug
from client.progress import StepBar

ROOT = Path(__file__).parent.parent
OUT = ROOT / "out" / "demo"
ZSERVE = (sys.executable, "-m", "zserve")
MODEL = "z-image-demo"
SEED = 2026
AT_ONCE = 4
READY_SECONDS = 300
CELL, CAPTION, COLUMNS = 256, 40, 4  # pixels, pixels, cells


@dataclass(frozen=True)
class Picture:
    """What to draw, and how large: pixels, and denoiser steps."""

    prompt: str
    width: int = 256
    height: int = 256
    steps: int = 8


PICTURES = (
    Picture("a red circle on a white background"),
    Picture("a large yellow star on a purple to black gradient background"),
    Picture("a purple triangle to the left of an orange square on a white background"),
    Picture("红色背景上，一个大大的黄色“福”字", 512, 512),
    Picture("three green hearts on a yellow background"),
    Picture("蓝色背景上，从左到右是黄色圆形、白色月牙和粉色星形"),
    Picture("绿色和青色的条纹背景上，四个白色星形, flat design"),
    Picture("a large white Chinese character 春，蓝色背景", 1024, 1024, steps=4),
)


@dataclass(frozen=True)
class Drawn:
    """One picture, and the server's account of it."""

    picture: Picture
    drawing: Drawing

    @property
    def image(self) -> Image.Image:
        return self.drawing.images[0].pillow()


def main() -> int:
    """Runs the demo; returns the exit status."""
    began = time.monotonic()
    export = ("export", "--checkpoint", "demo/checkpoint", "--name", MODEL, "--default-size", "256x256")
    subprocess.run([*ZSERVE, *export], cwd=ROOT, check=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the server is not left behind
    try:
        drawn = asyncio.run(serve_and_draw(f"127.0.0.1:{free_port()}"))
    except KeyboardInterrupt:
        return 130
    OUT.mkdir(parents=True, exist_ok=True)
    for one in drawn:
        one.drawing.images[0].save(OUT / f"{slug(one.picture.prompt)}.png")
    contact_sheet(drawn).save(OUT / "contact-sheet.png")
    print(table(drawn))
    print(f"{len(drawn)} images and contact-sheet.png in {OUT}; {time.monotonic() - began:.1f} s in all")
    return 0


def free_port() -> int:
    """A port nothing listens on; the usual 8001 may be taken."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def serve_and_draw(url: str) -> list[Drawn]:
    """Starts a server of the demo's model alone on `url`, draws all prompts and stops it cleanly."""
    print("starting the server ...", flush=True)
    host, _, port = url.rpartition(":")
    ports = ("--grpc-address", host, "--grpc-port", port, "--metrics-address", host, "--metrics-port", "0")
    only = ("--model-control-mode", "explicit", "--load-model", MODEL)  # whatever else models/ has
    process = await asyncio.create_subprocess_exec(*ZSERVE, "serve", *ports, *only, cwd=ROOT)
    try:
        await until_ready(url, process)
        return await draw_all(url)
    finally:
        if process.returncode is None:
            process.terminate()
        if await process.wait() != 0:
            raise SystemExit("the server did not end well; its log above says why")
        print("the server stopped cleanly")


async def until_ready(url: str, process: asyncio.subprocess.Process) -> None:
    """Returns when gRPC health says that the server serves, which it does once it is warmed.

    Raises:
        SystemExit: the server ended, or was not ready in time.
    """
    ended, serving = asyncio.create_task(process.wait()), asyncio.create_task(_serving(url))
    await asyncio.wait({ended, serving}, timeout=READY_SECONDS, return_when=asyncio.FIRST_COMPLETED)
    ready = serving.done() and serving.exception() is None
    for task in (ended, serving):
        task.cancel()
    if not ready:
        how = "ended" if process.returncode is not None else f"was not ready within {READY_SECONDS} s"
        raise SystemExit(f"the server {how}; its log above says why")


async def _serving(url: str) -> None:
    async with grpc.aio.insecure_channel(url) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        async for answer in stub.Watch(health_pb2.HealthCheckRequest(), wait_for_ready=True):
            if answer.status == health_pb2.HealthCheckResponse.SERVING:
                return


async def draw_all(url: str) -> list[Drawn]:
    """Draws all pictures, several at a time, with live progress."""
    bar = StepBar(images=len(PICTURES))
    turn = asyncio.Semaphore(AT_ONCE)
    async with AsyncZImageClient(url) as client:

        async def draw(number: int, picture: Picture) -> Drawn:
            async with turn:
                drawing = await client.draw(
                    picture.prompt,
                    on_event=partial(bar.see, number),
                    model=MODEL,
                    seed=SEED + number,
                    width=picture.width,
                    height=picture.height,
                    num_inference_steps=picture.steps,
                )
            return Drawn(picture, drawing)

        drawn = await asyncio.gather(*(draw(number, picture) for number, picture in enumerate(PICTURES)))
    bar.close()
    return list(drawn)


def table(drawn: list[Drawn]) -> str:
    """One line an image: milliseconds by stage, engines, seed, prompt."""
    times = f"{'queue':>7}{'encode':>8}{'denoise':>9}{'decode':>8}{'total':>8}"
    head = f"{times}  {'engines':<38}{'seed':>6}  {'size':<11}prompt"
    return "\n".join([head, *(row(one) for one in drawn)])


def row(one: Drawn) -> str:
    """The table's line of one image."""
    completed, image = one.drawing.completed, one.drawing.images[0]
    t, size = completed.timings, f"{image.width}x{image.height}"
    times = f"{t.queue_ms:7.0f}{t.encode_ms:8.1f}{t.denoise_ms:9.0f}{t.decode_ms:8.0f}{t.total_ms:8.0f}"
    engines = " ".join(f"{e.backend}{'(!)' if e.fallback_reason else ''}" for e in completed.engines)
    return f"{times}  {engines:<38}{image.seed:6}  {size:<11}{one.picture.prompt}"


def contact_sheet(drawn: list[Drawn]) -> Image.Image:
    """All images with their prompts underneath."""
    rows = -(-len(drawn) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * CELL, rows * (CELL + CAPTION)), "white")
    pen, font = ImageDraw.Draw(sheet), chinese_font()
    for number, one in enumerate(drawn):
        x, y = number % COLUMNS * CELL, number // COLUMNS * (CELL + CAPTION)
        image = one.image
        image.thumbnail((CELL - 8, CELL - 8))
        sheet.paste(image, (x + (CELL - image.width) // 2, y + (CELL - image.height) // 2))
        text = (
            wrapped(one.picture.prompt) if font or one.picture.prompt.isascii() else f"line {number + 1} of the table"
        )
        pen.multiline_text((x + 6, y + CELL), text, fill="black", font=font or ImageFont.load_default(13), spacing=2)
    return sheet


def chinese_font() -> ImageFont.FreeTypeFont | None:
    """A font with Chinese glyphs, where the machine has one."""
    for name in ("NotoSansCJK-Regular.ttc", "wqy-zenhei.ttc", "PingFang.ttc", "msyh.ttc"):
        try:
            return ImageFont.truetype(name, 13)
        except OSError:
            continue
    return None


def wrapped(prompt: str, width: int = 38) -> str:
    """The prompt in lines of `width`; a Chinese character counts for two and may end a line."""
    lines, room = [""], width
    for piece in re.findall(r"[\u2e80-\uffef]|[^\s\u2e80-\uffef]+|\s+", prompt):
        needed = 2 * len(piece) if piece > "\u2e80" else len(piece)
        if needed > room:
            lines.append("")
            room = width
        lines[-1] += piece
        room -= needed
    return "\n".join(line.strip() for line in lines)


if __name__ == "__main__":
    sys.exit(main())
