"""Models tried: against plain transformers, and against each other; for a person, not for jobs."""
