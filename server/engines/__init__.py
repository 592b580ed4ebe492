"""Loaded, runnable components. The only policy here is the fallback to eager."""
