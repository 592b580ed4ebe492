"""Backends by name: the built-in ones, and those that installed packages offer as entry points."""

import importlib
from importlib.metadata import entry_points

from server.backends.base import Backend
from server.errors import ConfigError

ENTRY_POINTS = "zserve.backends"  # an entry point is `name = "package.module:factory"`
BUILT_IN = {
    "identity": "server.backends.identity:IdentityModel",
    "z_image": "server.backends.z_image:ZImageModel",
}


def find_backend(name: str) -> Backend:
    """The backend called `name`; its package is imported only now.

    Raises:
        ConfigError: there is none of that name, or it cannot be imported.
    """
    offered = {e.name: e.value for e in entry_points(group=ENTRY_POINTS)} | BUILT_IN
    if name not in offered:
        raise ConfigError(
            f"no backend {name!r}; there are {', '.join(sorted(offered))}. Packages add others as entry points of "
            f"the group {ENTRY_POINTS!r}"
        )
    module, _, factory = offered[name].partition(":")
    try:
        backend: Backend = getattr(importlib.import_module(module), factory)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"backend {name!r} ({offered[name]}) cannot be imported: {error}") from error
    return backend
