"""Random weights of the published config, shrunken; and engines that are not what they should be."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import diffusers_row, published
from benchmarks.choice import COMPILED, DIFFUSERS, FP8, Choice, backend_of
from benchmarks.diffusers_row import DiffusersRow
from benchmarks.engine_row import EngineRow
from benchmarks.engines import checked_version, version_folder
from benchmarks.record import BenchmarkError
from benchmarks.rows import compare_images
from benchmarks.subject import Counted, Subject, describe, load_pipeline, open_subject
from export.checkpoint import open_checkpoint
from export.manifest import Backend, Manifest
from export.spec import IMAGE_PSNR, Component, Precision
from server.engines.served import ServedComponent
from tests.conftest import CHECKPOINT
from tests.fakes import FakeEngine

SMALL = {
    "transformer": {"dim": 192, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 3, "n_kv_heads": 3, "cap_feat_dim": 64,
                    "axes_dims": [16, 24, 24]},
    "text_encoder": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
                     "num_key_value_heads": 1, "head_dim": 32},
    "vae": {"block_out_channels": [32, 32, 32, 32], "layers_per_block": 1},
}  # fmt: skip


@pytest.fixture
def choice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Choice:
    """Random weights on the CPU, small enough for it."""
    for part, changes in SMALL.items():
        monkeypatch.setitem(published.CONFIGS, part, {**published.CONFIGS[part], **changes})
    backends = (DIFFUSERS, Backend.EAGER.value)
    checkpoint = published.checkpoint(tmp_path, "cpu", Precision.FP32)
    return Choice(checkpoint, backends, models={}, repository=tmp_path, device="cpu", sizes=("64x96",))


def test_random_weights_draw_the_same_through_both_rows(choice: Choice) -> None:
    subject, pipeline = open_subject(choice)
    rows = DiffusersRow(pipeline, subject.device), EngineRow(subject, Backend.EAGER)
    drawn = [row.draw(["a cat", "a dog"], size="64x96", steps=2, seed=5) for row in rows]
    (expected, _), (images, stages) = drawn
    assert compare_images(images, expected, IMAGE_PSNR[Precision.FP32])["largest_difference"] <= 1
    assert images[0].shape == (96, 64, 3)
    assert len({image.tobytes() for image in images}) == 2  # each from its own seed
    assert images[0].std() > 1
    assert set(stages) == set(Component)
    assert [dict(row.calls) for row in rows] == [row.calls_of(images=2, steps=2) for row in rows]


def test_a_prompt_is_encoded_for_every_image_as_diffusers_does(choice: Choice) -> None:
    subject, _ = open_subject(choice)
    row = EngineRow(subject, Backend.EAGER)
    row.draw(["a cat"] * 2, size="64x96", steps=2, seed=5)
    assert row.calls == row.calls_of(images=2, steps=2)


def test_compiled_diffusers_is_a_row_beside_eager_diffusers(choice: Choice, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a compiler that counts instead: the transformer's and the decoder's calls are its; eager has none there."""
    through: Counter[str] = Counter()

    def count(function: Callable[..., object]) -> Callable[..., object]:
        def counted(*arguments: object, **options: object) -> object:
            through[function.__qualname__] += 1
            return function(*arguments, **options)

        return counted

    monkeypatch.setattr(torch, "compile", count)
    pipeline = load_pipeline(choice)
    weights = pipeline.transformer.state_dict()
    both = diffusers_row.rows(pipeline, torch.device("cpu"), [DIFFUSERS, COMPILED])
    alone = diffusers_row.rows(load_pipeline(choice), torch.device("cpu"), [DIFFUSERS])
    assert list(alone) == [DIFFUSERS]
    expected, _ = both[DIFFUSERS].draw(["a cat"], size="64x96", steps=2, seed=5)
    assert not through
    images, stages = both[COMPILED].draw(["a cat"], size="64x96", steps=2, seed=5)
    assert through == {"ZImageTransformer2DModel.forward": 2, "AutoencoderKL.decode": 1}
    assert compare_images(images, expected, IMAGE_PSNR[Precision.FP32])["psnr_db"] is None
    assert set(stages) == set(Component)
    assert [row.calls for row in both.values()] == [DiffusersRow.calls_of(images=1, steps=2)] * 2
    shared = both[COMPILED]._pipeline.transformer.state_dict()
    assert all(shared[name].data_ptr() == value.data_ptr() for name, value in weights.items())


