"""What an engine's file says of how it computes: its operators, and the kernels that were compiled for it.

Of a TensorRT plan nothing is told here: its inspector needs the plan opened, and that a driver, so what its build told
of attention is in the manifest.
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
    """How many of what the engine has, the most first; empty where its file does not tell, or is not readable."""
    try:
        match record.backend:
            case Backend.ONNXRUNTIME:
                counted = _nodes(folder / record.file)
            case Backend.AOTINDUCTOR:
                counted = _kernels(folder / record.file)
            case _:
                counted = Counter()
    except (OSError, ValueError, zipfile.BadZipFile):  # what is wrong with the file is told beside it
        return {}
    return dict(counted.most_common())


def _nodes(path: Path) -> Counter[str]:
    """Of an ONNX graph, by operator; ONNX Runtime fuses some more of them when it loads it."""
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError:  # to serve, it is not needed
        return Counter()
    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except DecodeError as error:
        raise ValueError(str(error)) from error
    return Counter(node.op_type for node in graph.node)


def _kernels(path: Path) -> Counter[str]:
    """Of an AOTInductor package: fused kernels, on CUDA a file each, and calls of torch's operators in one run."""
    with zipfile.ZipFile(path) as package:
        names = package.namelist()
        source = "".join(package.read(name).decode() for name in names if name.endswith(".wrapper.cpp"))
    fused = sum(name.endswith(".cubin") for name in names) or len(set(_FUSED.findall(source)))
    return Counter({"fused kernels": fused}) + Counter(f"calls of {name}" for name in _CALLED.findall(source))
