"""Serves a model repository: a frontend process that speaks gRPC, and one worker process per instance."""
