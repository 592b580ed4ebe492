"""A checkpoint folder, resolved and checked before anything is built from it.

Reads JSON and safetensors headers only, so a broken 20 GB download is named within a second.
"""

import hashlib
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.errors import CheckpointError, DamagedFileError
from export.spec import CAPTION_MULTIPLE, MAX_PROMPT_TOKENS, SIZE_MULTIPLE, ModelDimensions

PIPELINE_CLASS = "ZImagePipeline"
WEIGHTS = {
    "transformer": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
}
CONFIGS = (
    "model_index.json",
    "scheduler/scheduler_config.json",
    "tokenizer/tokenizer_config.json",
    *(f"{part}/config.json" for part in WEIGHTS),
)
SAMPLE_BYTES = 1 << 20


@dataclass(frozen=True)
class Checkpoint:
    """A whole, supported ZImagePipeline folder."""

    path: Path
    dimensions: ModelDimensions
    shift: float  # of the flow-match sigma schedule
    max_size: int  # pixels a side that the position tables reach
    fingerprint: str


def open_checkpoint(path: Path) -> Checkpoint:
    """Checks every file that the folder's index names.

    Raises:
        CheckpointError: not a ZImagePipeline folder, or a file is missing, cut short or out of range. The message
            names the file, and for weights its expected and real size.
    """
    path = path.resolve()
    _check_pipeline(path)
    configs = {name: _read_json(path / name) for name in CONFIGS}
    weights = [file for part in WEIGHTS for file in weight_files(path / part, WEIGHTS[part])]
    for file in weights:
        read_safetensors_header(file)
    transformer, scheduler = configs["transformer/config.json"], configs["scheduler/scheduler_config.json"]
    _check_scheduler(scheduler)
    return Checkpoint(
        path=path,
        dimensions=_dimensions(configs),
        shift=float(scheduler["shift"]),
        max_size=_max_size(transformer),
        fingerprint=_fingerprint(path, weights),
    )


def read_safetensors_header(file: Path) -> dict[str, Any]:
    """The header of a safetensors file, after checking that the file holds every byte the header promises.

    Format: u64 header length, JSON header, tensor data (https://github.com/huggingface/safetensors).
    """
    size = file.stat().st_size
    with file.open("rb") as f:
        length = struct.unpack("<Q", f.read(8))[0] if size >= 8 else 0
        if not 2 <= length <= size - 8:
            raise DamagedFileError(file, f"is not a safetensors file (its header does not fit its {size} bytes)")
        try:
            header: dict[str, Any] = json.loads(f.read(length))
            ends = [t["data_offsets"][1] for name, t in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedFileError(file, f"has an unreadable safetensors header ({error})") from error
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise DamagedFileError(file, f"is damaged: {expected} bytes expected, {size} found")
    return header


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
    if index.is_file():
        shards = _read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise DamagedFileError(index, "names no shards")
        names = sorted(set(shards.values()))
    else:
        names = [single]
    for name in names:
        if not (folder / name).is_file():
            raise DamagedFileError(folder / name, "is missing from the checkpoint")
        yield folder / name


def _check_scheduler(config: dict[str, Any]) -> None:
    kind = config.get("_class_name")
    if kind != "FlowMatchEulerDiscreteScheduler" or config.get("use_dynamic_shifting"):
        raise CheckpointError(
            f"the checkpoint's schedule is {kind} with use_dynamic_shifting="
            f"{config.get('use_dynamic_shifting')}; only FlowMatchEulerDiscreteScheduler with a fixed shift is"
        )


def _dimensions(configs: dict[str, dict[str, Any]]) -> ModelDimensions:
    transformer, text_encoder = configs["transformer/config.json"], configs["text_encoder/config.json"]
    if transformer.get("all_patch_size") != [2] or transformer.get("all_f_patch_size") != [1]:
        raise CheckpointError("transformer/config.json: only all_patch_size [2] and all_f_patch_size [1] are supported")
    heads, vae = transformer["n_heads"], configs["vae/config.json"]
    for what, value, needed in (
        (
            "transformer cap_feat_dim",
            transformer["cap_feat_dim"],
            ("text encoder hidden_size", text_encoder["hidden_size"]),
        ),
        ("transformer in_channels", transformer["in_channels"], ("vae latent_channels", vae["latent_channels"])),
        ("transformer dim / n_heads", transformer["dim"] / heads, ("sum of axes_dims", sum(transformer["axes_dims"]))),
        ("vae block_out_channels count", len(vae["block_out_channels"]), ("count for 8 pixels a latent", 4)),
    ):
        if value != needed[1]:
            raise CheckpointError(f"the checkpoint's {what} is {value}; it must equal the {needed[0]}, {needed[1]}")
    return ModelDimensions(transformer["in_channels"], transformer["dim"], text_encoder["vocab_size"])


def _max_size(transformer: dict[str, Any]) -> int:
    depth, rows, columns = transformer["axes_lens"]
    if depth < MAX_PROMPT_TOKENS + CAPTION_MULTIPLE:
        raise CheckpointError(f"axes_lens[0] is {depth}; a {MAX_PROMPT_TOKENS}-token prompt does not fit")
    return int(min(rows, columns)) * SIZE_MULTIPLE


def _fingerprint(path: Path, weights: list[Path]) -> str:
    """SHA-256 over the configs and, of each weight file, its size, header and samples of its data.

    Reading every byte of 30 GB would take longer than starting the server, so the data is sampled at both ends and in
    the middle: enough to tell fine-tunes apart, not a defence against tampering.
    """
    digest = hashlib.sha256()
    for name in CONFIGS:
        digest.update((path / name).read_bytes())
    for file in weights:
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path)}:{size}".encode())
        with file.open("rb") as f:
            for start in (0, size // 2, max(0, size - SAMPLE_BYTES)):
                f.seek(start)
                digest.update(f.read(SAMPLE_BYTES))
    return digest.hexdigest()
