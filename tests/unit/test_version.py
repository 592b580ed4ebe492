"""Which version of a model the commands about engines open."""

from pathlib import Path

import pytest

from verify.inspection import main


@pytest.mark.parametrize(
    ("there", "asked", "said"),
    [
        (["1", "2"], ["--version", "0"], "has no version 0: there are [1, 2]"),
        (["1", "2"], ["--version", "3"], "has no version 3: there are [1, 2]"),
        ([], [], "has no version at all: give a model's folder"),
    ],
)
def test_a_version_that_is_not_there_is_not_replaced_by_another(
    there: list[str], asked: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in there:
        (tmp_path / name).mkdir()
    assert main([str(tmp_path), *asked]) == 1
    assert said in capsys.readouterr().err
