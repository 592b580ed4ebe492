"""Memory given back: builds and checks take turns on the device, in two processes."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch
from torch import nn


@contextmanager
def released_afterwards(read: Callable[[], nn.Module]) -> Iterator[Callable[[], nn.Module]]:
    """Yields `read`; when the block ends, frees the weights it read, even if torch still refers to them.

    With torch 2.13 every weight that torch.onnx or AOTInductor has seen stays referred to from within them, after a
    collection and `torch.compiler.reset()` too.
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
