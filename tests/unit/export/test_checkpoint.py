"""A broken checkpoint is named, with what is wrong and what to do."""

import errno
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks import published
from export import checkpoint
from export.checkpoint import CONFIGS, data_start, open_checkpoint, read_safetensors_header
from export.configs import FILES, checked_configs
from export.errors import CheckpointError
from export.modules.load import load_components
from export.preview import fit_preview
from export.spec import Component, Precision
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


def test_a_file_that_cannot_be_read_is_named(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(copy / WEIGHTS))

    monkeypatch.setattr(checkpoint, "_check_types", refuse)
    with pytest.raises(CheckpointError, match=f"{WEIGHTS} cannot be read: Permission denied"):
        open_checkpoint(copy)


@pytest.mark.parametrize("content", [b"", b"\x00" * 4, b"<html>not found</html>"])
def test_a_file_that_is_not_safetensors_is_named(copy: Path, content: bytes) -> None:
    (copy / WEIGHTS).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{WEIGHTS} is not a safetensors file"):
        open_checkpoint(copy)


@pytest.mark.parametrize("name", [WEIGHTS, *CONFIGS[1:]])
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


def change(checkpoint: Path, file: str, **changed: Any) -> None:
    """Writes `changed` into a config; `...` takes a key out."""
    path = checkpoint / file
    merged = json.loads(path.read_text()) | changed
    path.write_text(json.dumps({key: value for key, value in merged.items() if value is not ...}))


SCHEDULER, TRANSFORMER, TEXT_ENCODER, VAE = FILES.values()
REFUSED = [
    (SCHEDULER, {"use_dynamic_shifting": True}, "use_dynamic_shifting is true; only false is accepted"),
    (SCHEDULER, {"use_karras_sigmas": True}, "use_karras_sigmas is true"),
    (SCHEDULER, {"_class_name": "DDIMScheduler"}, '_class_name is "DDIMScheduler"; only "FlowMatchEuler'),
    (SCHEDULER, {"shift": ...}, "shift is missing; a number above 0 is accepted"),
    (SCHEDULER, {"shift": 0}, "shift is 0; a number above 0 is accepted"),
    (SCHEDULER, {"shift": -3.0}, "shift is -3.0"),
    (SCHEDULER, {"shift": float("nan")}, "shift is NaN"),
    (SCHEDULER, {"shift": "3"}, 'shift is "3"'),
    (SCHEDULER, {"shift_terminal": 0.1}, "shift_terminal is 0.1; only null is accepted"),
    (TRANSFORMER, {"n_heads": ...}, "n_heads is missing; a whole number from 1"),
    (TRANSFORMER, {"n_heads": 0}, "n_heads is 0; a whole number from 1"),
    (TRANSFORMER, {"n_heads": True}, "n_heads is true"),
    (TRANSFORMER, {"n_kv_heads": 1}, "n_kv_heads is 1; only the n_heads, 3, is accepted"),
    (TRANSFORMER, {"qk_norm": False}, "qk_norm is false; only true is accepted"),
    (TRANSFORMER, {"n_layers": -1}, "n_layers is -1; a whole number from 1 to 1000 is accepted"),
    (TRANSFORMER, {"n_refiner_layers": 1.5}, "n_refiner_layers is 1.5"),
    (TRANSFORMER, {"axes_lens": [1024, 512]}, r"axes_lens is \[1024, 512\]; three whole numbers"),
    (TRANSFORMER, {"axes_lens": [512, 512, 512]}, "axes_lens is .*; three whole numbers, the first from 544"),
    (TRANSFORMER, {"axes_lens": [1024, 16, 512]}, "axes_lens is .*, the others from 20"),
    (TRANSFORMER, {"axes_dims": [16, 24, 23]}, "axes_dims is .* above 0 and even"),
    (TRANSFORMER, {"dim": 256}, "dim is 256; only the n_heads times the sum of axes_dims, 192, is accepted"),
    (TRANSFORMER, {"all_patch_size": [4]}, r"all_patch_size is \[4\]; only \[2\]"),
    (TRANSFORMER, {"t_scale": 0}, "t_scale is 0"),
    (TRANSFORMER, {"cap_feat_dim": 191}, "cap_feat_dim is 191; only the text encoder's hidden_size, 192"),
    (TEXT_ENCODER, {"vocab_size": ...}, "vocab_size is missing"),
    (TEXT_ENCODER, {"model_type": "t5"}, 'model_type is "t5"; only "qwen3"'),
    (TEXT_ENCODER, {"num_hidden_layers": 1}, "num_hidden_layers is 1; a whole number from 2"),
    (TEXT_ENCODER, {"num_key_value_heads": 2}, "num_key_value_heads is 2; a divisor of num_attention_heads, 3,"),
    (TEXT_ENCODER, {"use_sliding_window": True}, "use_sliding_window is true; only false is accepted"),
    (TEXT_ENCODER, {"hidden_act": "gelu"}, 'hidden_act is "gelu"; only "silu" is accepted'),
    (VAE, {"latent_channels": ...}, "latent_channels is missing"),
    (VAE, {"latent_channels": 4}, "in_channels is 16; only the vae's latent_channels, 4,"),
    (VAE, {"shift_factor": None}, "shift_factor is null; a number is accepted"),
    (VAE, {"scaling_factor": 0}, "scaling_factor is 0"),
    (VAE, {"block_out_channels": [32, 64]}, r"block_out_channels is \[32, 64\]; four"),
    (VAE, {"act_fn": "relu"}, 'act_fn is "relu"; only "silu" is accepted'),
    (VAE, {"up_block_types": ...}, 'up_block_types is missing; four times "UpDecoderBlock2D" is accepted'),
    (VAE, {"up_block_types": ["AttnUpDecoderBlock2D"] * 4}, 'up_block_types is .*; four times "UpDecoderBlock2D"'),
    (VAE, {"down_block_types": ["DownEncoderBlock2D"]}, 'down_block_types is .*; four times "DownEncoderBlock2D"'),
    *(
        (file, {"quantization_config": {"quant_method": "x"}}, 'quantization_config is {"quant.*; only null, so the ch')
        for file in (TRANSFORMER, TEXT_ENCODER, VAE)
    ),
    (VAE, {"norm_num_groups": 5}, "norm_num_groups is 5; a divisor of all block_out_channels"),
]


