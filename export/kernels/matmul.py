"""Matrix products by the fastest of the kernels that cuBLASLt suggests for a shape, as an operator.

PyTorch takes the first suggestion. For the denoiser's products on an H200 another is 1 to 4 % faster, at a lower clock
and so for less of the power that limits the chip (docs/performance-log.md). It is found by timing them when a shape is
first met. Source of names and numbers: cublasLt.h of CUDA 13.
"""

import ctypes
import functools
import logging
import statistics
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

log = logging.getLogger(__name__)

CUBLAS_COMPUTE_32F, CUDA_R_32F, CUDA_R_16BF, CUBLAS_OP_T = 68, 0, 14, 1
CUBLASLT_MATMUL_DESC_TRANSA, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES = 3, 1
ALIGNMENT = 256  # bytes, of every matrix: what suggestions assume unless told otherwise
WORKSPACE = 32 << 20  # bytes, as torch gives it
MOST = 16  # suggestions; 5 to 8 come
ROUNDS = 4  # that each is timed in, of which the first does not count

_Pointer = ctypes.c_void_p


class _Algorithm(ctypes.Structure):
    _fields_ = [("data", ctypes.c_uint64 * 8)]


class _Suggestion(ctypes.Structure):
    _fields_ = [
        ("algorithm", _Algorithm),
        ("workspace", ctypes.c_size_t),
        ("status", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    ]


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """`x` [rows, in] times the transposed `weight` [out, in]: [rows, out], as `torch.nn.functional.linear`."""
    output: Tensor = _linear(x, weight)
    return output


@torch.library.custom_op("zserve::linear", mutates_args=())
def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight)


@_linear.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@_linear.register_kernel("cuda")
def _(x: Tensor, weight: Tensor) -> Tensor:
    product = _product(x.device, x.shape[0], *weight.shape) if _fit(x, weight) else None
    if product is None:
        return F.linear(x, weight)
    out = x.new_empty(x.shape[0], weight.shape[0])
    product(weight, x, out)
    return out


def _fit(*matrices: Tensor) -> bool:
    return all(m.dtype is torch.bfloat16 and m.is_contiguous() and not m.data_ptr() % ALIGNMENT for m in matrices)


@functools.cache
def _product(device: torch.device, rows: int, width: int, depth: int) -> "_Product | None":
    """None where there is no such library, or it has nothing for this shape."""
    try:
        return _Product(_library(), _scratch(device), rows, width, depth)
    except (OSError, RuntimeError) as error:
        log.warning("products of [%d, %d] by [%d, %d] are left to torch: %s", rows, depth, depth, width, error)
        return None


@functools.cache
def _library() -> ctypes.CDLL:
    """What torch has loaded, and a handle to it."""
    assert torch.version.cuda is not None, "there are tensors on CUDA"
    return ctypes.CDLL(f"libcublasLt.so.{torch.version.cuda.partition('.')[0]}")


@functools.cache
def _handle(library: ctypes.CDLL) -> _Pointer:
    handle = _Pointer()
    _check(library.cublasLtCreate(ctypes.byref(handle)))
    return handle


@functools.cache
def _scratch(device: torch.device) -> Tensor:
    """For all products of a device, which come one after the other; recorded calls keep using it."""
    return torch.empty(WORKSPACE, dtype=torch.uint8, device=device)


