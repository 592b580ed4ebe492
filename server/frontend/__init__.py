"""The process that clients talk to. Imports no torch, and answers health from its first moment."""
