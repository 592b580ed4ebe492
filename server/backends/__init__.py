"""The backends that can serve a model of the repository, chosen by the `backend` of its config.pbtxt."""
