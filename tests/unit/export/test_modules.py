"""The components against diffusers itself, which is the definition of right."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ZImagePipeline
from torch import Tensor

from export.modules import build_components, load, load_components
from export.modules.image_decoder import ImageDecoder, attend_in_slices
from export.modules.load import build_component
from export.modules.outline import outline_component
from export.spec import Component, Precision
from tests.conftest import CHECKPOINT, load_pipeline

# latent height and width, tokens of each row's caption (all of one padded length)
CASES = [
    ((32, 32), [15]),
    ((32, 40), [33, 64]),
    ((36, 44), [40, 60, 33]),  # 396 image tokens: padded to 416
    ((26, 30), [3, 20, 31, 32]),
]


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def pair(request: pytest.FixtureRequest, pipeline: ZImagePipeline) -> tuple[ZImagePipeline, float]:
    """A pipeline and the relative error its precision allows."""
    if request.param is torch.float32:
        return pipeline, 1e-6
    return load_pipeline(torch.bfloat16), 1e-2


def relative(got: Tensor, expected: Tensor) -> float:
    got, expected = got.double(), expected.double()
    return float((got - expected).norm() / expected.norm())


def diffusers_velocity(
    pipeline: ZImagePipeline, latents: Tensor, times: Tensor, ids: Tensor, lengths: list[int]
) -> Tensor:
    """What the pipeline's own loop does with a right-padded batch of token ids."""
    mask = torch.arange(ids.shape[1])[None] < torch.tensor(lengths)[:, None]
    hidden = pipeline.text_encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[-2]
    captions = [row[:length] for row, length in zip(hidden, lengths, strict=True)]
    rows = [row.unsqueeze(1).to(pipeline.transformer.dtype) for row in latents]
    out = pipeline.transformer(rows, times, captions, return_dict=False)[0]
    return -torch.stack(list(out)).squeeze(2).float()


def test_attention_of_the_prompt_is_causal_whatever_the_config_asks_for(tmp_path: Path) -> None:
    """transformers' own implementation of it is not, where it is given no mask."""
    copy = tmp_path / "checkpoint"
    shutil.copytree(CHECKPOINT, copy)
    config = copy / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_attn_implementation": "eager"}))
    plain, asked = (
        load_components(path, precision=Precision.FP32, device="cpu", wanted=[Component.PROMPT_ENCODER])
        for path in (CHECKPOINT, copy)
    )
    ids, lengths = torch.arange(32)[None] + 5, torch.tensor([20])
    with torch.inference_mode():
        got, expected = (modules[Component.PROMPT_ENCODER](ids, lengths) for modules in (asked, plain))
    assert relative(got, expected) < 1e-5


@pytest.mark.parametrize(("size", "lengths"), CASES)
def test_prompt_encoder_and_denoiser_equal_diffusers(
    pair: tuple[ZImagePipeline, float], size: tuple[int, int], lengths: list[int]
) -> None:
    pipeline, tolerance = pair
    components = build_components(pipeline)
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(len(lengths), 16, *size, generator=generator)
    times = torch.rand(len(lengths), generator=generator)
    padded = -(-max(lengths) // 32) * 32
    vocabulary = pipeline.text_encoder.config.vocab_size
    ids = torch.randint(0, vocabulary, (len(lengths), padded), generator=generator)
    with torch.inference_mode():
        caption = components[Component.PROMPT_ENCODER](ids, torch.tensor(lengths))
        velocity = components[Component.DENOISER](latents, times, caption)
        expected = diffusers_velocity(pipeline, latents, times, ids, lengths)
    assert velocity.dtype == caption.dtype == torch.float32
    assert relative(velocity, expected) <= tolerance


@pytest.mark.parametrize("size", [(16, 16), (12, 20)])
def test_image_decoder_equals_diffusers(pair: tuple[ZImagePipeline, float], size: tuple[int, int]) -> None:
    pipeline, tolerance = pair
    latents = torch.randn(2, 16, *size, generator=torch.Generator().manual_seed(2))
    config = pipeline.vae.config
    with torch.inference_mode():
        image = build_components(pipeline)[Component.IMAGE_DECODER](latents)
        scaled = latents.to(pipeline.vae.dtype) / config.scaling_factor + config.shift_factor
        decoded = pipeline.vae.decode(scaled, return_dict=False)[0]
        expected = pipeline.image_processor.postprocess(decoded, output_type="np")
    expected = (expected * 255).round().astype(np.uint8)
    assert image.shape == (2, 8 * size[0], 8 * size[1], 3)
    assert relative(image, torch.from_numpy(expected)) <= tolerance
    assert np.abs(image.numpy().astype(int) - expected.astype(int)).max() <= 1


def test_an_image_decoder_that_attends_in_slices_draws_the_same(pipeline: ZImagePipeline) -> None:
    latents = torch.randn(1, 16, 12, 20, generator=torch.Generator().manual_seed(2))
    decoder = build_components(pipeline)[Component.IMAGE_DECODER]
    assert isinstance(decoder, ImageDecoder)
    whole = decoder(latents).int()
    kept = [attention.processor for attention in decoder.decoder.mid_block.attentions]
    attend_in_slices(decoder)
    sliced = decoder(latents).int()
    for attention, processor in zip(decoder.decoder.mid_block.attentions, kept, strict=True):
        attention.processor = processor  # others use this pipeline too
    assert (sliced - whole).abs().max() <= 1
    assert whole.float().std() > 1


def test_an_image_decoder_without_attention_is_traced_too(tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    config = json.loads((CHECKPOINT / "vae" / "config.json").read_text())
    (tmp_path / "vae" / "config.json").write_text(json.dumps({**config, "mid_block_add_attention": False}))
    outline = outline_component(tmp_path, Component.IMAGE_DECODER, Precision.FP32)
    assert not any("attention" in name for name in outline.sources)


def test_weights_are_shared(pipeline: ZImagePipeline) -> None:
    """An engine over the components costs no second copy of the checkpoint."""
    own = {
        p.data_ptr() for part in ("transformer", "text_encoder", "vae") for p in getattr(pipeline, part).parameters()
    }
    components = build_components(pipeline)
    assert all(p.data_ptr() in own for module in components.values() for p in module.parameters())


def test_the_prompt_encoder_alone_is_read_without_the_denoisers_layers(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def build(component: Component, parts: dict[str, torch.nn.Module]) -> torch.nn.Module:
        layers.append(len(parts["transformer"].layers))  # type: ignore[arg-type]
        return build_component(component, parts)

    layers: list[int] = []
    both = load_components(CHECKPOINT, precision=Precision.FP32, device="cpu", wanted=list(Component)[:2])
    monkeypatch.setattr(load, "build_component", build)
    capfd.readouterr()
    (alone,) = load_components(CHECKPOINT, precision=Precision.FP32, device="cpu", wanted=list(Component)[:1]).values()
    assert layers == [0]
    assert capfd.readouterr().err == "", "diffusers names no weight that it was told to leave out"
    expected = both[Component.PROMPT_ENCODER].state_dict()
    assert alone.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in alone.state_dict().items())
