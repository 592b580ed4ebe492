"""Models and their instances as wire messages: what GetModel answers, and what a worker says of itself."""

from export.spec import MAX_PROMPT_TOKENS, SIZE_MULTIPLE, Component
from protos.zserve.v1 import image_generation_pb2 as pb
from server.config import ModelConfig
from server.requests import InstanceInfo, MemoryUse, StepCost
from server.rpc.convert import DEFAULT_GUIDANCE_SCALE, MAX_GUIDANCE_SCALE, decode_engine_use, encode_engine_use


def encode_model(config: ModelConfig, instances: tuple[InstanceInfo, ...], *, ready: bool, reason: str) -> pb.Model:
    """What GetModel answers."""
    width, height = config.default_size
    return pb.Model(
        name=config.name,
        version=instances[0].version if instances else "",
        ready=ready,
        state_reason=reason,
        precision=instances[0].precision if instances else "",
        limits=pb.Limits(
            size_multiple=SIZE_MULTIPLE,
            min_size=config.min_size,
            max_size=config.max_size,
            max_num_inference_steps=config.max_num_inference_steps,
            max_num_images=config.max_num_images,
            max_prompt_tokens=MAX_PROMPT_TOKENS,
            max_guidance_scale=MAX_GUIDANCE_SCALE,
        ),
        defaults=pb.Defaults(
            width=width,
            height=height,
            num_inference_steps=config.default_num_inference_steps,
            guidance_scale=DEFAULT_GUIDANCE_SCALE,
        ),
        instances=[_encode_instance(i) for i in instances],
    )


def _encode_instance(info: InstanceInfo) -> pb.Instance:
    return pb.Instance(
        name=info.name,
        device=info.device,
        engines=[encode_engine_use(e) for e in info.engines],
        memory=pb.Memory(**vars(info.memory)),
        step_costs=[
            pb.StepCost(
                width=c.width, height=c.height, rows=c.rows, milliseconds=c.seconds * 1e3, component=c.component
            )
            for c in info.step_costs
        ],
    )


def decode_instance(model: pb.Model) -> InstanceInfo:
    """The one instance that a worker describes itself as."""
    message = model.instances[0]
    memory = {field.name: getattr(message.memory, field.name) for field in pb.Memory.DESCRIPTOR.fields}
    return InstanceInfo(
        name=message.name,
        device=message.device,
        version=model.version,
        precision=model.precision,
        engines=tuple(decode_engine_use(e) for e in message.engines),
        memory=MemoryUse(**memory),
        step_costs=tuple(
            StepCost(c.height, c.width, c.rows, c.milliseconds / 1e3, Component(c.component))
            for c in message.step_costs
        ),
    )
