"""From a checkpoint folder to the component modules."""

import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from export.errors import CheckpointError
from export.modules.blocks import Foreign
from export.modules.denoiser import Denoiser
from export.modules.image_decoder import ImageDecoder
from export.modules.prompt_encoder import PromptEncoder
from export.spec import Component, Precision

if TYPE_CHECKING:
    from diffusers import ZImagePipeline

TORCH_DTYPES = {Precision.FP32: torch.float32, Precision.BF16: torch.bfloat16}
REMEDY = "download it again, or save it whole"
# The folders of the checkpoint whose weights a component holds.
PARTS = {
    Component.PROMPT_ENCODER: ("text_encoder", "transformer"),
    Component.DENOISER: ("transformer",),
    Component.IMAGE_DECODER: ("vae",),
}


def load_components(
    checkpoint: Path,
    *,
    precision: Precision,
    device: str,
    wanted: Collection[Component] = tuple(Component),
) -> dict[Component, nn.Module]:
    """Reads the weights that the `wanted` components need for `precision`, onto `device`, ready for inference.

    Raises:
        CheckpointError: a folder lacks tensors that its config promises, or has them in other shapes.
    """
    needed = sorted({part for component in wanted for part in PARTS[component]})
    read = _read if Component.DENOISER in wanted else _read_without_layers
    with _quiet_loading():
        parts = {part: read(checkpoint / part, TORCH_DTYPES[precision.weights]) for part in needed}
    modules = {c: build_component(c, parts) for c in wanted}
    return {c: m.eval().requires_grad_(False).to(device) for c, m in modules.items()}


def load_vae(checkpoint: Path) -> nn.Module:
    """The whole VAE in fp32 on the CPU, with the encoder, which no component holds.

    Raises:
        CheckpointError: as `load_components`.
    """
    with _quiet_loading():
        return _read(checkpoint / "vae", torch.float32).eval()


def build_components(pipeline: "ZImagePipeline") -> dict[Component, nn.Module]:
    """The components of a diffusers pipeline already in memory; its weights are shared."""
    parts = {name: getattr(pipeline, name) for name in ("transformer", "text_encoder", "vae")}
    return {c: build_component(c, parts).eval().requires_grad_(False) for c in Component}


def build_component(component: Component, parts: dict[str, nn.Module]) -> nn.Module:
    """The component over the checkpoint parts that `PARTS` lists for it, already in memory."""
    match component:
        case Component.PROMPT_ENCODER:
            return PromptEncoder(parts["text_encoder"], parts["transformer"])
        case Component.DENOISER:
            return Denoiser(parts["transformer"])
        case Component.IMAGE_DECODER:
            return ImageDecoder(parts["vae"])


def _read_without_layers(folder: Path, dtype: torch.dtype) -> nn.Module:
    """`_read`, without the transformer's layers: most of its weights, which only the denoiser uses."""
    if folder.name != "transformer":
        return _read(folder, dtype)
    from diffusers.utils import logging as diffusers_logging

    level = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()  # otherwise it lists every weight it leaves out
    try:
        return _read(folder, dtype, n_layers=0)
    finally:
        diffusers_logging.set_verbosity(level)


def _read(folder: Path, dtype: torch.dtype, **config: int) -> nn.Module:
    """The model in one folder of a checkpoint; `config` overrides its config file.

    The libraries fill in missing tensors with random numbers and go on.
    """
    from diffusers import AutoencoderKL, ZImageTransformer2DModel
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoModel

    model: nn.Module
    try:
        match folder.name:
            case "text_encoder":
                encoder: Foreign
                encoder, loading = AutoModel.from_pretrained(folder, dtype=dtype, output_loading_info=True)
                # Causal without a mask, as `prompt_encoder` relies on, whatever the config asks for.
                encoder.set_attn_implementation("sdpa")
                model = encoder
            case name:
                # Weights are mapped from their file either way; without `low_cpu_mem_usage=False` diffusers asks for
                # accelerate at every load.
                kind = {"transformer": ZImageTransformer2DModel, "vae": AutoencoderKL}[name]
                model, loading = kind.from_pretrained(
                    folder, dtype=dtype, low_cpu_mem_usage=False, output_loading_info=True, **config
                )
    except RuntimeError as error:  # from both libraries, for other shapes
        raise CheckpointError(f"the weights in {folder} do not fit its config.json: {error}; {REMEDY}") from error
    except (ValueError, TypeError, LookupError, ImportError, StrictDataclassError) as error:  # about its config.json
        raise CheckpointError(f"{folder} cannot be read as its config.json says ({error!r}); {REMEDY}") from error
    missing = sorted(loading["missing_keys"])
    if missing:
        more = f" and {len(missing) - 1} others that" if missing[1:] else ", which"
        raise CheckpointError(f"{folder} holds no tensor {missing[0]}{more} its config.json promises; {REMEDY}")
    return model


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """Silences both libraries while they load weights: their progress bars would break up ours."""
    import diffusers.utils.logging as diffusers_logging
    import transformers.utils.logging as transformers_logging

    level = transformers_logging.get_verbosity()
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
