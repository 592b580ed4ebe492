"""What figures depend on besides the code that is measured: the machine's CPU, and which code it was."""

import platform
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent


def cpu_name() -> str:
    """As the processor calls itself; where it does not tell, its architecture."""
    told = Path("/proc/cpuinfo")
    for line in told.read_text().splitlines() if told.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def commit() -> str | None:
    """Of this checkout, with "+" when its code was changed since; None where there is none, or no git to ask."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:  # git would look for one around the folder too
        return None
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":/*.py", ":/*.toml")
    return _git("rev-parse", "HEAD") + ("+" if changed else "")


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=ROOT, check=False)
    return done.stdout.strip()
