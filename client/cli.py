"""`zserve generate`: draw images through a running server."""

import argparse
import asyncio
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc

from client.calls import DEFAULT_URL, AsyncZImageClient
from client.messages import FORMATS, GeneratedImage, GenerationFailedError, ImageRequest, write_file
from client.names import ENDINGS, is_file, output_paths
from client.progress import StepBar

STATUSES = """exit status: 0 everything is drawn; 1 a prompt failed; 2 bad arguments, or a file that cannot be read;
130 interrupted"""
EXTENSIONS = {"png": "png", "jpeg": "jpg", "webp": "webp", "raw": "png"}


@dataclass(frozen=True)
class Job:
    """One prompt and where its images go."""

    number: int
    request: ImageRequest
    paths: list[Path]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="zserve generate", description=__doc__, epilog=STATUSES)
    p.add_argument("prompt", nargs="*", help="what to draw; several may be given")
    p.add_argument("-f", "--file", help="read one prompt a line from this file; - for standard input")
    p.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("out"),
        help="a file for one prompt, replaced if it is there; or a folder for files named after their prompts, beside "
        "those that are there (default: %(default)s)",
    )
    p.add_argument("--url", default=DEFAULT_URL, help="the server's HOST:PORT (default: %(default)s)")
    p.add_argument("--tls", action="store_true", help="the server has TLS; --root-cert and --cert imply it")
    p.add_argument("--root-cert", type=Path, metavar="FILE", help="PEM, by which to know the server (default: gRPC's)")
    p.add_argument("--cert", type=Path, metavar="FILE", help="PEM, this client's certificate, with --key")
    p.add_argument("--key", type=Path, metavar="FILE", help="PEM, the certificate's private key")
    p.add_argument("--token-file", type=Path, metavar="FILE", help="its text is sent as authorization: Bearer")
    p.add_argument(
        "--header", type=_header, action="append", default=[], metavar="NAME:VALUE", help="sent with every call"
    )
    p.add_argument("--model", default="", help="which model, where the server has several")
    p.add_argument("--negative-prompt", default="", help="what to avoid; ignored unless --guidance is above 0")
    p.add_argument("--size", type=_size, default=(None, None), help="WIDTHxHEIGHT (default: the model's)")
    p.add_argument("--steps", type=_natural, help="denoiser forwards (default: the model's)")
    p.add_argument("--guidance", type=float, help="guidance scale (default: the model's)")
    p.add_argument(
        "--seed",
        type=_natural,
        help="0 to 2^63 - 1, also with --images - 1 added; the same seed draws the same image (default: a new one)",
    )
    p.add_argument("--images", type=_natural, default=1, help="images a prompt, with consecutive seeds (default: 1)")
    p.add_argument("--format", choices=list(FORMATS), help="default: by the output's ending, else png")
    p.add_argument("--quality", type=_natural, default=90, help="1 to 100, of jpeg and webp (default: %(default)s)")
    p.add_argument(
        "--previews",
        type=_natural,
        default=0,
        metavar="K",
        help="also save a small preview every K steps, but not of the last, as NAME.stepNN.jpg beside the image",
    )
    p.add_argument("--priority", type=_natural, default=0, help="1 is the highest (default: the model's)")
    p.add_argument("--truncate", action="store_true", help="cut prompts past 512 tokens instead of refusing them")
    p.add_argument("--concurrency", type=_positive, default=4, help="requests at a time (default: %(default)s)")
    p.add_argument("--timeout", type=float, help="seconds for each request (default: none)")
    return p


