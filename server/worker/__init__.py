"""One device, one copy of the engines: plan -> run -> report."""