@pytest.mark.parametrize(
    ("file", "changed", "says"), REFUSED, ids=lambda value: "" if isinstance(value, dict) else value
)
def test_what_a_config_may_not_be_is_named_with_what_it_may(
    copy: Path, file: str, changed: dict[str, Any], says: str
) -> None:
    change(copy, file, **changed)
    with pytest.raises(CheckpointError, match=rf"config\.json: {says}"):
        open_checkpoint(copy)


def test_the_published_configs_are_accepted() -> None:
    scheduler = {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "shift": published.SHIFT,
    }
    raw = {SCHEDULER: scheduler, **{f"{part}/config.json": config for part, config in published.CONFIGS.items()}}
    configs = checked_configs(raw)
    assert configs.transformer.max_size == 8192
    assert configs.scheduler.shift == 3.0


@pytest.mark.parametrize("content", ["", "{}", '{"model": {"vocab": {}}}'])
def test_a_tokenizer_without_a_vocabulary_is_named(copy: Path, content: str) -> None:
    (copy / "tokenizer" / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json (is not valid JSON|has no vocabulary)"):
        open_checkpoint(copy)


HEADERS = [
    "[]",
    "[1, 2]",
    '{"a": 5}',
    '{"a": {"dtype": "F32", "shape": [1]}}',
    '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}',
    '{"a": {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}}',
    '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 4]}}',
    '{"a": {"dtype": "F64", "shape": [1], "data_offsets": [0, 4]}}',
    '{"a": {"dtype": "Q4", "shape": [1], "data_offsets": [0, 4]}}',
    '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
    '{"a": {"dtype": "BF16", "shape": [1], "data_offsets": [2, 4]}}',
    '{"a": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]}}',
    '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "b": {"dtype": "F32", "shape": [1], '
    '"data_offsets": [0, 4]}}',
    '{"__metadata__": {"step": 3}, "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
]


def safetensors(header: str) -> bytes:
    return len(header).to_bytes(8, "little") + header.encode()


@pytest.mark.parametrize("header", HEADERS)
def test_a_header_that_is_none_is_named(copy: Path, header: str) -> None:
    (copy / WEIGHTS).write_bytes(safetensors(header) + (b"" if header.startswith("[") else b"\0" * 4))
    with pytest.raises(CheckpointError, match=f"{WEIGHTS} has an unreadable safetensors header"):
        open_checkpoint(copy)


@pytest.mark.parametrize(
    ("part", "gone", "named"),
    [
        ("transformer", "layers.3.attention.to_q.weight", "layers.3.attention.to_q.weight"),
        ("transformer", "context_refiner.", "context_refiner.0."),
        ("text_encoder", "layers.4.mlp.up_proj.weight", "layers.4.mlp.up_proj.weight"),
    ],
)
def test_a_tensor_that_is_not_there_is_named(copy: Path, part: str, gone: str, named: str) -> None:
    """diffusers and transformers fill it with noise or zeros."""
    (file,) = (copy / part).glob("*.safetensors")
    tensors = load_file(file)
    kept = {name: tensor for name, tensor in tensors.items() if not name.removeprefix("model.").startswith(gone)}
    assert 0 < len(kept) < len(tensors)
    save_file(kept, file)
    with pytest.raises(CheckpointError, match=f"{part} holds no tensor {re.escape(named)}"):
        open_checkpoint(copy)


def changed_tensor(folder: Path, name: str, value: torch.Tensor | None) -> None:
    """Of the folder's one weight file; None takes the tensor away."""
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    stored = next(there for there in tensors if there.removeprefix("model.") == name)
    del tensors[stored]
    save_file(tensors if value is None else tensors | {stored: value}, file)


@pytest.mark.parametrize(
    ("component", "part", "name"),
    [
        (Component.PROMPT_ENCODER, "text_encoder", "embed_tokens.weight"),
        (Component.PROMPT_ENCODER, "transformer", "cap_pad_token"),
        (Component.DENOISER, "transformer", "cap_pad_token"),
        (Component.IMAGE_DECODER, "vae", "decoder.conv_in.weight"),
    ],
)
def test_what_is_outside_the_layers_has_to_be_there_and_to_fit(
    copy: Path, component: Component, part: str, name: str
) -> None:
    """Else two workers would draw different pictures: each with its own random numbers in the place."""

    def load() -> None:
        load_components(copy, precision=Precision.FP32, device="cpu", wanted=[component])

    load()
    changed_tensor(copy / part, name, torch.zeros(3))
    with pytest.raises(CheckpointError, match=rf"the weights in {copy / part} do not fit its config\.json"):
        load()
    shutil.copytree(CHECKPOINT / part, copy / part, copy_function=shutil.copyfile, dirs_exist_ok=True)
    changed_tensor(copy / part, name, None)
    with pytest.raises(CheckpointError, match=f"{part} holds no tensor {re.escape(name)}, which its config"):
        load()


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("encoder.conv_in.weight", torch.zeros(3), r"the weights in .*vae do not fit its config\.json"),
        ("encoder.conv_in.weight", None, "vae holds no tensor encoder.conv_in.weight, which its config.json promises"),
        ("encoder.conv_in.bias", torch.full((32,), torch.nan), "the encoder in .*vae makes numbers .* not finite"),
    ],
)
def test_previews_are_fitted_with_an_encoder_that_works(
    copy: Path, name: str, value: torch.Tensor | None, says: str
) -> None:
    """No component holds it, and nothing else reads it."""
    changed_tensor(copy / "vae", name, value)
    with pytest.raises(CheckpointError, match=says):
        fit_preview(copy)


