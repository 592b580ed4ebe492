"""Our errors as clients of Triton know them."""

import pytest
from grpc import StatusCode

from server.errors import (
    ConfigError,
    DeadlinePassedError,
    InvalidRequestError,
    QueueFullError,
    QueueTimeoutError,
    ZServeError,
)
from server.rpc.triton.errors import translate


@pytest.mark.parametrize(
    ("kind", "status", "text"),
    [
        (QueueFullError, StatusCode.UNAVAILABLE, "Exceeds maximum queue size"),
        (QueueTimeoutError, StatusCode.UNAVAILABLE, "Request timeout expired"),
        (DeadlinePassedError, StatusCode.UNAVAILABLE, "ours"),
        (ConfigError, StatusCode.INTERNAL, "ours"),
        (InvalidRequestError, StatusCode.INVALID_ARGUMENT, "ours"),
    ],
)
def test_an_error_has_tritons_status_and_text_and_keeps_its_advice(
    kind: type[ZServeError], status: StatusCode, text: str
) -> None:
    translated = translate(kind("ours", retry_after=3.0))
    assert isinstance(translated, ZServeError)
    assert (translated.status, str(translated), translated.retry_after) == (status, text, 3.0)


def test_what_was_not_foreseen_is_left_as_it_is() -> None:
    error = ValueError("a secret")
    assert translate(error) is error
