"""Holds what was exported against what it should be: `zserve inspect`, `zserve parity` and `zserve verify`."""
