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

    def load_constants(
        self,
        wanted: dict[str, torch.Tensor],
        use_inactive: bool,
        check_full_update: bool,
        user_managed: bool,
        *_: bool,  # what newer versions of torch ask for besides
    ) -> None:
        assert not use_inactive
        assert check_full_update
        assert user_managed, "else the weights would be there twice"
        self.lent = wanted


@pytest.mark.parametrize(("device", "index"), [("cpu", -1), ("cuda:0", 0), ("cuda:1", 1)])
def test_a_package_is_loaded_onto_the_device_of_the_weights_it_is_lent(
    device: str, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def load(*arguments: object) -> Package:
        asked.extend(arguments)
        return package

    package = Package()
    monkeypatch.setattr(torch._C._aoti, "AOTIModelPackageLoader", load)
    module = Elsewhere(torch.device(device))
    open_package(Path("denoiser.pt2"), module)
    single_threaded, runners = True, 1
    assert asked == ["denoiser.pt2", "model", single_threaded, runners, index]
    assert package.lent["bias"] is module.bias
