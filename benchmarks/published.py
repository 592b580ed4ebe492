"""Z-Image-Turbo as it was published, with random weights: its exact shapes, so its speed, without a download."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from export.modules.load import TORCH_DTYPES
from export.modules.outline import default_dtype
from export.spec import ModelDimensions, Precision

if TYPE_CHECKING:
    from diffusers import ZImagePipeline

# The demo's: any text becomes valid token ids, and which ones does not affect the speed.
TOKENIZER = Path(__file__).parent.parent / "demo" / "checkpoint" / "tokenizer"
SHIFT = 3.0
CHECKPOINT = "random-weights"  # the folder's name
TRANSFORMER = {
    "_class_name": "ZImageTransformer2DModel",
    "all_patch_size": [2],
    "all_f_patch_size": [1],
    "in_channels": 16,
    "dim": 3840,
    "n_layers": 30,
    "n_refiner_layers": 2,
    "n_heads": 30,
    "n_kv_heads": 30,
    "norm_eps": 1e-5,
    "qk_norm": True,
    "cap_feat_dim": 2560,
    "rope_theta": 256.0,
    "t_scale": 1000.0,
    "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512],
}
TEXT_ENCODER = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rope_theta": 1000000,
    "rms_norm_eps": 1e-6,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
}
VAE = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 16,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "sample_size": 1024,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "mid_block_add_attention": True,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "force_upcast": True,
}
CONFIGS: dict[str, dict[str, Any]] = {"transformer": TRANSFORMER, "text_encoder": TEXT_ENCODER, "vae": VAE}


def dimensions() -> ModelDimensions:
    """What a manifest would say about this model."""
    return ModelDimensions(
        CONFIGS["vae"]["latent_channels"], CONFIGS["transformer"]["dim"], CONFIGS["text_encoder"]["vocab_size"]
    )


def checkpoint(repository: Path, device: str, precision: Precision) -> Path:
    """The folder of the model with random weights (20.5 GB in bf16), made on `device` and written once."""
    folder = repository / f"{CHECKPOINT}-{precision}"
    if not folder.is_dir():
        draft = folder.with_suffix(".incomplete")
        random_pipeline(device, precision).save_pretrained(draft)
        draft.rename(folder)
    return folder


def random_pipeline(device: str, precision: Precision) -> "ZImagePipeline":
    """diffusers' pipeline with the same random weights every time, made on `device`: 20.5 GB in bf16."""
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline
    from transformers import AutoTokenizer

    with torch.device(device), default_dtype(TORCH_DTYPES[precision]):
        parts = {name: _part(name, dict(config)) for name, config in CONFIGS.items()}
    generator = torch.Generator(device).manual_seed(0)
    for part in parts.values():
        _randomize(part.eval().requires_grad_(False), generator)
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=SHIFT)
    return ZImagePipeline(scheduler=scheduler, tokenizer=AutoTokenizer.from_pretrained(TOKENIZER), **parts)


def _part(name: str, config: dict[str, Any]) -> Any:
    from diffusers import AutoencoderKL, ZImageTransformer2DModel
    from transformers import AutoModel, Qwen3Config

    match name:
        case "transformer":
            return ZImageTransformer2DModel.from_config(config)
        case "text_encoder":
            return AutoModel.from_config(Qwen3Config(**config), dtype=torch.get_default_dtype())
        case _:
            return AutoencoderKL.from_config(config)


def _randomize(part: torch.nn.Module, generator: torch.Generator) -> None:
    """A standard deviation of 0.02; the norms' scales stay 1, so that activations stay in range."""
    for name, parameter in part.named_parameters():
        if parameter.ndim > 1 or name.endswith("bias"):
            parameter.normal_(std=0.02, generator=generator)
