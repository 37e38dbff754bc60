"""What Celery sees of a worker: its pool, its consumer and each message."""
