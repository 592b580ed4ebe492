"""What an engine's file says of how it computes: its operators, and the kernels that were compiled for it.

Nothing is read from a TensorRT plan: its inspector needs the plan opened, which needs a driver, so what its build said
about attention is in the manifest.
"""

import re
import zipfile
from collections import Counter
from pathlib import Path

from export.manifest import Backend, EngineRecord

# In the C++ that Inductor wrote around its kernels: those it fused, by name, and calls of torch's own operators.
_FUSED = re.compile(r"\bcpp_fused_\w+")
_CALLED = re.compile(r"\baoti_torch_(?:cpu|cuda)_+(\w+?)\(")


def layers(folder: Path, record: EngineRecord) -> dict[str, int]:
    """Counts of what the engine consists of, the largest first; empty if its file does not say or cannot be read."""
    try:
        match record.backend:
            case Backend.ONNXRUNTIME:
                counted = _nodes(folder / record.file)
            case Backend.AOTINDUCTOR:
                counted = _kernels(folder / record.file)
            case _:
                counted = Counter()
    except (OSError, ValueError, RuntimeError, zipfile.BadZipFile):  # `inspect` reports what is wrong beside it
        return {}
    return dict(counted.most_common())


def _nodes(path: Path) -> Counter[str]:
    """The nodes of an ONNX graph by operator; ONNX Runtime fuses more of them when it loads the graph."""
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError:  # serving does not need it
        return Counter()
    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except DecodeError as error:
        raise ValueError(str(error)) from error
    return Counter(node.op_type for node in graph.node)


def _kernels(path: Path) -> Counter[str]:
    """An AOTInductor package's fused kernels, on CUDA a file each, and its calls of torch's operators in one run."""
    with zipfile.ZipFile(path) as package:
        names = package.namelist()
        source = "".join(package.read(name).decode() for name in names if name.endswith(".wrapper.cpp"))
    fused = sum(name.endswith(".cubin") for name in names) or len(set(_FUSED.findall(source)))
    return Counter({"fused kernels": fused}) + Counter(f"calls of {name}" for name in _CALLED.findall(source))
