"""AOTInductor's generated code has what it lacks: scratch memory for all programs, and a declaration of every array."""

from itertools import count
from typing import Any

import pytest
import torch
from torch._inductor.codegen.common import TritonScratchWorkspace
from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu
from torch._inductor.codegen.cuda.device_op_overrides import CUDADeviceOpOverrides
from torch._inductor.utils import IndentedBuffer
from torch.utils._ordered_set import OrderedSet

from export.build.corrections import PROGRAMS, corrected_code


def allocation() -> str:
    """The lines of C++ that allocate what a kernel of 640 bytes a program wants."""
    made = CUDADeviceOpOverrides().cpp_scratch(0, TritonScratchWorkspace(640, lambda: "uint8"))
    assert made is not None
    return "\n".join(made[0])


def test_with_torch_2_11_scratch_memory_is_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    before = allocation()
    with corrected_code():
        assert str(640 * PROGRAMS) in allocation()
    assert allocation() == before


def test_from_torch_2_12_on_scratch_memory_is_torchs_own() -> None:
    before = allocation()
    with corrected_code():
        assert allocation() == before
    assert "640" in before
    assert "grid_0 * grid_1 * grid_2" in before


@pytest.fixture
def wrapper() -> Any:
    """What writes the C++ around the kernels, as far as it names arrays."""
    made: Any = CppWrapperCpu.__new__(CppWrapperCpu)
    made.int_array_id, made.declared_int_array_vars, made.codegen_int_array_var_cache = count(), OrderedSet([]), {}
    return made


def undeclared(wrapper: Any) -> int:
    """In how many of 64 buffers, each gone before the next, the name of an array is given and not declared."""
    missing = 0
    for _ in range(64):
        buffer = IndentedBuffer()
        name = wrapper.codegen_int_array_var("{2, 3}", buffer.writeline)
        missing += f"{name}[] = {{2, 3}};" not in buffer.getvalue()
        del buffer
    return missing


def test_an_array_is_declared_in_every_buffer_that_names_it(wrapper: Any) -> None:
    with corrected_code():
        assert undeclared(wrapper) == 0
    wrapper.codegen_int_array_var_cache.clear()
    assert undeclared(wrapper) > 0, "torch does it now: the correction can go"


def test_an_array_is_declared_once_a_buffer(wrapper: Any) -> None:
    buffer = IndentedBuffer()
    with corrected_code():
        names = {wrapper.codegen_int_array_var("{2, 3}", buffer.writeline, known_statically=True) for _ in range(9)}
    assert len(names) == 1
    assert buffer.getvalue().count("{2, 3}") == 1
