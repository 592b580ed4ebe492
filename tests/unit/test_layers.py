"""What `zserve inspect` reads from an engine's file about how it computes."""

import zipfile
from pathlib import Path

import pytest

from export.manifest import Backend, EngineRecord, FileRecord, Target
from export.spec import Component
from verify.layers import layers

ON_CPU = (
    "cpp_fused_add_0(x); cpp_fused_mul_1(x); cpp_fused_add_0(y); aoti_torch_cpu_mm_out(a); aoti_torch_cpu_mm_out(b)"
)
ON_CUDA = "aoti_torch_cuda_mm_out(a); aoti_torch_cuda__scaled_dot_product_cudnn_attention(q);"


def record(backend: Backend, file: str) -> EngineRecord:
    return EngineRecord(
        component=Component.DENOISER,
        backend=backend,
        files=(FileRecord(file, 1, ""),),
        built_for=(Target("cpu"),),
        built_with={},
        parity=None,
    )


@pytest.mark.parametrize(
    ("source", "cubins", "expected"),
    [
        (ON_CPU, 0, {"fused kernels": 2, "calls of mm_out": 2}),
        (ON_CUDA, 3, {"fused kernels": 3, "calls of mm_out": 1, "calls of scaled_dot_product_cudnn_attention": 1}),
        ("", 0, {}),
    ],
)
def test_a_package_tells_its_kernels_and_calls(
    source: str, cubins: int, expected: dict[str, int], tmp_path: Path
) -> None:
    with zipfile.ZipFile(tmp_path / "denoiser.pt2", "w") as package:
        package.writestr("denoiser/data/aotinductor/model/abc.wrapper.cpp", source)
        for number in range(cubins):
            package.writestr(f"denoiser/data/aotinductor/model/kernel{number}.cubin", b"")
    assert layers(tmp_path, record(Backend.AOTINDUCTOR, "denoiser.pt2")) == expected


@pytest.mark.parametrize("backend", [Backend.AOTINDUCTOR, Backend.ONNXRUNTIME, Backend.TENSORRT_RTX])
def test_a_file_that_tells_nothing_is_no_error(backend: Backend, tmp_path: Path) -> None:
    (tmp_path / "damaged").write_bytes(b"neither a zip nor a graph")
    assert layers(tmp_path, record(backend, "damaged")) == {}
    assert layers(tmp_path, record(backend, "gone")) == {}


@pytest.mark.parametrize(("offset", "what"), [(8, "flags"), (10, "method of compression")])
def test_a_package_whose_directory_is_damaged_is_no_error(offset: int, what: str, tmp_path: Path) -> None:
    path = tmp_path / "denoiser.pt2"
    with zipfile.ZipFile(path, "w") as package:
        package.writestr("denoiser/data/aotinductor/model/abc.wrapper.cpp", ON_CPU)
    damaged = bytearray(path.read_bytes())
    damaged[damaged.index(b"PK\x01\x02") + offset] = 99
    path.write_bytes(damaged)
    assert layers(tmp_path, record(Backend.AOTINDUCTOR, path.name)) == {}, what
