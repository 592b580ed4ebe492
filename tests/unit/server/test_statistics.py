"""Figures: under which label a failure is counted, and what is kept."""

import asyncio

import pytest
from grpc import StatusCode

from server.errors import QueueFullError, QueueTimeoutError, WorkerLostError, error_of_status
from server.statistics import FailureReason, Histogram, RequestRecord, Spent, Statistics, failure_reason

BACKEND, OTHER = FailureReason.BACKEND, FailureReason.OTHER
SECOND = 1_000_000_000  # ns


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (StatusCode.INTERNAL, BACKEND),
        (StatusCode.RESOURCE_EXHAUSTED, BACKEND),
        (StatusCode.INVALID_ARGUMENT, OTHER),
        (StatusCode.DEADLINE_EXCEEDED, OTHER),
    ],
)
def test_what_a_worker_has_failed_at_is_its_backends_failure(status: StatusCode, reason: FailureReason) -> None:
    assert failure_reason(error_of_status(status, "an engine failed")) is reason


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (QueueFullError(""), FailureReason.REJECTED),
        (QueueTimeoutError(""), FailureReason.REJECTED),
        (asyncio.CancelledError(), FailureReason.CANCELED),
        (WorkerLostError(""), BACKEND),
        (ValueError(), BACKEND),
    ],
)
def test_other_ends_of_a_request(error: BaseException, reason: FailureReason) -> None:
    assert failure_reason(error) is reason


def test_single_durations_are_kept_only_where_a_summary_tells_of_them() -> None:
    """Of every batch size and every failed request they would be a thousand numbers that nobody reads."""
    figures = Statistics()
    figures.executed(2, Spent())
    summarised = (figures.success, figures.cache_hit, figures.cache_miss, *figures.stages.values())
    assert all(hasattr(duration, "recent") for duration in summarised)
    assert not any(hasattr(duration, "recent") for duration in (figures.fail, *vars(figures.batches[2]).values()))


@pytest.mark.parametrize(("milliseconds", "bucket"), [(99, 0), (100, 0), (101, 1), (5000, 3), (5001, 4)])
def test_a_first_response_is_counted_in_tritons_buckets(milliseconds: int, bucket: int) -> None:
    histogram = Histogram()
    histogram.add(milliseconds * 1_000_000)
    assert histogram.counts.index(1) == bucket
    assert histogram.total_ms == milliseconds


def test_of_several_responses_the_first_is_timed() -> None:
    record = RequestRecord()
    record.responded()
    first = record.first_response
    record.began -= SECOND
    record.responded()
    assert record.first_response == first


def test_a_failed_request_has_taken_its_time_too() -> None:
    figures = Statistics()
    with pytest.raises(ValueError, match="no"), figures.request() as record:
        record.began -= SECOND
        raise ValueError("no")
    assert figures.fail.count == 1
    assert figures.fail.ns >= SECOND


async def test_a_model_is_idle_when_the_last_of_its_requests_has_ended() -> None:
    figures = Statistics()
    with figures.request():
        with figures.request():
            idle = asyncio.create_task(figures.idle())
        await asyncio.sleep(0)
        assert not idle.done()
    await idle
