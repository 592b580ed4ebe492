"""What the three components take and give, said once.

ONNX axes, dynamic shapes, warm-up shapes, parity inputs and served metadata are all derived from `ComponentSpec`.
Every floating-point tensor at a component's boundary is fp32, whatever precision is inside, so one spec serves all
precisions; the casts cost nothing beside the component.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PIXELS_PER_LATENT = 8
SIZE_MULTIPLE = 16  # two latents, one 2x2 patch
MIN_SIZE = 64  # pixels a side
CAPTION_MULTIPLE = 32  # the denoiser pads every caption and image to a multiple of 32 tokens
MAX_PROMPT_TOKENS = 512  # of the templated prompt, as in diffusers' ZImagePipeline


class Precision(StrEnum):
    """What a component computes in. fp16 is not offered: this model's activations overflow it."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP8 = "fp8"  # bf16, but for the denoiser's large matrix products in compiled engines (`export.modules.quantized`)

    @property
    def weights(self) -> "Precision":
        """What weights are read in, and what eager computes in."""
        return Precision.BF16 if self is Precision.FP8 else self


class Component(StrEnum):
    """The three graphs, in the order a request meets them."""

    PROMPT_ENCODER = "prompt_encoder"
    DENOISER = "denoiser"
    IMAGE_DECODER = "image_decoder"


class DType(StrEnum):
    """Element types that cross a component's boundary, by numpy's names."""

    FLOAT32 = "float32"
    INT64 = "int64"
    UINT8 = "uint8"


class Dim(StrEnum):
    """A dimension that changes from call to call."""

    BATCH = "batch"
    CAPTION = "caption_tokens"
    LATENT_HEIGHT = "latent_height"
    LATENT_WIDTH = "latent_width"
    IMAGE_HEIGHT = "image_height"
    IMAGE_WIDTH = "image_width"


@dataclass(frozen=True)
class ShapePoint:
    """One concrete choice of every dynamic dimension. Sizes in pixels, caption in tokens (a multiple of 32)."""

    batch: int
    caption: int
    height: int
    width: int

    def size(self, dim: Dim) -> int:
        """The value of `dim` here."""
        return {
            Dim.BATCH: self.batch,
            Dim.CAPTION: self.caption,
            Dim.LATENT_HEIGHT: self.height // PIXELS_PER_LATENT,
            Dim.LATENT_WIDTH: self.width // PIXELS_PER_LATENT,
            Dim.IMAGE_HEIGHT: self.height,
            Dim.IMAGE_WIDTH: self.width,
        }[dim]


# The least PSNR in dB between whole images from engines and from eager; differences grow over the steps.
# With random weights of the published shapes an H200 gave 37.9 dB in fp8 and 45.7 in bf16, both from diffusers in bf16;
# fp8's limit is low enough that only another picture is below it.
IMAGE_PSNR = {Precision.FP32: 40.0, Precision.BF16: 20.0, Precision.FP8: 12.0}

# Of the denoiser, against eager in bf16. On an H200 with random weights of the published shapes 9.2 % at the export's
# check, 7.0 % at 1024x1024 and 512x512; the demo's are held to it by tests/gpu, and are 3 % away by the references'
# arithmetic on a CPU.
FP8_TOLERANCE = 1.5e-1

# torch.export takes no example at which a dynamic dimension has a special value: batch 1, one block of caption
# tokens, or a square would each be baked into the graph.
EXPORT_EXAMPLE = ShapePoint(batch=2, caption=64, height=256, width=320)
SMALLEST_MAX_SIZE = max(EXPORT_EXAMPLE.height, EXPORT_EXAMPLE.width)  # pixels; a model's longest side is no less


def pixels(size: str) -> tuple[int, int]:
    """Width and height of "WIDTHxHEIGHT"."""
    width, height = size.split("x")
    return int(width), int(height)


@dataclass(frozen=True)
class TensorSpec:
    """Name, element type and dimensions of one tensor; an int is fixed, a `Dim` changes from call to call."""

    name: str
    dtype: DType
    dims: tuple[int | Dim, ...]

    def shape(self, point: ShapePoint) -> tuple[int, ...]:
        """The concrete shape at `point`."""
        return tuple(point.size(d) if isinstance(d, Dim) else d for d in self.dims)

    def served_shape(self) -> tuple[int, ...]:
        """The shape with -1 for every dynamic dimension, as served metadata writes it."""
        return tuple(-1 if isinstance(d, Dim) else d for d in self.dims)


