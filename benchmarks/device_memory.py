"""Device memory seen from outside the process that uses it, MiB: of the whole device, and of one process on it."""

import subprocess

import torch

from server.engines.memory import MIB


def used_mib(device: str) -> float | None:
    """What all processes together use on `device`; None on a CPU.

    The first call itself takes some, for CUDA's context in this process, and keeps it.
    """
    if not device.startswith("cuda"):
        return None
    free, total = torch.cuda.mem_get_info(torch.device(device))
    return round((total - free) / MIB, 1)


def process_mib(pid: int) -> float | None:
    """What a process has on its device according to the driver; None if it does not say, as in many containers."""
    asked = ("nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits")
    try:
        told = subprocess.run(asked, capture_output=True, text=True, check=False).stdout
    except OSError:  # no driver
        return None
    used = dict(line.split(", ", 1) for line in told.splitlines() if ", " in line).get(str(pid), "")
    return float(used) if used.strip().isdecimal() else None
