"""The engine process, and all that is known of it from outside."""
