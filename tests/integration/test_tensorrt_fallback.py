"""A server whose TensorRT plans cannot be used here says so, each in its own words, and draws all the same."""

import json
import shutil
from pathlib import Path

import pytest

from export.repository import versions
from tests.conftest import MODEL
from tests.integration.process import ServerProcess


@pytest.fixture
def broken(tensorrt_repository: Path, tmp_path: Path) -> Path:
    """A repository with a plan cut short, a stale plan, and one for a GPU that is not here."""
    source = tensorrt_repository / MODEL
    model = tmp_path / "models" / MODEL
    shutil.copytree(source / str(versions(source)[-1]), model / "1")
    # Eager takes ten seconds for one image of the default size in bf16 on a CPU.
    config = (source / "config.pbtxt").read_text().replace("256x256", "64x64")
    (model / "config.pbtxt").write_text(config.replace("max_batch_size: 4", "max_batch_size: 1"))
    plan = model / "1" / "prompt_encoder.plan"
    plan.write_bytes(plan.read_bytes()[:1000])
    manifest = json.loads((model / "1" / "manifest.json").read_text())
    (denoiser,) = (e for e in manifest["engines"] if e["component"] == "denoiser")
    denoiser["built_with"]["tensorrt_rtx"] = "1.0"
    (model / "1" / "manifest.json").write_text(json.dumps(manifest))
    return model.parent


def test_damaged_stale_and_foreign_plans_fall_back(broken: Path) -> None:
    with ServerProcess(broken) as server, server.client() as client:
        drawing = client.draw("a red circle on a white background", num_inference_steps=1)
    assert len(drawing.images) == 1
    reasons = {use.component: use.fallback_reason for use in drawing.completed.engines}
    assert "prompt_encoder.plan expected, 1000 found" in reasons["prompt_encoder"]
    assert "was built with tensorrt_rtx 1.0, this is" in reasons["denoiser"]
    assert "was built for cuda (compute capability 8.9), cuda" in reasons["image_decoder"]
    for reason in reasons.values():
        assert "--backend tensorrt_rtx" in reason
        assert "--target sm89,sm120" in reason


def test_require_engine_refuses_to_start_on_them(broken: Path) -> None:
    server = ServerProcess(broken, "--require-engine")
    assert server.ended() == 1
    assert "--require-engine forbids eager" in server.log
