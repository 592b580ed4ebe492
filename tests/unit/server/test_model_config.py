"""`config.pbtxt` as Triton's protocol reads it: what is refused, what is told, which versions it chooses."""

from dataclasses import replace
from pathlib import Path

import pytest

from server.backends.base import ModelFolder, VersionPolicy
from server.backends.image_config import image_config
from server.errors import ConfigError
from server.queue_policy import LevelPolicy, QueuePolicy, TimeoutAction
from server.rpc.triton import image_model
from server.rpc.triton.model_config import complete_config, parse_model_file


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dynamic_batching { preserve_ordering: true }", "preserve_ordering.* not supported"),
        ("sequence_batching { }", "sequence_batching not supported; dynamic_batching is"),
        ("dynamic_batching { priority_levels: 2 default_priority_level: 3 }", "priority level 3 is not accepted"),
    ],
)
def test_scheduling_that_no_backend_serves_is_refused_by_name(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_model_file(text, "m")


@pytest.mark.parametrize("field", ["response_cache { enable: true }", "optimization { }", "model_warmup { name: 'x' }"])
def test_what_neither_the_server_nor_a_backend_reads_is_refused_with_what_is_accepted(field: str) -> None:
    name = field.partition(" ")[0]
    with pytest.raises(ConfigError, match=rf"model 'm': \['{name}'\] not supported; \['backend', 'dynamic_batching', "):
        parse_model_file(f"backend: 'identity' {field}", "m")


def test_the_image_models_own_fields_are_left_to_it() -> None:
    assert parse_model_file("response_cache { enable: true } model_warmup { name: '64x64' }", "m").backend == "z_image"


def test_what_is_told_of_an_image_model_can_be_sent_back(tmp_path: Path) -> None:
    """As clients do that change one setting of a model and load it again."""
    file = parse_model_file("parameters { key: 'max_num_images' value { string_value: '2' } }", "m")
    told = complete_config(file, image_model.model_spec(ModelFolder(tmp_path, "1", file)))
    again = ModelFolder(tmp_path, "1", parse_model_file(str(told), "m"))
    assert image_model.model_spec(again).inputs == image_model.INPUTS
    assert image_config(again.file).max_num_images == 2
    told.output[0].dims[2] = 4
    with pytest.raises(ConfigError, match="an image model has inputs and outputs of its own"):
        image_model.model_spec(replace(again, file=parse_model_file(str(told), "m")))


TENSOR = "{kind} {{ name: 'A' data_type: TYPE_UINT8 dims: [ {dims} ] }}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_batch_size: -3", "max_batch_size -3 is not accepted; 0 or more is"),
        ("instance_group { count: 2 } instance_group { count: -2 }", "instance_group count -2 is not accepted; 0 or"),
        (TENSOR.format(kind="input", dims="-1, -5"), "dims of 'A': -5 is not accepted; a size from 1 on is, or -1"),
        (TENSOR.format(kind="output", dims="0"), "dims of 'A': 0 is not accepted; a size from 1 on is, or -1"),
        (TENSOR.format(kind="output", dims="-2"), "dims of 'A': -2 is not accepted"),
        (2 * TENSOR.format(kind="input", dims="1"), "2 inputs are named 'A'; each needs a name of its own"),
        (2 * TENSOR.format(kind="output", dims="1"), "2 outputs are named 'A'"),
    ],
)
def test_what_means_nothing_in_a_config_is_refused_with_what_is_accepted(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"model 'm': {message}"):
        parse_model_file(text, "m")


def test_a_config_may_leave_numbers_at_what_they_are_without_it() -> None:
    tensors = "".join(TENSOR.format(kind=kind, dims="-1, 3") for kind in ("input", "output"))
    file = parse_model_file(f"max_batch_size: 0 instance_group {{ count: 0 }} {tensors}", "m")
    assert (file.max_batch_size, file.instances, file.inputs) == (0, 1, file.outputs)


def test_the_queue_of_a_config() -> None:
    text = """
    backend: "identity"
    max_batch_size: 4
    dynamic_batching {
      max_queue_delay_microseconds: 500
      priority_levels: 3
      default_queue_policy { timeout_action: DELAY default_timeout_microseconds: 2000000 }
      priority_queue_policy { key: 3 value { max_queue_size: 5 } }
    }
    """
    file = parse_model_file(text, "m")
    assert file.rows_together == 4
    assert file.queue == QueuePolicy(
        levels=3,
        default_level=2,
        default=LevelPolicy(None, 2.0, TimeoutAction.DELAY),
        by_level=((3, LevelPolicy(5)),),
        max_delay=0.0005,
    )
    assert parse_model_file("max_batch_size: 4", "m").rows_together == 1


@pytest.mark.parametrize(
    ("policy", "chosen"),
    [
        (VersionPolicy(), ["10"]),
        (VersionPolicy(latest=2), ["9", "10"]),
        (VersionPolicy(latest=0), ["2", "9", "10"]),
        (VersionPolicy(latest=0, specific=("2", "3")), ["2"]),
    ],
)
def test_version_policies(policy: VersionPolicy, chosen: list[str]) -> None:
    assert policy.choose(["10", "9", "2"]) == chosen
