"""Which signals tell the server to stop."""

import signal


def stopping_signals() -> list[signal.Signals]:
    """SIGTERM, Ctrl-C, and the end of the terminal unless that is to be survived, as `nohup` asks for."""
    asked = [signal.SIGTERM, signal.SIGINT]
    return asked if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [*asked, signal.SIGHUP]
