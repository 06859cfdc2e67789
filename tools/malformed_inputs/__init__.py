"""Malformed configurations, models, data and checkpoints, generated from sound ones."""
