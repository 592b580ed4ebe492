"""The config files of a checkpoint: the keys that matter here, each with what is accepted.

A key that a file leaves out has diffusers' own default, where there is one; keys that are not named here say nothing
that this export depends on.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Annotated, Any, get_args, get_type_hints

from export.errors import CheckpointError
from export.parsing import parsed
from export.spec import CAPTION_MULTIPLE, MAX_PROMPT_TOKENS, SIZE_MULTIPLE, SMALLEST_MAX_SIZE


@dataclass(frozen=True)
class Accepts:
    """What a key may be: in words, and as a test that is only asked about values of the key's type."""

    words: str
    test: Callable[[Any], bool]


def _whole(low: int, high: int) -> Accepts:
    return Accepts(f"a whole number from {low} to {high}", lambda value: low <= value <= high)


def _only(value: object) -> Accepts:
    written = json.dumps(value)
    return Accepts(f"only {written}", lambda found: bool(found == value))


def _four(kind: str) -> Accepts:
    """One for each of `block_out_channels`."""
    return Accepts(f'four times "{kind}"', lambda values: values == 4 * (kind,))


def _three(words: str, test: Callable[[int, int, int], bool]) -> Accepts:
    """One number for each axis: position in the caption, row, column."""
    return Accepts(f"three whole numbers, {words}", lambda values: len(values) == 3 and test(*values))


# Comparisons with NaN are false, so none of these takes it.
ABOVE_ZERO = Accepts("a number above 0", lambda value: 0 < value < math.inf)
FINITE = Accepts("a number", lambda value: -math.inf < value < math.inf)
BELOW_ONE = Accepts("a number above 0 and below 1", lambda value: 0 < value < 1)

LONGEST_CAPTION = MAX_PROMPT_TOKENS + CAPTION_MULTIPLE  # an image's position comes after its caption's
FEWEST_PATCHES = SMALLEST_MAX_SIZE // SIZE_MULTIPLE
MOST_POSITIONS = 1 << 16

_Size = Annotated[int, _whole(1, 1 << 24)]
_Layers = Annotated[int, _whole(1, 1000)]
_Off = Annotated[bool | None, Accepts("only false", lambda value: not value)]
_Silu = Annotated[str, _only("silu")]
_Unquantised = Annotated[
    object,
    Accepts(
        "only null, so the checkpoint as it was before it was quantised (--precision fp8 makes FP8 of that),",
        lambda value: value is None,
    ),
]


@dataclass(frozen=True)
class SchedulerConfig:
    """A flow-match schedule with a fixed shift; all that would make other noise levels of it is off."""

    shift: Annotated[float, ABOVE_ZERO]
    _class_name: Annotated[str, _only("FlowMatchEulerDiscreteScheduler")]
    num_train_timesteps: Annotated[int, _only(1000)] = 1000
    use_dynamic_shifting: _Off = False
    use_karras_sigmas: _Off = False
    use_exponential_sigmas: _Off = False
    use_beta_sigmas: _Off = False
    invert_sigmas: _Off = False
    stochastic_sampling: _Off = False
    shift_terminal: Annotated[float | None, _only(None)] = None


@dataclass(frozen=True)
class TransformerConfig:
    """The denoiser. Its blocks have one number of heads (diffusers ignores n_kv_heads), and normalise their queries."""

    in_channels: _Size
    dim: _Size
    n_layers: _Layers
    n_refiner_layers: _Layers
    n_heads: _Size
    n_kv_heads: _Size
    cap_feat_dim: _Size
    axes_dims: Annotated[
        tuple[int, ...], _three("above 0 and even", lambda *dims: all(d > 0 and d % 2 == 0 for d in dims))
    ]
    axes_lens: Annotated[
        tuple[int, ...],
        _three(
            f"the first from {LONGEST_CAPTION}, the others from {FEWEST_PATCHES}, all to {MOST_POSITIONS},",
            lambda caption, rows, columns: (
                LONGEST_CAPTION <= caption <= MOST_POSITIONS
                and all(FEWEST_PATCHES <= side <= MOST_POSITIONS for side in (rows, columns))
            ),
        ),
    ]
    _class_name: Annotated[str, _only("ZImageTransformer2DModel")] = "ZImageTransformer2DModel"
    all_patch_size: Annotated[tuple[int, ...], Accepts("only [2]", lambda value: value == (2,))] = (2,)
    all_f_patch_size: Annotated[tuple[int, ...], Accepts("only [1]", lambda value: value == (1,))] = (1,)
    qk_norm: Annotated[bool, _only(True)] = True
    norm_eps: Annotated[float, BELOW_ONE] = 1e-5
    rope_theta: Annotated[float, ABOVE_ZERO] = 256.0
    t_scale: Annotated[float, ABOVE_ZERO] = 1000.0
    quantization_config: _Unquantised = None

    @property
    def max_size(self) -> int:
        """Pixels a side that the position tables reach."""
        return min(self.axes_lens[1:]) * SIZE_MULTIPLE