@pytest.mark.parametrize(
    "changed", [{"rope_parameters": {"rope_type": "banana", "rope_theta": 1e4}}, {"rms_norm_eps": "small"}]
)
def test_what_the_libraries_make_nothing_of_is_the_checkpoints_fault(copy: Path, changed: dict[str, Any]) -> None:
    change(copy, TEXT_ENCODER, **changed)
    open_checkpoint(copy)
    with pytest.raises(CheckpointError, match=rf"{copy / 'text_encoder'} cannot be read as its config\.json says"):
        load_components(copy, precision=Precision.FP32, device="cpu", wanted=[Component.PROMPT_ENCODER])


def test_one_file_beside_shards_is_ambiguous(copy: Path) -> None:
    """diffusers reads the shards, transformers the one file."""
    single = copy / WEIGHTS
    shutil.copyfile(single, single.with_name("one.safetensors"))
    single.with_name(f"{single.name}.index.json").write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"holds both .* and .*; remove one"):
        open_checkpoint(copy)


def test_weights_of_numbers_that_stand_for_others_are_refused(copy: Path) -> None:
    """A quantised checkpoint need not say so in its config."""
    name = "layers.0.attention.to_q.weight"
    tensors = load_file(copy / WEIGHTS)
    save_file(tensors | {name: tensors[name].to(torch.int8)}, copy / WEIGHTS)
    with pytest.raises(CheckpointError, match=rf"{name} is I8; F32, BF16, F16 are accepted.*--precision"):
        open_checkpoint(copy)


