"""A broken checkpoint is named, with what is wrong and what to do."""

import json
import shutil
from pathlib import Path

import pytest

from export.checkpoint import open_checkpoint
from export.errors import CheckpointError
from tests.conftest import CHECKPOINT

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(CHECKPOINT, tmp_path / "checkpoint", copy_function=shutil.copyfile))


def test_a_whole_checkpoint_is_described() -> None:
    checkpoint = open_checkpoint(CHECKPOINT)
    assert checkpoint.dimensions.latent_channels == 16
    assert checkpoint.dimensions.caption_dim == 192
    assert checkpoint.shift == 3.0
    assert checkpoint == open_checkpoint(CHECKPOINT)


def test_a_truncated_file_is_named_with_both_sizes(copy: Path) -> None:
    size = (copy / WEIGHTS).stat().st_size
    with (copy / WEIGHTS).open("r+b") as f:
        f.truncate(size - 1000)
    with pytest.raises(CheckpointError, match=rf"{WEIGHTS} is damaged: {size} bytes expected, {size - 1000} found"):
        open_checkpoint(copy)


@pytest.mark.parametrize("content", [b"", b"\x00" * 4, b"<html>not found</html>"])
def test_a_file_that_is_not_safetensors_is_named(copy: Path, content: bytes) -> None:
    (copy / WEIGHTS).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{WEIGHTS} is not a safetensors file"):
        open_checkpoint(copy)


@pytest.mark.parametrize("name", [WEIGHTS, "vae/config.json", "tokenizer/tokenizer_config.json"])
def test_a_missing_file_is_named(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        open_checkpoint(copy)


def test_a_missing_shard_is_named(copy: Path) -> None:
    single = copy / WEIGHTS
    single.rename(single.with_name("one.safetensors"))
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    single.with_name(single.name + ".index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"two\.safetensors is missing"):
        open_checkpoint(copy)


def test_another_pipeline_is_named(copy: Path) -> None:
    (copy / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(CheckpointError, match="is a FluxPipeline; only ZImagePipeline is supported"):
        open_checkpoint(copy)


def test_a_folder_that_is_no_pipeline_says_what_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(CheckpointError, match=r"no model_index\.json \(found notes\.txt\)"):
        open_checkpoint(tmp_path)


def test_dynamic_shifting_is_refused(copy: Path) -> None:
    path = copy / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dynamic_shifting": True}))
    with pytest.raises(CheckpointError, match="use_dynamic_shifting=True"):
        open_checkpoint(copy)


def test_other_weights_have_another_fingerprint(copy: Path) -> None:
    before = open_checkpoint(copy).fingerprint
    with (copy / WEIGHTS).open("r+b") as f:
        f.seek(-1, 2)
        last = f.read(1)
        f.seek(-1, 2)
        f.write(bytes([last[0] ^ 1]))
    assert open_checkpoint(copy).fingerprint != before
