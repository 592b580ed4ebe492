"""Serves a model repository: a frontend process that speaks gRPC, and a worker process an instance."""
