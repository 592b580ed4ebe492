"""The device that engines are built for and run on."""

import torch

from export.manifest import Target


def current_target(device: str) -> Target:
    """`device` ("cpu", "cuda" or "cuda:1") as engines record it."""
    kind = torch.device(device)
    if kind.type != "cuda":
        return Target(kind.type)
    major, minor = torch.cuda.get_device_capability(kind)
    return Target("cuda", f"{major}.{minor}")


def default_device() -> str:
    """CUDA where there is one, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"
