"""Loaded, runnable components. No policy lives here but the one fallback."""
