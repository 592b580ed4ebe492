"""One question a file. Ratios are measured side by side in one run, and the engine that was measured is asserted."""
