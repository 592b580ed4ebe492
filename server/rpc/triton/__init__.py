"""Triton's `inference.GRPCInferenceService`, over the generated messages that tritonclient ships."""
