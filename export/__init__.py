"""From a checkpoint to compiled engines in a model repository. Never imports `server`."""
