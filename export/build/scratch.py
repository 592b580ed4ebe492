"""Scratch memory of kernels in AOTInductor packages, for torch 2.11.

A kernel in Triton's language that makes TMA descriptors wants so many bytes for each of its programs. torch 2.11
allocates them for one program, and the others write over memory that is not theirs; torch 2.12 multiplies by the grid
(`CUDADeviceOpOverrides.cpp_scratch`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

PROGRAMS = 1024  # for so many there is room: kernels of ours that make descriptors have one a multiprocessor
FIXED = (2, 12)


@contextmanager
def scratch_for_all_programs() -> Iterator[None]:
    """Packages that are compiled in this block have scratch memory for every program."""
    if tuple(map(int, torch.__version__.split(".")[:2])) >= FIXED:
        yield
        return
    from torch._inductor.codegen.cuda.device_op_overrides import CUDADeviceOpOverrides

    for_one = CUDADeviceOpOverrides.cpp_scratch

    def for_all(self: CUDADeviceOpOverrides, idx: int, workspace: Any, prefix: str | None = None) -> Any:
        workspace.size *= PROGRAMS
        return for_one(self, idx, workspace, prefix)

    with mock.patch.object(CUDADeviceOpOverrides, "cpp_scratch", for_all):
        yield
