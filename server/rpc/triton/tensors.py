"""The tensors of a Triton request and response: pure functions between messages and `InferRequest`, `InferResponse`."""

from collections.abc import Mapping
from dataclasses import dataclass

from tritonclient.grpc import service_pb2 as pb

from server.errors import InvalidRequestError, UnsupportedError
from server.rpc.triton.inputs import decode_inputs
from server.rpc.triton.parameters import RequestParameters, decode_parameters, encode_parameters
from server.rpc.triton.regions import REGION, REGION_OFFSET, REGION_SIZE, Place, read_place
from server.rpc.triton.shared_memory import SharedMemory
from server.tensors import (
    Delivery,
    InferRequest,
    InferResponse,
    ModelSpec,
    Tensor,
)

FINAL = "triton_final_response"


@dataclass(frozen=True)
class InferCall:
    """A decoded request, and how its responses are to look."""

    request: InferRequest
    empty_final: bool
    outputs: Mapping[str, Place | None]  # those asked for; empty: all of them
    regions: SharedMemory

    async def encode(self, response: InferResponse, message: pb.ModelInferResponse) -> None:
        """Writes one response to this request into `message`: one built elsewhere would have to be copied."""
        spec = self.request.model
        message.model_name, message.model_version, message.id = spec.name, spec.version, self.request.id
        if response.parameters:
            encode_parameters(response.parameters, message.parameters)
        for tensor in response.outputs:
            if not self.outputs or tensor.name in self.outputs:
                await self._add(tensor, message)

    async def _add(self, tensor: Tensor, message: pb.ModelInferResponse) -> None:
        """Adds an output and its entry of raw contents, which is empty if the data went into shared memory."""
        output = message.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        place = self.outputs.get(tensor.name)
        if place is None:
            message.raw_output_contents.append(tensor.data)
            return
        size = len(tensor.data)
        self.request.check_room(tensor.name, size)
        await self.regions.write(place, tensor.data)
        encode_parameters({REGION: place.region, REGION_SIZE: size, REGION_OFFSET: place.offset}, output.parameters)
        message.raw_output_contents.append(b"")


async def decode_call(
    message: pb.ModelInferRequest,
    spec: ModelSpec,
    regions: SharedMemory,
    *,
    seconds_left: float | None,
    delivery: Delivery,
) -> InferCall:
    """The request, checked against the model's signature in Triton's order: parameters, inputs, outputs.

    Raises:
        InvalidRequestError: it does not fit.
    """
    parameters: RequestParameters = decode_parameters(message.parameters)
    inputs = await decode_inputs(message, spec, regions)
    outputs = _decode_outputs(message, spec, regions)
    request = InferRequest(
        model=spec,
        id=message.id,
        inputs=inputs,
        parameters=parameters.custom,
        priority=parameters.priority,
        queue_timeout=parameters.queue_timeout,
        timeout=seconds_left,
        delivery=delivery,
        room={name: place.size for name, place in outputs.items() if place is not None},
    )
    return InferCall(request, parameters.empty_final, outputs, regions)


def _decode_outputs(message: pb.ModelInferRequest, spec: ModelSpec, regions: SharedMemory) -> dict[str, Place | None]:
    outputs: dict[str, Place | None] = {}
    known = [t.name for t in spec.outputs]
    for item in message.outputs:
        if item.name not in known:
            raise InvalidRequestError(
                f"unexpected inference output '{item.name}' for model '{spec.name}'; {', '.join(known)} are known"
            )
        if item.name in outputs:
            raise InvalidRequestError(
                f"[request id: {message.id or '<id_unknown>'}] output '{item.name}' already exists in request"
            )
        if "classification" in item.parameters:
            raise UnsupportedError(f"output '{item.name}': the classification extension is not served")
        outputs[item.name] = _decode_place(item, regions)
    return outputs


def _decode_place(item: pb.ModelInferRequest.InferRequestedOutputTensor, regions: SharedMemory) -> Place | None:
    if REGION not in item.parameters:
        return None
    place = read_place(item.parameters, f"output '{item.name}'")
    regions.check(place)  # so that nothing is computed for a range that does not exist
    return place