@dataclass(frozen=True)
class TextEncoderConfig:
    """The prompt's reader, whose last layer is not used."""

    model_type: Annotated[str, _only("qwen3")]
    vocab_size: _Size
    hidden_size: _Size
    num_hidden_layers: Annotated[int, _whole(2, 1000)]
    num_attention_heads: _Size
    num_key_value_heads: _Size
    hidden_act: _Silu = "silu"
    use_sliding_window: _Off = False
    quantization_config: _Unquantised = None


@dataclass(frozen=True)
class VaeConfig:
    """The image decoder, with the encoder that previews are fitted with."""

    latent_channels: _Size
    block_out_channels: Annotated[
        tuple[int, ...],
        Accepts(
            "four whole numbers above 0, for 8 pixels a latent,",
            lambda values: len(values) == 4 and all(n > 0 for n in values),
        ),
    ]
    scaling_factor: Annotated[float, ABOVE_ZERO]
    shift_factor: Annotated[float, FINITE]
    down_block_types: Annotated[tuple[str, ...], _four("DownEncoderBlock2D")]
    up_block_types: Annotated[tuple[str, ...], _four("UpDecoderBlock2D")]
    _class_name: Annotated[str, _only("AutoencoderKL")] = "AutoencoderKL"
    in_channels: Annotated[int, _only(3)] = 3
    out_channels: Annotated[int, _only(3)] = 3
    layers_per_block: _Layers = 1
    norm_num_groups: _Size = 32
    act_fn: _Silu = "silu"
    quantization_config: _Unquantised = None


@dataclass(frozen=True)
class CheckpointConfigs:
    """All of them, each in range and in agreement with the others."""

    scheduler: SchedulerConfig
    transformer: TransformerConfig
    text_encoder: TextEncoderConfig
    vae: VaeConfig


FILES = {
    "scheduler": "scheduler/scheduler_config.json",
    "transformer": "transformer/config.json",
    "text_encoder": "text_encoder/config.json",
    "vae": "vae/config.json",
}


def checked_configs(raw: Mapping[str, Mapping[str, Any]]) -> CheckpointConfigs:
    """The configs in `raw`, which has the JSON objects by the names of `FILES`' values.

    Raises:
        CheckpointError: a key is missing, of another type, out of range, or does not fit another; the message names
            file, key and value, and says what is accepted.
    """
    kinds = get_type_hints(CheckpointConfigs)
    configs = CheckpointConfigs(**{name: _read(kinds[name], file, raw[file]) for name, file in FILES.items()})
    _check_agreement(configs)
    return configs


def _read(kind: type[Any], file: str, raw: Mapping[str, Any]) -> Any:
    hints = get_type_hints(kind, include_extras=True)
    required = [field.name for field in fields(kind) if field.default is MISSING]
    for key in required:
        if key not in raw:
            _, accepts = get_args(hints[key])
            raise CheckpointError(f"{file}: {key} is missing; {accepts.words} is accepted")
    return kind(**{key: _value(file, key, hints[key], raw[key]) for key in hints if key in raw})


def _value(file: str, key: str, hint: Any, raw: object) -> object:
    kind, accepts = get_args(hint)
    try:
        value: object = parsed(kind, raw)
    except TypeError:
        value = MISSING
    if value is MISSING or not accepts.test(value):
        raise CheckpointError(f"{file}: {key} is {json.dumps(raw)[:200]}; {accepts.words} is accepted")
    return value


def _check_agreement(configs: CheckpointConfigs) -> None:
    transformer, text_encoder, vae = configs.transformer, configs.text_encoder, configs.vae
    width = transformer.n_heads * sum(transformer.axes_dims)
    equal = (
        ("n_kv_heads", transformer.n_kv_heads, "n_heads", transformer.n_heads),
        ("dim", transformer.dim, "n_heads times the sum of axes_dims", width),
        ("cap_feat_dim", transformer.cap_feat_dim, "text encoder's hidden_size", text_encoder.hidden_size),
        ("in_channels", transformer.in_channels, "vae's latent_channels", vae.latent_channels),
    )
    for key, value, other, wanted in equal:
        if value != wanted:
            raise CheckpointError(f"{FILES['transformer']}: {key} is {value}; only the {other}, {wanted}, is accepted")
    heads, groups = text_encoder.num_attention_heads, text_encoder.num_key_value_heads
    if heads % groups:
        raise CheckpointError(
            f"{FILES['text_encoder']}: num_key_value_heads is {groups}; a divisor of num_attention_heads, {heads}, "
            "is accepted"
        )
    if any(channels % vae.norm_num_groups for channels in vae.block_out_channels):
        raise CheckpointError(
            f"{FILES['vae']}: norm_num_groups is {vae.norm_num_groups}; a divisor of all block_out_channels, "
            f"{list(vae.block_out_channels)}, is accepted"
        )
