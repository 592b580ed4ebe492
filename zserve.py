"""zserve: serve Z-Image-Turbo through compiled engines.

    zserve export     compile a checkpoint into engines in a model repository
    zserve serve      serve a model repository over gRPC
    zserve generate   draw images through a running server
    zserve inspect    what a model's engines are, and whether they can be used here
    zserve parity     a model's engines against eager PyTorch, in numbers and in images
    zserve verify     build, check and time every kind of engine that this machine can run
    zserve bench      measure: components, images, the service, startup, memory; compare two records
    zserve --version  the version that is installed

Each command has its own --help. In Python: `from zserve import AsyncZImageClient, ZImageClient`.
"""

import importlib
import importlib.metadata
import os
import sys

from client import AsyncZImageClient, Drawing, GeneratedImage, GenerationFailedError, ImageRequest, ZImageClient

__all__ = [
    "AsyncZImageClient",
    "Drawing",
    "GeneratedImage",
    "GenerationFailedError",
    "ImageRequest",
    "ZImageClient",
    "main",
]

# Imported only when asked for: a client install has neither torch nor the server's libraries.
COMMANDS = {
    "export": "export.cli",
    "serve": "server.cli",
    "generate": "client.cli",
    "inspect": "verify.inspection",
    "parity": "verify.parity",
    "verify": "verify.gpu",
    "bench": "benchmarks.cli",
}
OWN = ("benchmarks", "client", "demo", "export", "protos", "server", "verify")
EXTRAS = {"serve": "server", "bench": "bench"}


def main() -> int:
    """The `zserve` command. Whoever reads its output may stop reading, as `head` does: then it ends without a word."""
    try:
        try:
            return _run()
        finally:
            print(end="", flush=True)  # here, also after argparse has printed its help, and not when Python ends
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes what is left there at its end
        return 1


def _run() -> int:
    command, arguments = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("--help", [])
    if command in ("-h", "--help"):
        print(__doc__)
        return 0
    if command == "--version":
        print(importlib.metadata.version("zserve"))
        return 0
    if command not in COMMANDS:
        print(f"zserve: no command {command!r}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    try:
        status: int = importlib.import_module(COMMANDS[command]).main(arguments)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in OWN:
            raise
        extra = EXTRAS.get(command, "export")
        print(f"zserve {command} needs {error.name}: pip install 'zserve[{extra}]'", file=sys.stderr)
        return 1
    return status


if __name__ == "__main__":
    sys.exit(main())
