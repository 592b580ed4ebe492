"""One question a file, and what several of them share.

Ratios are measured side by side in one run, and the engine that was measured is asserted.
"""
