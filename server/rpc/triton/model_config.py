"""Triton's ModelConfig, both ways: read from config.pbtxt, and sent to clients with what the file leaves out.

Nothing else of the server reads `config.pbtxt`.
"""

from collections import Counter
from pathlib import Path
from typing import Any

from google.protobuf import json_format, text_format
from tritonclient.grpc import model_config_pb2 as pb

from server.backends.base import InstanceGroup, ModelFile, VersionPolicy
from server.errors import ConfigError, InvalidRequestError
from server.queue_policy import DEFAULT_MAX_QUEUE_SIZE, read_queue_policy
from server.tensors import DataType, ModelSpec, TensorSpec

TYPE_PREFIX = "TYPE_"
TYPE_STRING = "TYPE_STRING"  # the config's name for BYTES
IMAGE_BACKEND = "z_image"
FIELDS = {
    "name",
    "backend",
    "version_policy",
    "max_batch_size",
    "input",
    "output",
    "dynamic_batching",
    "instance_group",
    "parameters",
    "model_transaction_policy",
}
IMAGE_FIELDS = FIELDS | {"model_warmup", "response_cache"}
OTHER_FIELDS = FIELDS | {"platform"}


def read_model_file(folder: Path) -> ModelFile:
    """What `folder`/config.pbtxt says.

    Raises:
        ConfigError: it is missing, does not parse, or asks for something not served.
    """
    path = folder / "config.pbtxt"
    try:
        return parse_model_file(path.read_text("utf-8"), folder.name)
    except (OSError, text_format.ParseError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error


def parse_model_file(text: str, name: str) -> ModelFile:
    """The config of the model called `name`; the meaning of its parameters is up to the backend.

    Raises:
        ConfigError: it asks for something not served, or has a meaningless value.
        ParseError, ValueError: it is no config, or not this model's.
    """
    config = text_format.Parse(text, pb.ModelConfig())
    scheduling = config.WhichOneof("scheduling_choice")
    if scheduling not in (None, "dynamic_batching"):
        raise ConfigError(f"model {name!r}: {scheduling} not supported; dynamic_batching is")
    if config.name not in ("", name):
        raise ValueError(f"name {config.name!r} differs from its folder's; make them equal or leave it out")
    backend = config.backend or IMAGE_BACKEND
    draws = backend == IMAGE_BACKEND
    _check_fields(config, IMAGE_FIELDS if draws else OTHER_FIELDS, f"model {name!r}")
    _check_numbers(config, f"model {name!r}")
    _check_names(config, f"model {name!r}")
    return ModelFile(
        name=name,
        backend=backend,
        text=text,
        max_batch_size=config.max_batch_size,
        inputs=tuple(_decode_tensor(t) for t in config.input),
        outputs=tuple(_decode_tensor(t) for t in config.output),
        decoupled=config.model_transaction_policy.decoupled,
        groups=tuple(_decode_group(g) for g in config.instance_group),
        versions=_version_policy(config.version_policy),
        # Other backends' requests may be short, so that many can wait without an overload.
        queue=read_queue_policy(
            config.dynamic_batching, f"model {name!r}", max_size=DEFAULT_MAX_QUEUE_SIZE if draws else None
        ),
        dynamic_batching=config.HasField("dynamic_batching"),
        parameters={key: p.string_value for key, p in config.parameters.items()},
        response_cache=config.response_cache.enable,
        warmup=tuple(sample.name for sample in config.model_warmup),
    )


def config_text(json: str) -> str:
    """The text form of a config that a load request brings as JSON.

    Raises:
        InvalidRequestError: it is not a model config.
    """
    try:
        return text_format.MessageToString(json_format.Parse(json, pb.ModelConfig()))
    except json_format.ParseError as error:
        raise InvalidRequestError(f"config: {error}; the JSON form of a ModelConfig is accepted") from error


def complete_config(file: ModelFile, spec: ModelSpec) -> pb.ModelConfig:
    """The config in the file, with the served signature filled in."""
    config = text_format.Parse(file.text, pb.ModelConfig())
    config.name, config.backend = spec.name, spec.backend
    config.max_batch_size = spec.max_batch_size
    config.model_transaction_policy.decoupled = spec.decoupled
    if not config.HasField("version_policy"):
        config.version_policy.latest.num_versions = 1
    del config.input[:]
    del config.output[:]
    config.input.extend(
        pb.ModelInput(name=t.name, data_type=_wire_type(t), dims=t.dims, optional=t.optional) for t in spec.inputs
    )
    config.output.extend(pb.ModelOutput(name=t.name, data_type=_wire_type(t), dims=t.dims) for t in spec.outputs)
    return config


def _check_fields(config: Any, known: set[str], where: str) -> None:
    unknown = {field.name for field, _ in config.ListFields()} - known
    if unknown:
        raise ConfigError(f"{where}: {sorted(unknown)} not supported; {sorted(known)} are")
    if any(sample.inputs for sample in config.model_warmup):
        raise ConfigError(f"{where}: model_warmup inputs not supported; name the sample WIDTHxHEIGHT and give none")


def _check_numbers(config: Any, where: str) -> None:
    numbers = [("max_batch_size", config.max_batch_size)]
    numbers += [("instance_group count", group.count) for group in config.instance_group]
    for what, number in numbers:
        if number < 0:
            raise ConfigError(f"{where}: {what} {number} is not accepted; 0 or more is")
    for tensor in (*config.input, *config.output):
        for size in tensor.dims:
            if size < 1 and size != -1:
                raise ConfigError(
                    f"{where}: dims of {tensor.name!r}: {size} is not accepted; a size from 1 on is, or -1 for any"
                )


def _check_names(config: Any, where: str) -> None:
    for kind, tensors in (("input", config.input), ("output", config.output)):
        for name, times in Counter(t.name for t in tensors).items():
            if times > 1:
                raise ConfigError(f"{where}: {times} {kind}s are named {name!r}; each needs a name of its own")


def _decode_group(message: Any) -> InstanceGroup:
    return InstanceGroup(message.Kind.Name(message.kind), message.count or 1, tuple(message.gpus))


def _decode_tensor(message: Any) -> TensorSpec:
    wire = pb.DataType.Name(message.data_type)
    name = DataType.BYTES.value if wire == TYPE_STRING else wire.removeprefix(TYPE_PREFIX)
    if name not in set(DataType):
        raise ValueError(f"tensor {message.name!r} has no data_type that is known: {wire}")
    optional = getattr(message, "optional", False)  # outputs have no such field
    return TensorSpec(message.name, DataType(name), tuple(message.dims), optional)


def _wire_type(tensor: TensorSpec) -> Any:
    name = TYPE_STRING if tensor.datatype is DataType.BYTES else TYPE_PREFIX + tensor.datatype
    return pb.DataType.Value(name)


def _version_policy(policy: Any) -> VersionPolicy:
    match policy.WhichOneof("policy_choice"):
        case "all":
            return VersionPolicy(latest=0)
        case "specific":
            return VersionPolicy(latest=0, specific=tuple(str(v) for v in policy.specific.versions))
        case _:
            return VersionPolicy(latest=policy.latest.num_versions or 1)