@dataclass(frozen=True)
class ComponentSpec:
    """One component: its tensors, and how far a compiled engine may stray from eager."""

    component: Component
    inputs: tuple[TensorSpec, ...]
    output: TensorSpec
    onnx_opset: int
    tolerance: Mapping[Precision, float]  # relative L2 error

    def input_shapes(self, point: ShapePoint) -> dict[str, tuple[int, ...]]:
        """Concrete shapes of the inputs at `point`, by name."""
        return {t.name: t.shape(point) for t in self.inputs}

    def dynamic_shapes(self, max_batch: int, max_size: int) -> tuple[dict[int, object], ...]:
        """torch.export's `dynamic_shapes` for the inputs, in order."""
        from torch.export import Dim as Symbol

        patches = max_size // SIZE_MULTIPLE
        symbols: dict[Dim, object] = {
            Dim.BATCH: Symbol("batch", min=1, max=max(2, max_batch)),
            Dim.CAPTION: CAPTION_MULTIPLE * Symbol("caption", min=1, max=MAX_PROMPT_TOKENS // CAPTION_MULTIPLE),
            Dim.LATENT_HEIGHT: 2 * Symbol("rows", min=MIN_SIZE // SIZE_MULTIPLE, max=patches),
            Dim.LATENT_WIDTH: 2 * Symbol("columns", min=MIN_SIZE // SIZE_MULTIPLE, max=patches),
        }
        return tuple(
            {axis: symbols[dim] for axis, dim in enumerate(spec.dims) if isinstance(dim, Dim)} for spec in self.inputs
        )


@dataclass(frozen=True)
class ModelDimensions:
    """The sizes of a checkpoint that its tensors' shapes depend on."""

    latent_channels: int
    caption_dim: int  # width of the encoded caption, the denoiser's own
    vocabulary: int


def component_specs(dimensions: ModelDimensions) -> dict[Component, ComponentSpec]:
    """The specs of all three components for a model of these dimensions."""
    latent_dims = (Dim.BATCH, dimensions.latent_channels, Dim.LATENT_HEIGHT, Dim.LATENT_WIDTH)
    latents = TensorSpec("latents", DType.FLOAT32, latent_dims)
    caption = TensorSpec("caption", DType.FLOAT32, (Dim.BATCH, Dim.CAPTION, dimensions.caption_dim))
    # bf16: engines round less often than eager. Deep stacks of random weights, where nothing damps what rounding does,
    # were seen 3.7 % from eager with the published shapes; trained ones 1 %.
    tolerance = {Precision.FP32: 1e-5, Precision.BF16: 5e-2, Precision.FP8: 5e-2}
    return {
        Component.PROMPT_ENCODER: ComponentSpec(
            Component.PROMPT_ENCODER,
            (
                TensorSpec("input_ids", DType.INT64, (Dim.BATCH, Dim.CAPTION)),
                TensorSpec("caption_length", DType.INT64, (Dim.BATCH,)),
            ),
            caption,
            onnx_opset=23,
            tolerance=tolerance,
        ),
        Component.DENOISER: ComponentSpec(
            Component.DENOISER,
            (latents, TensorSpec("timestep", DType.FLOAT32, (Dim.BATCH,)), caption),
            TensorSpec("velocity", DType.FLOAT32, latent_dims),
            onnx_opset=23,
            tolerance={**tolerance, Precision.FP8: FP8_TOLERANCE},
        ),
        # One image a call, as the server decodes: one fills the device, and a batch's activations pass 2^31 elements.
        # Opset 20: the attention node of opset 23 has no fused TensorRT kernel for the VAE's single wide head.
        Component.IMAGE_DECODER: ComponentSpec(
            Component.IMAGE_DECODER,
            (TensorSpec("latents", DType.FLOAT32, (1, *latent_dims[1:])),),
            TensorSpec("image", DType.UINT8, (1, Dim.IMAGE_HEIGHT, Dim.IMAGE_WIDTH, 3)),
            onnx_opset=20,
            # A rounding that falls the other way is one grey level of 255 on a few pixels.
            tolerance={Precision.FP32: 1e-3, Precision.BF16: 3e-2, Precision.FP8: 3e-2},
        ),
    }


def example_inputs(
    spec: ComponentSpec,
    point: ShapePoint,
    dimensions: ModelDimensions,
    *,
    seed: int = 0,
    device: "torch.device | str" = "cpu",
) -> dict[str, "torch.Tensor"]:
    """Random inputs of the right kind for `spec` at `point`: normal latents, uniform timesteps, real token ids.

    Used as export examples, parity inputs and warm-up inputs alike. Drawn on the CPU, so the same for the same seed on
    every device.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    made: dict[str, torch.Tensor] = {}
    for tensor in spec.inputs:
        shape = tensor.shape(point)
        match tensor.name:
            case "input_ids":
                made[tensor.name] = torch.randint(0, dimensions.vocabulary, shape, generator=generator)
            case "caption_length":
                made[tensor.name] = torch.randint(
                    point.caption - CAPTION_MULTIPLE + 1, point.caption + 1, shape, generator=generator
                )
            case "timestep":
                made[tensor.name] = torch.rand(shape, generator=generator)
            case _:
                made[tensor.name] = torch.randn(shape, generator=generator)
    return {name: tensor.to(device) for name, tensor in made.items()}
