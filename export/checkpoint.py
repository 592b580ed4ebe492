"""A checkpoint folder, resolved and checked before anything is built from it.

Reads JSON, safetensors headers and, for the fingerprint, a few KB of every tensor, so a broken 20 GB download is named
within a second.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open

from export.configs import FILES, CheckpointConfigs, checked_configs
from export.errors import CheckpointError, DamagedFileError
from export.spec import ModelDimensions

PIPELINE_CLASS = "ZImagePipeline"
WEIGHTS = {
    "transformer": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
}
CONFIGS = (
    "model_index.json",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
    *FILES.values(),
)
CHAT_TEMPLATE = "tokenizer/chat_template.jinja"  # older checkpoints have it in tokenizer_config.json
READABLE = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # weights, in safetensors' names and in torch's
SAMPLE_BYTES = 2048
HEADER_BYTES = 100_000_000  # the format's own limit
DATA_END = re.compile(rb'"data_offsets"\s*:\s*\[\s*\d+\s*,\s*(\d{1,18})')  # in a header


@dataclass(frozen=True)
class Checkpoint:
    """A whole, supported ZImagePipeline folder."""

    path: Path
    dimensions: ModelDimensions
    shift: float  # of the flow-match sigma schedule
    max_size: int  # pixels a side that the position tables reach
    fingerprint: str


def open_checkpoint(path: Path) -> Checkpoint:
    """Checks every file that an export or a server reads of the folder.

    Raises:
        CheckpointError: not a ZImagePipeline folder, or a file is missing, cut short or out of range. The message
            names the file, and for weights its expected and real size.
    """
    try:
        return _open(path.resolve())
    except OSError as error:
        raise CheckpointError(f"{error.filename or path} cannot be read: {error.strerror}") from error


def _open(path: Path) -> Checkpoint:
    _check_pipeline(path)
    raw = {name: _read_json(path / name) for name in CONFIGS}
    _check_tokenizer(path / "tokenizer" / "tokenizer.json", raw["tokenizer/tokenizer.json"])
    configs = checked_configs(raw)
    weights = [file for part in WEIGHTS for file in weight_files(path / part, WEIGHTS[part])]
    for file in weights:
        _check_types(file)
    for part, stacks in _stacks(configs).items():
        _check_layers(path / part, stacks)
    return Checkpoint(
        path=path,
        dimensions=_dimensions(configs),
        shift=float(configs.scheduler.shift),
        max_size=configs.transformer.max_size,
        fingerprint=_fingerprint(path, weights),
    )


def read_safetensors_header(file: Path) -> dict[str, Any]:
    """The header of a safetensors file, after checking that its library takes it and that all its bytes are there.

    Format: u64 header length, JSON header, tensor data (https://github.com/huggingface/safetensors).
    """
    size = file.stat().st_size
    length = data_start(file) - 8
    if not 2 <= length <= min(size - 8, HEADER_BYTES):
        raise DamagedFileError(file, f"is not a safetensors file (its header does not fit its {size} bytes)")
    with file.open("rb") as f:
        f.seek(8)
        text = f.read(length)
    expected = 8 + length + max(map(int, DATA_END.findall(text)), default=0)
    if size < expected:  # the library does not say how much
        raise DamagedFileError(file, f"is damaged: {expected} bytes expected, {size} found")
    try:
        with safe_open(file, "np"):  # reads the header alone
            header: dict[str, Any] = json.loads(text)
    except SafetensorError as error:
        raise DamagedFileError(file, f"has an unreadable safetensors header ({error})") from error
    return header


def tensors(folder: Path) -> Iterator[tuple[Path, str, dict[str, Any]]]:
    """File, name and header entry of each tensor in a component's folder; `__metadata__` is none."""
    for file in weight_files(folder, WEIGHTS[folder.name]):
        for name, entry in read_safetensors_header(file).items():
            if name != "__metadata__":
                yield file, name, entry


def without_prefix(name: str) -> str:
    """Text encoders are stored with or without the prefix of the causal language model around them."""
    return name.removeprefix("model.")


def data_start(file: Path) -> int:
    """Where the tensors begin in a safetensors file."""
    with file.open("rb") as f:
        return 8 + int.from_bytes(f.read(8), "little")


def _check_pipeline(path: Path) -> None:
    if not path.is_dir():
        raise CheckpointError(
            f"no checkpoint folder at {path}; give a diffusers {PIPELINE_CLASS} folder, or its name on a hub with "
            "--source huggingface or --source modelscope"
        )
    if not (path / "model_index.json").is_file():
        found = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
        raise CheckpointError(f"{path} is not a diffusers pipeline: no model_index.json (found {found})")
    kind = _read_json(path / "model_index.json").get("_class_name")
    if kind != PIPELINE_CLASS:
        raise CheckpointError(f"{path} is a {kind}; only {PIPELINE_CLASS} is supported")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise DamagedFileError(file, "is missing from the checkpoint") from None
    except ValueError as error:
        raise DamagedFileError(file, f"is not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise DamagedFileError(file, f"holds {type(value).__name__}, not an object")
    return value


def weight_files(folder: Path, single: str) -> Iterator[Path]:
    """The one weight file, or every shard that its index names."""
    index = folder / f"{single}.index.json"
    if index.is_file() and (folder / single).is_file():
        raise CheckpointError(
            f"{folder} holds both {single} and {index.name}, and not all libraries read the same of them; remove one"
        )
    if index.is_file():
        shards = _read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not shards or not all(map(_is_file_name, shards.values())):
            raise DamagedFileError(index, "names no shards, or what are no file names")
        names = sorted(set(shards.values()))
    else:
        names = [single]
    for name in names:
        if not (folder / name).is_file():
            raise DamagedFileError(folder / name, "is missing from the checkpoint")
        yield folder / name


def _is_file_name(name: object) -> bool:
    return isinstance(name, str) and name == Path(name).name


def _check_tokenizer(file: Path, tokenizer: dict[str, Any]) -> None:
    """The server turns prompts into token ids with it."""
    if not isinstance(tokenizer.get("model"), dict) or not tokenizer["model"].get("vocab"):
        raise DamagedFileError(file, "has no vocabulary (model.vocab)")


def _stacks(configs: CheckpointConfigs) -> dict[str, dict[str, int]]:
    """How many equal layers the configs promise, by folder and the name they have there."""
    transformer = configs.transformer
    refiners = dict.fromkeys(("noise_refiner", "context_refiner"), transformer.n_refiner_layers)
    return {
        "transformer": {"layers": transformer.n_layers, **refiners},
        "text_encoder": {"layers": configs.text_encoder.num_hidden_layers},
    }


def _check_types(file: Path) -> None:
    """Quantised values, with a scale stored beside them, would be taken for the weights themselves."""
    for name, tensor in read_safetensors_header(file).items():
        if name.endswith((".weight", ".bias")) and tensor["dtype"] not in READABLE:
            raise CheckpointError(
                f"{file}: {name} is {tensor['dtype']}; {', '.join(READABLE)} are accepted. Quantised checkpoints are "
                "not: give the original one, and --precision"
            )


def _check_layers(folder: Path, stacks: dict[str, int]) -> None:
    """Every layer must have the same tensors as its peers: the libraries would silently fill in missing ones."""
    names = {without_prefix(name) for _, name, _ in tensors(folder)}
    for stack, count in stacks.items():
        inner = {parts[2] for name in names if len(parts := name.split(".", 2)) == 3 and parts[0] == stack}
        needed = (f"{stack}.{layer}.{name}" for layer in range(count) for name in sorted(inner) or ["*"])
        missing = next((name for name in needed if name not in names), None)
        if missing is not None:
            raise CheckpointError(
                f"{folder} holds no tensor {missing}, and its config promises {count} {stack}; download it again, or "
                "save it whole"
            )


def _dimensions(configs: CheckpointConfigs) -> ModelDimensions:
    transformer = configs.transformer
    return ModelDimensions(transformer.in_channels, transformer.dim, configs.text_encoder.vocab_size)


def _fingerprint(path: Path, weights: list[Path]) -> str:
    """SHA-256 over the configs, the tokenizer and, of each weight file, its header and samples of every tensor.

    Reading every byte of 30 GB would take longer than starting the server. Training changes most values of what it
    trains, so a few from each tensor tell fine-tunes apart, partial ones too; a few rows changed by hand between the
    samples of a large tensor are not seen.
    """
    digest = hashlib.sha256()
    for name in (*CONFIGS, CHAT_TEMPLATE):
        if (path / name).is_file():
            digest.update(name.encode() + (path / name).read_bytes())
    for file in weights:
        header = read_safetensors_header(file)
        digest.update(f"{file.relative_to(path)}:{json.dumps(header)}".encode())
        start = data_start(file)
        with file.open("rb", buffering=0) as f:
            for begin, end in sorted(t["data_offsets"] for name, t in header.items() if name != "__metadata__"):
                digest.update(_samples(f, start + begin, start + end))
    return digest.hexdigest()


def _samples(file: BinaryIO, begin: int, end: int) -> bytes:
    """`SAMPLE_BYTES` from the start, the middle and the end of a tensor; all of it where that is no more."""
    if end - begin <= 3 * SAMPLE_BYTES:
        places = [(begin, end - begin)]
    else:
        places = [(at, SAMPLE_BYTES) for at in (begin, (begin + end - SAMPLE_BYTES) // 2, end - SAMPLE_BYTES)]
    taken = b""
    for at, length in places:
        file.seek(at)
        taken += file.read(length)
    return taken
