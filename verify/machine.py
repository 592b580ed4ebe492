"""What figures depend on besides the code that is measured: the machine's CPU and its quota, and which code it was."""

import platform
import shutil
import subprocess
from pathlib import Path

from export.control_groups import limiting

ROOT = Path(__file__).parent.parent


def cpu_name() -> str:
    """The processor's own name, or its architecture if it gives none."""
    told = Path("/proc/cpuinfo")
    for line in told.read_text().splitlines() if told.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def cpu_quota() -> dict[str, float]:
    """How many cores' time this process may take: the least quota of its control group and those above; empty without.

    `cpu.max` of a group holds "QUOTA PERIOD" in microseconds, or "max" for the quota.
    """
    limits = [file.read_text().split() for file in limiting("cpu.max")]
    quotas = [int(quota) / int(period) for quota, period in limits if quota != "max"]
    return {"cpu_quota": round(min(quotas), 2)} if quotas else {}


def commit() -> str | None:
    """The commit of this checkout, with "+" if its code was changed since; None without a checkout or without git."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:  # otherwise git would search the parent folders too
        return None
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":/*.py", ":/*.toml")
    return _git("rev-parse", "HEAD") + ("+" if changed else "")


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=ROOT, check=False)
    return done.stdout.strip()
