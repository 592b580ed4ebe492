"""On an NVIDIA GPU: what is not a step runs beside steps, and images come out the same. Run by `make test-gpu`."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from export.manifest import CheckpointRecord, Manifest, PreviewProjection
from export.spec import Component, ModelDimensions, Precision, component_specs
from server.engines.eager import EagerEngine, EagerModules
from server.engines.served import ServedComponent
from server.worker.executor import Executor
from server.worker.lanes import lanes
from server.worker.sequences import ImageSequence, make_sequences
from tests.conftest import CHECKPOINT
from tests.fakes import a_request

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
CUDA = torch.device("cuda")
LONG = 2_000_000_000  # cycles of the device: about a second, hundreds of steps


def test_a_step_does_not_wait_for_a_decode() -> None:
    on = lanes(CUDA)
    waiting = torch.ones(1, device=CUDA)
    torch.cuda._sleep(1)
    assert (waiting + 1).item() == 2  # a kernel's first use may wait for everything else

    def decode():  # type: ignore[no-untyped-def]
        torch.cuda._sleep(LONG)
        made = (waiting + 1).to("cpu", non_blocking=True)
        return made.item

    decoding = on[Component.IMAGE_DECODER].start(decode)
    stepped = on[Component.DENOISER].start(lambda: (waiting + 2).item)
    assert stepped.result() == 3
    assert not decoding.done()
    assert decoding.result() == 2
    assert decoding.done()


@pytest.fixture(scope="module")
def executor() -> Executor:
    dimensions = ModelDimensions(16, 192, 1024)
    preview = PreviewProjection(tuple((0.0, 0.0, 0.0) for _ in range(16)), (0.0, 0.0, 0.0))
    manifest = Manifest(
        name="demo",
        created="",
        checkpoint=CheckpointRecord(str(CHECKPOINT), "", dimensions, 3.0),
        precision=Precision.FP32,
        max_batch=4,
        max_size=1024,
        default_size="256x256",
        engines=(),
        preview=preview,
        source="",
    )
    modules = EagerModules(Path(CHECKPOINT), Precision.FP32, "cuda")
    specs = component_specs(dimensions)
    engines = {c: EagerEngine(modules[c]) for c in Component}
    components = {c: ServedComponent(specs[c], e, lambda e=e: e) for c, e in engines.items()}  # type: ignore[misc]
    return Executor(components, manifest, "cuda", prompt_cache_size=8)


def sequence(seed: int, size: int) -> ImageSequence:
    request = dataclasses.replace(a_request(), seed=seed, width=size, height=size, num_inference_steps=4)
    return make_sequences(request, ((1,) * 20,), key=seed, shift=3.0, now=0.0)[0]


def denoised(executor: Executor, one: ImageSequence) -> ImageSequence:
    executor.encode(one).result()
    for _ in range(one.steps):  # one behind the other, as the loop gives them to the device
        step = executor.denoise([one])
        one.step += 1
    step.result()
    return one


def test_images_are_the_same_beside_others(executor: Executor) -> None:
    alone = [executor.decode(denoised(executor, sequence(seed, 512))).result() for seed in range(4)]
    pending = []
    for seed in range(4):
        pending.append(executor.decode(denoised(executor, sequence(seed, 512))))
        denoised(executor, sequence(100 + seed, 256))  # steps, and new use of whatever memory was freed too early
    for expected, beside in zip(alone, pending, strict=True):
        assert np.abs(beside.result().astype(int) - expected.astype(int)).max() <= 1