def test_more_layers_than_there_are_cannot_be_promised(copy: Path) -> None:
    change(copy, TRANSFORMER, n_layers=9)
    with pytest.raises(CheckpointError, match=r"holds no tensor layers\.8\..*, and its config promises 9 layers"):
        open_checkpoint(copy)


@pytest.mark.parametrize("shards", [{"a": 5}, {"a": "../../other/model.safetensors"}, {}])
def test_an_index_of_what_are_no_files_is_named(copy: Path, shards: dict[str, Any]) -> None:
    (copy / WEIGHTS).unlink()
    (copy / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(CheckpointError, match="names no shards"):
        open_checkpoint(copy)


def every_tensor(file: Path) -> list[tuple[int, int]]:
    """Where each begins and ends in the file."""
    entries = {name: entry for name, entry in read_safetensors_header(file).items() if name != "__metadata__"}
    return [
        (data_start(file) + begin, data_start(file) + end)
        for begin, end in (e["data_offsets"] for e in entries.values())
    ]


def flip(file: Path, places: list[int]) -> None:
    """Changes one bit in each of `places`."""
    with file.open("r+b") as f:
        for place in places:
            f.seek(place)
            (byte,) = f.read(1)
            f.seek(place)
            f.write(bytes([byte ^ 1]))


@pytest.mark.parametrize(
    "place",
    [lambda begin, end: begin, lambda begin, end: (begin + end) // 2, lambda begin, end: end - 1],
    ids=["start", "middle", "end"],
)
def test_every_tensor_counts_for_the_fingerprint(copy: Path, place: Callable[[int, int], int]) -> None:
    for part in ("transformer", "text_encoder", "vae"):
        (file,) = (copy / part).glob("*.safetensors")
        tensors = every_tensor(file)
        assert len(tensors) > 20
        seen = {open_checkpoint(copy).fingerprint}
        for number, (begin, end) in enumerate(tensors[:: len(tensors) // 8], 2):
            flip(file, [place(begin, end)])
            seen.add(open_checkpoint(copy).fingerprint)
            assert len(seen) == number, f"{file.name}: the tensor at {begin} does not count"


def bytes_read() -> int:
    """By this process so far."""
    return int(Path("/proc/self/io").read_text().split()[1])


def test_little_of_thirty_gigabytes_is_read(copy: Path) -> None:
    tensors, size = 1500, 20_000_000
    header = json.dumps(
        {
            str(n): {"dtype": "BF16", "shape": [size // 2], "data_offsets": [n * size, (n + 1) * size]}
            for n in range(tensors)
        }
    )
    with (copy / "vae" / "diffusion_pytorch_model.safetensors").open("wb") as f:
        f.write(safetensors(header))
        f.truncate(8 + len(header) + tensors * size)  # it takes no room on the disk
    before = bytes_read()
    open_checkpoint(copy)
    assert bytes_read() - before < 20_000_000


@pytest.mark.parametrize("name", ["tokenizer/tokenizer.json", "tokenizer/chat_template.jinja"])
def test_another_tokenizer_is_another_checkpoint(copy: Path, name: str) -> None:
    before = open_checkpoint(copy).fingerprint
    with (copy / name).open("a") as f:
        f.write("\n")
    assert open_checkpoint(copy).fingerprint != before


def test_other_weights_have_another_fingerprint(copy: Path) -> None:
    before = open_checkpoint(copy).fingerprint
    with (copy / WEIGHTS).open("r+b") as f:
        f.seek(-1, 2)
        last = f.read(1)
        f.seek(-1, 2)
        f.write(bytes([last[0] ^ 1]))
    assert open_checkpoint(copy).fingerprint != before