class _Product:
    """The products of one shape. cuBLASLt counts by columns: it sees out^T = weight x^T."""

    def __init__(self, library: ctypes.CDLL, scratch: Tensor, rows: int, width: int, depth: int) -> None:
        self._library, self._handle, self._scratch = library, _handle(library), scratch
        self._operation = self._made("MatmulDesc", CUBLAS_COMPUTE_32F, CUDA_R_32F)
        transposed = ctypes.c_int(CUBLAS_OP_T)
        self._set("MatmulDesc", self._operation, CUBLASLT_MATMUL_DESC_TRANSA, transposed)
        self._layouts = [
            self._made(
                "MatrixLayout", CUDA_R_16BF, ctypes.c_uint64(height), ctypes.c_uint64(count), ctypes.c_int64(height)
            )
            for height, count in ((depth, width), (depth, rows), (width, rows))
        ]
        self._suggestions = self._suggested()
        self._best: int | None = None

    def __call__(self, weight: Tensor, x: Tensor, out: Tensor) -> None:
        """Fills `out`; times the suggestions the first time, unless the call is being recorded."""
        if self._best is None and torch.cuda.is_current_stream_capturing():
            self._run(0, weight, x, out)
            return
        if self._best is None:
            self._best = fastest(
                len(self._suggestions), lambda number: _timed(lambda: self._run(number, weight, x, out))
            )
        self._run(self._best, weight, x, out)

    def _run(self, number: int, weight: Tensor, x: Tensor, out: Tensor) -> None:
        one, zero = ctypes.c_float(1), ctypes.c_float(0)
        of_weight, of_x, of_out = self._layouts
        a, b, c = (_Pointer(matrix.data_ptr()) for matrix in (weight, x, out))
        algorithm = ctypes.byref(self._suggestions[number].algorithm)
        stream = _Pointer(torch.cuda.current_stream(x.device).cuda_stream)
        _check(
            self._library.cublasLtMatmul(
                self._handle,
                self._operation,
                ctypes.byref(one),
                a,
                of_weight,
                b,
                of_x,
                ctypes.byref(zero),
                c,
                of_out,
                c,
                of_out,
                algorithm,
                _Pointer(self._scratch.data_ptr()),
                ctypes.c_size_t(WORKSPACE),
                stream,
            )
        )

    def _suggested(self) -> Sequence[_Suggestion]:
        preference = self._made("MatmulPreference")
        limit = ctypes.c_size_t(WORKSPACE)
        self._set("MatmulPreference", preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, limit)
        found, count = (_Suggestion * MOST)(), ctypes.c_int()
        of_weight, of_x, of_out = self._layouts
        _check(
            self._library.cublasLtMatmulAlgoGetHeuristic(
                self._handle,
                self._operation,
                of_weight,
                of_x,
                of_out,
                of_out,
                preference,
                MOST,
                found,
                ctypes.byref(count),
            )
        )
        good = [s for s in found[: count.value] if s.status == 0]
        if not good:
            raise RuntimeError("cuBLASLt suggests no kernel")
        return good

    def _made(self, kind: str, *arguments: Any) -> _Pointer:
        """A descriptor, which goes when this does."""
        made = _Pointer()
        _check(getattr(self._library, f"cublasLt{kind}Create")(ctypes.byref(made), *arguments))
        weakref.finalize(self, getattr(self._library, f"cublasLt{kind}Destroy"), made)
        return made

    def _set(self, kind: str, descriptor: _Pointer, attribute: int, value: Any) -> None:
        setter = getattr(self._library, f"cublasLt{kind}SetAttribute")
        _check(setter(descriptor, attribute, ctypes.byref(value), ctypes.c_size_t(ctypes.sizeof(value))))


def fastest(count: int, seconds: Callable[[int], float]) -> int:
    """The one of `count` candidates that takes the least by `seconds`: in turn, so that a drift meets all of them."""
    if count == 1:
        return 0
    taken = [[seconds(number) for number in range(count)] for _ in range(ROUNDS)][1:]
    return min(range(count), key=lambda number: statistics.median(one[number] for one in taken))


def _timed(work: Callable[[], None]) -> float:
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    began.record()
    work()
    ended.record()
    ended.synchronize()
    return float(began.elapsed_time(ended))


def _check(status: int) -> None:
    """Raises: RuntimeError, with cuBLAS' number for what went wrong."""
    if status:
        raise RuntimeError(f"cuBLASLt's status {status}")
