"""Corrects errors in the C++ that AOTInductor generates, while a package is compiled.

Scratch memory, in torch 2.11: a Triton kernel that makes TMA descriptors needs scratch memory for each of its programs.
It is allocated for one program, and the others overwrite memory that is not theirs; torch 2.12 multiplies by the grid
(`CUDADeviceOpOverrides.cpp_scratch`).

Shapes and strides, in torch 2.11 to 2.13: an array of them is declared once for all uses in the same buffer of code,
and buffers are told apart by the addresses of Python objects, some of which have been freed by then. A new buffer at
a freed one's address gets a name without a declaration, and the package does not compile (`int_array_54 was not
declared`); which programs are affected depends on where the objects lie.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch

PROGRAMS = 1024  # that get scratch memory; our kernels that make descriptors run one per multiprocessor
SCRATCH_FIXED = (2, 12)


@contextmanager
def corrected_code() -> Iterator[None]:
    """Packages compiled in this block have scratch memory for every program, and all arrays declared."""
    with ExitStack() as stack:
        stack.enter_context(_all_arrays_declared())
        if tuple(map(int, torch.__version__.split(".")[:2])) < SCRATCH_FIXED:
            stack.enter_context(_scratch_for_all_programs())
        yield


@contextmanager
def _scratch_for_all_programs() -> Iterator[None]:
    from torch._inductor.codegen.cuda.device_op_overrides import CUDADeviceOpOverrides

    for_one = CUDADeviceOpOverrides.cpp_scratch

    def for_all(self: CUDADeviceOpOverrides, idx: int, workspace: Any, prefix: str | None = None) -> Any:
        workspace.size *= PROGRAMS
        return for_one(self, idx, workspace, prefix)

    with mock.patch.object(CUDADeviceOpOverrides, "cpp_scratch", for_all):
        yield


@contextmanager
def _all_arrays_declared() -> Iterator[None]:
    from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu

    name_of = CppWrapperCpu.codegen_int_array_var
    kept: dict[int, Callable[..., None]] = {}  # by buffer address, which is not reused while kept here

    def name_in_a_buffer_that_stays(
        self: CppWrapperCpu, int_array: str, writeline: Callable[..., None], *others: Any, **named: Any
    ) -> str:
        buffer = getattr(writeline, "__self__", writeline)
        return name_of(self, int_array, kept.setdefault(id(buffer), writeline), *others, **named)

    with mock.patch.object(CppWrapperCpu, "codegen_int_array_var", name_in_a_buffer_that_stays):
        yield
