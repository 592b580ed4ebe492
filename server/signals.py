"""Which signals tell the server to stop."""

import signal


def stopping_signals() -> list[signal.Signals]:
    """SIGTERM, Ctrl-C's SIGINT, and the terminal's SIGHUP unless that is ignored, as under `nohup`."""
    asked = [signal.SIGTERM, signal.SIGINT]
    return asked if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [*asked, signal.SIGHUP]
