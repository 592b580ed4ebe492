"""Compares what was exported with what it should be: `zserve inspect`, `zserve parity` and `zserve verify`."""
