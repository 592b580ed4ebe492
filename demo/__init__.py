"""The demo checkpoint: the scenes it draws, how it was trained and how its images are scored."""
