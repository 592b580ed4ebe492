"""AOTInductor packages on the GPU that they are asked for."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from export.packages import open_package


class Elsewhere(nn.Module):
    """A module whose weights say that they are on `device`."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1))
        self._device = device

    def parameters(self, recurse: bool = True) -> Iterator[Any]:
        yield SimpleNamespace(device=self._device)


class Package:
    """What torch gives: it asks for a weight by name."""

    def __init__(self) -> None:
        self.lent: dict[str, torch.Tensor] = {}

    def get_constant_fqns(self) -> list[str]:
        return ["bias"]

    def load_constants(self, wanted: dict[str, torch.Tensor], *, check_full_update: bool, user_managed: bool) -> None:
        assert check_full_update
        assert user_managed, "else the weights would be there twice"
        self.lent = wanted


@pytest.mark.parametrize(("device", "index"), [("cpu", -1), ("cuda:0", 0), ("cuda:1", 1)])
def test_a_package_is_loaded_onto_the_device_of_the_weights_it_is_lent(
    device: str, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def load(path: str, **options: Any) -> Package:
        asked.update(options, path=path)
        return Package()

    monkeypatch.setattr(torch._inductor, "aoti_load_package", load)
    module = Elsewhere(torch.device(device))
    package: Any = open_package(Path("denoiser.pt2"), module)
    assert asked == {"path": "denoiser.pt2", "run_single_threaded": True, "device_index": index}
    assert package.lent["bias"] is module.bias
