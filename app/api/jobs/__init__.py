"""Jobs in our own shape: /v1/jobs and what is below it."""
