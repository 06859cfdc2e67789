"""Faults injected into real training jobs, what each must cost, and what it did cost."""
