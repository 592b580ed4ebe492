"""Our errors in Triton's status codes, and in its words where clients look for them."""

from grpc import StatusCode

from server.errors import QueueFullError, QueueTimeoutError, ZServeError

# Triton has no finer-grained codes, and its clients retry on UNAVAILABLE.
CODES = {
    StatusCode.RESOURCE_EXHAUSTED: StatusCode.UNAVAILABLE,
    StatusCode.DEADLINE_EXCEEDED: StatusCode.UNAVAILABLE,
    StatusCode.FAILED_PRECONDITION: StatusCode.INTERNAL,
}
# Clients compare the message with these two.
TEXTS: dict[type[ZServeError], str] = {
    QueueFullError: "Exceeds maximum queue size",
    QueueTimeoutError: "Request timeout expired",
}


class TritonError(ZServeError):
    """An error as Triton would put it."""

    def __init__(self, status: StatusCode, message: str, retry_after: float | None) -> None:
        super().__init__(message, retry_after=retry_after)
        self.status = status


def translate(error: Exception) -> Exception:
    """`error` with Triton's status and text; what is not ours stays as it is."""
    if not isinstance(error, ZServeError):
        return error
    return TritonError(CODES.get(error.status, error.status), TEXTS.get(type(error), str(error)), error.retry_after)
