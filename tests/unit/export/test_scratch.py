"""Kernels in AOTInductor packages have scratch memory for all of their programs, also with torch 2.11."""

import pytest
import torch
from torch._inductor.codegen.common import TritonScratchWorkspace
from torch._inductor.codegen.cuda.device_op_overrides import CUDADeviceOpOverrides

from export.build.scratch import PROGRAMS, scratch_for_all_programs


def allocation() -> str:
    """The lines of C++ that allocate what a kernel of 640 bytes a program wants."""
    made = CUDADeviceOpOverrides().cpp_scratch(0, TritonScratchWorkspace(640, lambda: "uint8"))
    assert made is not None
    return "\n".join(made[0])


def test_with_torch_2_11_it_is_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    before = allocation()
    with scratch_for_all_programs():
        assert str(640 * PROGRAMS) in allocation()
    assert allocation() == before


def test_from_torch_2_12_on_it_is_torchs_own() -> None:
    before = allocation()
    with scratch_for_all_programs():
        assert allocation() == before
    assert "640" in before
    assert "grid_0 * grid_1 * grid_2" in before
