"""Checkpoints: atomic, verified, asynchronous, readable into another layout, free of executable content."""
