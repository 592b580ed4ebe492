"""A component's weights as one safetensors file in the precision it is served in.

ONNX external data points into this file, so a graph of any size is exported without its weights in memory, and they
are on disk once.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from export.checkpoint import READABLE, data_start, tensors, without_prefix
from export.errors import CheckpointError
from export.spec import Precision

HEADER_ALIGNMENT = 4096  # so that a reader can map the data by pages
SAFETENSORS_DTYPES = {Precision.FP32: "F32", Precision.BF16: "BF16"}
BYTES = {Precision.FP32: 4, Precision.BF16: 2}


@dataclass(frozen=True)
class Span:
    """Where a tensor lies in a weights file."""

    offset: int
    length: int


@dataclass(frozen=True)
class _Stored:
    """A tensor of the checkpoint."""

    file: Path
    span: Span
    dtype: str
    shape: tuple[int, ...]


def write_weights(
    checkpoint: Path,
    sources: Mapping[str, tuple[str, str]],
    shapes: Mapping[str, tuple[int, ...]],
    precision: Precision,
    path: Path,
) -> dict[str, Span]:
    """Copies the tensors that `sources` names, one at a time, in `precision`, to `path`; returns where each lies.

    `sources` maps the component's parameter to (folder of the checkpoint, name there), as `Outline.sources` does;
    `shapes` says what shape it has in the graph.

    Raises:
        CheckpointError: the checkpoint does not hold one of them, or holds it in another shape or type.
    """
    stored = _find(checkpoint, sources)
    _check(checkpoint, sources, stored, shapes)
    spans = _layout(stored, BYTES[precision])
    header = _header(stored, spans, precision)
    with path.open("wb") as f:
        f.write(len(header).to_bytes(8, "little") + header)
        f.writelines(_read(tuple(stored.values()), precision))
    start = 8 + len(header)
    return {name: Span(start + span.offset, span.length) for name, span in spans.items()}


def _find(checkpoint: Path, sources: Mapping[str, tuple[str, str]]) -> dict[str, _Stored]:
    held = {part: _held(checkpoint / part) for part in {part for part, _ in sources.values()}}
    found = {}
    for name, (part, key) in sources.items():
        match = held[part].get(key)
        if match is None:
            raise CheckpointError(f"{checkpoint / part} holds no tensor {key!r}; its config promises one")
        found[name] = match
    return found


def _check(
    checkpoint: Path,
    sources: Mapping[str, tuple[str, str]],
    stored: Mapping[str, _Stored],
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    """The graph reads the bytes as they are: a transposed weight would be taken for the right one."""
    for name, (part, key) in sources.items():
        tensor, shape = stored[name], shapes[name]
        if tensor.shape != shape:
            raise CheckpointError(
                f"{checkpoint / part}: {key} has the shape {list(tensor.shape)}; its config promises {list(shape)}"
            )
        if tensor.dtype not in READABLE:
            raise CheckpointError(f"{checkpoint / part}: {key} is {tensor.dtype}; {', '.join(READABLE)} are accepted")


def _held(folder: Path) -> dict[str, _Stored]:
    return {without_prefix(name): _stored(file, entry) for file, name, entry in tensors(folder)}


def _stored(file: Path, entry: Mapping[str, Any]) -> _Stored:
    begin, end = entry["data_offsets"]
    return _Stored(file, Span(data_start(file) + begin, end - begin), entry["dtype"], tuple(entry["shape"]))


def _layout(stored: Mapping[str, _Stored], width: int) -> dict[str, Span]:
    spans, offset = {}, 0
    for name, tensor in stored.items():
        length = width * prod(tensor.shape)
        spans[name] = Span(offset, length)
        offset += length
    return spans


def _header(stored: Mapping[str, _Stored], spans: Mapping[str, Span], precision: Precision) -> bytes:
    entries = {
        name: {
            "dtype": SAFETENSORS_DTYPES[precision],
            "shape": stored[name].shape,
            "data_offsets": [span.offset, span.offset + span.length],
        }
        for name, span in spans.items()
    }
    text = json.dumps(entries).encode()
    return text + b" " * (-(8 + len(text)) % HEADER_ALIGNMENT)


def _read(stored: Iterable[_Stored], precision: Precision) -> Iterator[memoryview]:
    """The tensors' data in order. Read, not mapped, so that no more than one tensor is ever in memory."""
    import torch

    from export.modules.load import TORCH_DTYPES

    for tensor in stored:
        data = bytearray(tensor.span.length)
        with tensor.file.open("rb") as f:
            f.seek(tensor.span.offset)
            f.readinto(data)
        values = torch.frombuffer(data, dtype=getattr(torch, READABLE[tensor.dtype])).to(TORCH_DTYPES[precision])
        yield values.view(torch.uint8).numpy().data
