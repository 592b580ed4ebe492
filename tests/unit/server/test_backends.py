"""The registry of backends, and what one refuses of its config."""

import re
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from server.backends import registry
from server.backends.base import Host, ModelFile, ModelFolder
from server.backends.identity import IdentityModel
from server.backends.z_image import ZImageModel
from server.config import ModelConfig, ServeConfig
from server.errors import ConfigError
from server.frontend.dispatcher import Dispatcher
from server.frontend.metrics import Metrics
from server.rpc.triton.model_config import parse_model_file
from server.tensors import DataType, InferRequest, Tensor, TensorSpec, join_strings
from tests.conftest import ROOT


@pytest.mark.parametrize("delay", ["nan", "-1", "3600001", "soon"])
async def test_a_delay_that_no_request_could_have_is_refused_with_the_model(delay: str) -> None:
    file = parse_model_file(
        f"backend: 'identity' parameters {{ key: 'execute_delay_ms' value {{ string_value: '{delay}' }} }}", "m"
    )
    host: Any = None
    with pytest.raises(ConfigError, match=f"execute_delay_ms: '{delay}' is not accepted; a number from 0 to 3.6e"):
        await IdentityModel(ModelFolder(Path("m"), "1", file), host).load()


async def test_an_image_model_is_made_from_what_was_read_of_its_config(tmp_path: Path) -> None:
    """The file may have been written again since, or be gone; its workers, and those that replace them, are told."""
    file = parse_model_file("parameters { key: 'max_num_images' value { string_value: '2' } }", "m")
    host = Host(ServeConfig(tmp_path), Dispatcher(Metrics()), tmp_path, lambda: None)
    queue = ZImageModel(ModelFolder(tmp_path / "m", "1", file), host).queue
    assert queue.config == ModelConfig("m", max_num_images=2)
    assert [worker.config.model for worker in queue.workers] == [queue.config]


async def test_an_image_model_whose_workers_could_not_be_reached_is_refused_with_the_reason(tmp_path: Path) -> None:
    """gRPC would only say that a connection broke off."""
    sockets = tmp_path / ("x" * 100)
    host = Host(ServeConfig(tmp_path), Dispatcher(Metrics()), sockets, lambda: None)
    with pytest.raises(ConfigError, match=r"at most 107 are possible; start the server with a shorter TMPDIR"):
        ZImageModel(ModelFolder(tmp_path / "m", "1", parse_model_file("", "m")), host)


async def test_a_package_can_add_a_backend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The example of docs/backends.md, as it stands there."""
    text = (ROOT / "docs" / "backends.md").read_text("utf-8")
    example = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    offer = re.search(r'^(\w+) = "(.*)"$', text, re.MULTILINE)
    assert example and offer
    (tmp_path / "reverse_backend.py").write_text(example[1], "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    entry = EntryPoint(offer[1], offer[2], registry.ENTRY_POINTS)
    monkeypatch.setattr(registry, "entry_points", lambda group: [entry])
    signature = (TensorSpec("TEXT", DataType.BYTES, (-1,)),)
    folder = ModelFolder(tmp_path, "1", ModelFile("reverse", "reverse", "", inputs=signature))
    model = registry.find_backend("reverse")(folder, None)  # type: ignore[arg-type]
    await model.load()
    tensor = Tensor("TEXT", DataType.BYTES, (2,), join_strings([b"abc", b"de"]))
    (response,) = [r async for r in model.infer(InferRequest(model.spec, "", {"TEXT": tensor}))]
    assert response.outputs[0].strings() == [b"cba", b"ed"]
    assert model.statistics.success.count == 1


@pytest.mark.parametrize("value", ["x", "gone"])
def test_a_backend_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    entry = EntryPoint("gone", "no_such_module:Model", registry.ENTRY_POINTS)
    monkeypatch.setattr(registry, "entry_points", lambda group: [entry])
    with pytest.raises(ConfigError, match=value):
        registry.find_backend(value)
