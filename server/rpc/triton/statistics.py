"""Triton's ModelStatistics from the figures that a model keeps."""

from tritonclient.grpc import service_pb2 as pb

from server.backends.base import Model
from server.statistics import BatchStatistics, Duration


def encode_statistics(model: Model) -> pb.ModelStatistics:
    """The figures of one version."""
    figures = model.statistics
    return pb.ModelStatistics(
        name=model.spec.name,
        version=model.spec.version,
        last_inference=figures.last_inference_ms,
        inference_count=figures.inference_count,
        execution_count=figures.execution_count,
        inference_stats=pb.InferStatistics(
            success=_encode(figures.success),
            fail=_encode(figures.fail),
            cache_hit=_encode(figures.cache_hit),
            cache_miss=_encode(figures.cache_miss),
            **{stage: _encode(duration) for stage, duration in figures.stages.items()},
        ),
        batch_stats=[_encode_batch(size, batch) for size, batch in sorted(figures.batches.items())],
    )


def _encode_batch(size: int, batch: BatchStatistics) -> pb.InferBatchStatistics:
    return pb.InferBatchStatistics(
        batch_size=size,
        compute_input=_encode(batch.compute_input),
        compute_infer=_encode(batch.compute_infer),
        compute_output=_encode(batch.compute_output),
    )


def _encode(duration: Duration) -> pb.StatisticDuration:
    return pb.StatisticDuration(count=duration.count, ns=duration.ns)
