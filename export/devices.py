"""The device that engines are built for and run on."""

import torch

from export.errors import UnsupportedError
from export.manifest import Target


def checked_device(name: str | None) -> str:
    """The device that `--device` asks for; None: CUDA where there is one, else the CPU.

    Raises:
        UnsupportedError: it is not on this machine; the message says what is.
    """
    if name is None:
        return default_device()
    numbers = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    accepted = ["cpu", *(["cuda"] if numbers else []), *(f"cuda:{number}" for number in numbers)]
    if name not in accepted:
        none = "" if numbers else " (this PyTorch sees no CUDA device)"
        raise UnsupportedError(f"--device {name} is not on this machine; {', '.join(accepted)} is accepted{none}")
    return name


def use_device(device: str) -> None:
    """Makes `device` the one that "cuda" means in this process: builders and loaders of engines use that one."""
    if torch.device(device).index is not None:
        torch.cuda.set_device(device)


def current_target(device: str) -> Target:
    """`device` ("cpu", "cuda" or "cuda:1") as engines record it."""
    kind = torch.device(device)
    if kind.type != "cuda":
        return Target(kind.type)
    major, minor = torch.cuda.get_device_capability(kind)
    return Target("cuda", f"{major}.{minor}", torch.cuda.get_device_name(kind))


def default_device() -> str:
    """CUDA where there is one, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"
