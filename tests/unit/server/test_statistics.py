"""Figures: under which label a failure is counted."""

import asyncio

import pytest
from grpc import StatusCode

from server.errors import QueueFullError, QueueTimeoutError, WorkerLostError, error_of_status
from server.frontend.statistics import FailureReason, failure_reason

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
