"""Memory given back: builds and checks take turns on the device, in two processes."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch
from torch import nn


@contextmanager
def lent(read: Callable[[], nn.Module]) -> Iterator[Callable[[], nn.Module]]:
    """`read`, for the time of the block; at its end the memory of the weights that it has read is given back.

    Also of those that something still refers to: with torch 2.13 every weight that torch.onnx or AOTInductor has seen
    stays referred to from within them, after a collection and `torch.compiler.reset()` too.
    """
    modules: list[nn.Module] = []

    def remembered() -> nn.Module:
        modules.append(read())
        return modules[-1]

    try:
        yield remembered
    finally:
        while modules:
            _release(modules.pop())
        free_memory()


def _release(module: nn.Module) -> None:
    for tensor in (*module.parameters(), *module.buffers()):
        with suppress(RuntimeError):  # what is mapped from a file cannot be resized, and takes no memory of its own
            tensor.untyped_storage().resize_(0)


def free_memory() -> None:
    """Gives back what nothing refers to any more."""
    gc.collect()  # graphs are full of cycles, which hold the weights
    torch.cuda.empty_cache()  # does nothing where CUDA is not used
