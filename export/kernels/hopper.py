"""Whether kernels made only for NVIDIA's Hopper GPUs (H100, H200) can be used."""

import torch

COMPUTE_CAPABILITY = (9, 0)


def is_hopper(device: torch.device) -> bool:
    """Whether `device` is a Hopper GPU."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == COMPUTE_CAPABILITY
