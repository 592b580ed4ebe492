"""What can stand behind a model of the repository, found by the `backend` of its config.pbtxt."""
