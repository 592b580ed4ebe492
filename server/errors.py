"""Every error the server raises on purpose, as one tree; each class carries its gRPC status.

ZServeError                INTERNAL            also the answer to anything unforeseen, with a fixed text
├── InvalidRequestError    INVALID_ARGUMENT    a field's value is not accepted
├── NotFoundError          NOT_FOUND           nothing of that name
│   └── ModelNotFoundError                     no model of that name
├── AlreadyExistsError     ALREADY_EXISTS      something of that name is there already
├── UnsupportedError       UNIMPLEMENTED       the protocol has it, this server or model does not
├── AccessDeniedError      UNAUTHENTICATED     the call needs a token, or another one
├── QueueFullError         RESOURCE_EXHAUSTED  as many requests wait as the model allows
├── TooManyCallsError      RESOURCE_EXHAUSTED  one client has as many calls open as it may
├── PoisonRequestError     INTERNAL            the request has ended worker processes
├── DeviceMemoryError      RESOURCE_EXHAUSTED  the device has no memory for this request
├── DeadlinePassedError    DEADLINE_EXCEEDED   the request's deadline passed before it was done
├── UnavailableError       UNAVAILABLE         try again later, or elsewhere
│   ├── ModelNotReadyError                     the model is still loading, or failed to
│   ├── ShuttingDownError                      the server is going away
│   ├── OvertakenError                         the model was unloaded before it was loaded
│   ├── QueueTimeoutError                      no worker took the request within its queue timeout
│   └── WorkerLostError                        the worker process ended while it had the request
├── ConfigError            FAILED_PRECONDITION a config file or option is wrong
└── EngineError            INTERNAL            an engine failed
    ├── EngineLoadError                        ... while it was loaded
    └── EngineRunError                         ... while it ran
        └── NonFiniteError                     ... with an output that holds NaN or infinity
"""

from grpc import StatusCode


class ZServeError(Exception):
    """Base of every error the server raises on purpose.

    Attributes:
        retry_after: seconds after which trying again may help; None if it will not. Sent as google.rpc.RetryInfo.
    """

    status = StatusCode.INTERNAL

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class InvalidRequestError(ZServeError):
    """A field's value is not accepted; the message names the field, the value and what is accepted."""

    status = StatusCode.INVALID_ARGUMENT

    @classmethod
    def of(cls, field: str, value: object, accepted: str) -> "InvalidRequestError":
        """The error for `field` holding `value`."""
        return cls(f"{field}: {value!r} is not accepted; {accepted}")


class NotFoundError(ZServeError):
    """Nothing of that name."""

    status = StatusCode.NOT_FOUND


class ModelNotFoundError(NotFoundError):
    """No model of that name; the message lists those that exist."""


class AlreadyExistsError(ZServeError):
    """Something of that name is there already."""

    status = StatusCode.ALREADY_EXISTS


class UnsupportedError(ZServeError):
    """The protocol has it, this server or model does not."""

    status = StatusCode.UNIMPLEMENTED


class AccessDeniedError(ZServeError):
    """The call needs a token, or another one."""

    status = StatusCode.UNAUTHENTICATED


class QueueFullError(ZServeError):
    """As many requests wait as the model allows."""

    status = StatusCode.RESOURCE_EXHAUSTED


class TooManyCallsError(ZServeError):
    """One client has as many calls open as it may."""

    status = StatusCode.RESOURCE_EXHAUSTED


class PoisonRequestError(ZServeError):
    """The request has ended worker processes, and will not be given to another."""


class DeviceMemoryError(ZServeError):
    """The device has no memory for this request; the message has the figures."""

    status = StatusCode.RESOURCE_EXHAUSTED


class DeadlinePassedError(ZServeError):
    """The request's deadline passed before it was done."""

    status = StatusCode.DEADLINE_EXCEEDED


class UnavailableError(ZServeError):
    """Try again later, or elsewhere."""

    status = StatusCode.UNAVAILABLE


class ModelNotReadyError(UnavailableError):
    """The model is still loading, or failed to."""


class ShuttingDownError(UnavailableError):
    """The server is going away."""


class OvertakenError(UnavailableError):
    """The model was unloaded before it was loaded."""


class QueueTimeoutError(UnavailableError):
    """No worker took the request within its queue timeout."""


class WorkerLostError(UnavailableError):
    """The worker process ended while it had the request.

    Attributes:
        reached: whether the request had reached it, so that it may have ended because of that; None if not known.
    """

    def __init__(self, message: str, *, reached: bool | None = False) -> None:
        super().__init__(message)
        self.reached = reached


class ConfigError(ZServeError):
    """A config file or option is wrong."""

    status = StatusCode.FAILED_PRECONDITION


class EngineError(ZServeError):
    """An engine failed."""


class EngineLoadError(EngineError):
    """An engine failed while it was loaded."""


class EngineRunError(EngineError):
    """An engine failed while it ran."""


class NonFiniteError(EngineRunError):
    """A component's output holds NaN or infinity."""


def error_of_status(status: StatusCode, message: str) -> ZServeError:
    """The error behind a worker's answer with `status`, so that it can be raised again as its own type."""
    for kind in (
        InvalidRequestError,
        ModelNotFoundError,
        DeviceMemoryError,
        DeadlinePassedError,
        ConfigError,
        EngineError,
    ):
        if kind.status is status:
            return kind(message)
    return ZServeError(message)
