"""The control groups that limit this process, as containers have them.

Of cgroup v2: Linux, Documentation/admin-guide/cgroup-v2.rst.
"""

from pathlib import Path

OWN_GROUP, GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def limiting(file: str) -> list[Path]:
    """The file of that name in this process's group and in those above, where they have one; none without cgroup v2.

    A process's group is in its line `0::PATH`. Inside a container the path may be the host's, and the container's own
    group is the topmost there.
    """
    own = OWN_GROUP.read_text().splitlines() if OWN_GROUP.exists() else []
    names = next((line.removeprefix("0::") for line in own if line.startswith("0::")), "").strip("/").split("/")
    files = (GROUPS.joinpath(*names[:depth], file) for depth in range(len(names) + 1))
    return [path for path in files if path.is_file()]


def memory_left() -> list[int]:
    """Bytes that each group with a limit may still take, counting the file cache that the kernel would drop."""
    limits = ((file.parent, file.read_text().strip()) for file in limiting("memory.max"))
    return [_left(group, int(limit)) for group, limit in limits if limit != "max"]


def _left(group: Path, limit: int) -> int:
    figures = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    cache = int(figures["active_file"]) + int(figures["inactive_file"])
    return limit - int((group / "memory.current").read_text()) + cache
