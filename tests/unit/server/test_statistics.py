"""Figures: under which label a failure is counted, and what is kept."""

import asyncio

import pytest
from grpc import StatusCode

from server.errors import QueueFullError, QueueTimeoutError, WorkerLostError, error_of_status
from server.statistics import FailureReason, Spent, Statistics, failure_reason

BACKEND, OTHER = FailureReason.BACKEND, FailureReason.OTHER


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