def test_random_weights_are_the_same_every_time_and_make_a_whole_checkpoint(choice: Choice) -> None:
    """In bf16, as on a GPU; what a server needs is written once."""
    pipeline = published.random_pipeline("cpu", Precision.BF16)
    again = published.random_pipeline("cpu", Precision.BF16)
    for name in published.CONFIGS:
        weights, others = getattr(pipeline, name).state_dict(), getattr(again, name).state_dict()
        assert all(torch.equal(value, others[key]) for key, value in weights.items()), name
        assert {p.dtype for p in getattr(pipeline, name).parameters()} == {torch.bfloat16}
        assert all(bool(torch.isfinite(p).all()) for p in getattr(pipeline, name).parameters())
    checkpoint = open_checkpoint(choice.checkpoint)
    assert (checkpoint.dimensions, checkpoint.shift) == (published.dimensions(), published.SHIFT)
    served = load_pipeline(choice)
    assert torch.equal(served.text_encoder.norm.weight, torch.ones(64))
    expected = published.random_pipeline("cpu", choice.precision).transformer.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in served.transformer.state_dict().items())
    changed = (choice.checkpoint / "model_index.json").stat().st_mtime_ns
    assert published.checkpoint(choice.repository, "cpu", Precision.FP32) == choice.checkpoint
    assert (choice.checkpoint / "model_index.json").stat().st_mtime_ns == changed


def test_engines_of_random_weights_are_exported_once(choice: Choice, capfd: pytest.CaptureFixture[str]) -> None:
    folder = version_folder(choice, Backend.EAGER)
    assert Manifest.read(folder).checkpoint.path == str(choice.checkpoint)
    assert version_folder(choice, Backend.EAGER) == folder


def test_a_version_is_of_the_checkpoint_and_precision_that_the_record_says(choice: Choice) -> None:
    folder, manifest = checked_version(choice, Backend.EAGER)
    assert (folder, manifest) == (version_folder(choice, Backend.EAGER), Manifest.read(folder))
    models = {Backend.EAGER.value: folder, FP8: folder}
    given = replace(choice, models=models)
    assert checked_version(given, Backend.EAGER) == (folder, manifest)
    with pytest.raises(BenchmarkError, match=r"is fp32 from .*, and is to be measured as fp8"):
        checked_version(given, FP8)
    with pytest.raises(BenchmarkError, match=r"measured as fp32 from .*demo/checkpoint: give the --checkpoint"):
        checked_version(replace(given, checkpoint=CHECKPOINT), Backend.EAGER)


def test_a_model_that_lacks_an_engine_is_not_measured_on_eager_in_its_name(choice: Choice, tmp_path: Path) -> None:
    describe(choice).write(tmp_path)
    with pytest.raises(BenchmarkError, match="prompt_encoder: onnxruntime is to be measured, and eager answers: there"):
        open_subject(replace(choice, backends=("eager", "onnxruntime"), models={"onnxruntime": tmp_path}))


def test_a_row_in_fp8_stands_beside_the_others(choice: Choice) -> None:
    assert {row: (backend_of(row), choice.precision_of(row)) for row in (FP8, Backend.AOTINDUCTOR)} == {
        "aotinductor-fp8": (Backend.AOTINDUCTOR, Precision.FP8),
        "aotinductor": (Backend.AOTINDUCTOR, Precision.FP32),
    }


def served(choice: Choice, engine: FakeEngine, reason: str = "") -> ServedComponent:
    spec = Subject(choice, describe(choice), {}).specs[Component.IMAGE_DECODER]
    eager = FakeEngine(lambda inputs: inputs["latents"], backend=Backend.EAGER)
    return ServedComponent(spec, engine, lambda: eager, reason=reason)


def test_an_engine_is_counted_and_nothing_else_answers_for_it(choice: Choice) -> None:
    inputs = {"latents": torch.zeros(1, 16, 8, 8)}
    engine = FakeEngine(lambda inputs: inputs["latents"])
    counted = Counted(served(choice, engine), Backend.ONNXRUNTIME)
    counted.run(inputs)
    counted.run(inputs)
    assert (counted.calls, engine.calls) == (2, 2)
    engine.accepts = lambda shapes: False
    with pytest.raises(BenchmarkError, match=r"onnxruntime is to be measured, and eager answers: .*not built for"):
        counted.run(inputs)
    assert counted.calls == 2
    with pytest.raises(BenchmarkError, match="stale"):
        Counted(served(choice, FakeEngine(lambda inputs: inputs["latents"]), "it is stale"), Backend.ONNXRUNTIME)


def test_another_image_is_not_timed() -> None:
    black, white = torch.zeros(8, 8, 3).numpy().astype("uint8"), torch.full((8, 8, 3), 255).numpy().astype("uint8")
    assert compare_images([black], [black], 20.0) == {"psnr_db": None, "largest_difference": 0}
    with pytest.raises(BenchmarkError, match="the image is another one"):
        compare_images([black, black], [black, white], 20.0)