def main(argv: Sequence[str]) -> int:
    """Draws everything; returns the exit status."""
    arguments = parser().parse_args(argv)
    try:
        jobs = _jobs(arguments, _prompts(arguments))
        return asyncio.run(_draw_all(jobs, _client(arguments), arguments))
    except (OSError, ValueError) as error:
        print(f"zserve generate: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("zserve generate: interrupted; what was not finished is cancelled", file=sys.stderr)
        return 130


def _prompts(arguments: argparse.Namespace) -> list[str]:
    prompts: list[str] = list(arguments.prompt)
    if not all(p.strip() for p in prompts):
        raise ValueError("an empty prompt is not accepted")
    if arguments.file == "-":
        prompts += sys.stdin.read().removeprefix("\ufeff").splitlines()
    elif arguments.file:
        prompts += Path(arguments.file).read_text("utf-8-sig").splitlines()  # editors put a BOM before the first line
    prompts = [p for p in prompts if p.strip()]
    if not prompts:
        raise ValueError("no prompt; give one as an argument, or a file of them with --file")
    return prompts


def _jobs(arguments: argparse.Namespace, prompts: list[str]) -> list[Job]:
    image_format = _format(arguments)
    paths = output_paths(prompts, arguments.output, EXTENSIONS[image_format], arguments.images)
    width, height = arguments.size
    jobs = [
        Job(
            number,
            ImageRequest(
                prompt=prompt,
                model=arguments.model,
                negative_prompt=arguments.negative_prompt,
                width=width,
                height=height,
                num_inference_steps=arguments.steps,
                guidance_scale=arguments.guidance,
                seed=arguments.seed,
                num_images=arguments.images,
                image_format=image_format,
                quality=arguments.quality,
                preview_interval=arguments.previews,
                priority=arguments.priority,
                truncate=arguments.truncate,
            ),
            where,
        )
        for number, (prompt, where) in enumerate(zip(prompts, paths, strict=True))
    ]
    for job in jobs:
        job.request.to_message()  # what cannot be sent is refused before anything is sent
    return jobs


def _client(arguments: argparse.Namespace) -> AsyncZImageClient:
    root, key, certificate = (f and f.read_bytes() for f in (arguments.root_cert, arguments.key, arguments.cert))
    if (key is None) is not (certificate is None):
        raise ValueError("--cert and --key need each other")
    secure = arguments.tls or root or certificate
    metadata = list(arguments.header)
    if arguments.token_file:
        metadata.append(("authorization", f"Bearer {arguments.token_file.read_text('utf-8').strip()}"))
    return AsyncZImageClient(
        arguments.url,
        timeout=arguments.timeout,
        credentials=grpc.ssl_channel_credentials(root, key, certificate) if secure else None,
        metadata=metadata,
    )


async def _draw_all(jobs: list[Job], client: AsyncZImageClient, arguments: argparse.Namespace) -> int:
    bar = StepBar(images=len(jobs) * arguments.images)
    turn = asyncio.Semaphore(arguments.concurrency)

    async def draw(job: Job) -> bool:
        async with turn:
            return await _draw(client, job, bar)

    try:
        async with client:
            succeeded = await asyncio.gather(*(draw(job) for job in jobs))
    finally:
        bar.close()
    return 0 if all(succeeded) else 1


async def _draw(client: AsyncZImageClient, job: Job, bar: StepBar) -> bool:
    """Draws one prompt and saves each image as it comes; a failure is reported and does not stop the others."""
    began = time.monotonic()
    try:
        async for event in client.generate(job.request):
            bar.see(job.number, event)
            match event.WhichOneof("event"):
                case "preview":
                    path = job.paths[event.preview.image_index]
                    write_file(path.with_suffix(f".step{event.preview.step:02}.jpg"), event.preview.data)
                case "image":
                    path = job.paths[event.image.index]
                    GeneratedImage.from_message(event.image).save(path)
                    milliseconds = 1e3 * (time.monotonic() - began)
                    bar.message(f"{path}  seed {event.image.seed}  {milliseconds:.0f} ms")
    except (GenerationFailedError, OSError) as error:
        bar.message(f"{job.request.prompt[:60]}: {error}")
        return False
    return True


def _format(arguments: argparse.Namespace) -> str:
    """The format to ask for: --format, which has to fit the output file's ending, or the one of that ending."""
    ending = ENDINGS.get(arguments.output.suffix.lower()) if is_file(arguments.output) else None
    said: str | None = arguments.format
    if said not in (None, "raw") and ending not in (None, said):
        raise ValueError(f"{arguments.output} is no name for --format {said}")
    return said or ending or "png"


def _header(text: str) -> tuple[str, str]:
    name, colon, value = text.partition(":")
    if not (colon and re.fullmatch(r"[0-9a-z_.-]+", name.lower())):
        raise argparse.ArgumentTypeError(f"{text!r}: NAME:VALUE is accepted")
    return name.lower(), value.strip()


def _natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: a whole number from 0 on is accepted")
    return int(text)


def _positive(text: str) -> int:
    if not _natural(text):
        raise argparse.ArgumentTypeError(f"{text!r}: a whole number above 0 is accepted")
    return int(text)


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r}: WIDTHxHEIGHT is accepted, for example 1024x768")
    return int(match[1]), int(match[2])
