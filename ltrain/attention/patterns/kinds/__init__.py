"""One attention pattern a file."""
