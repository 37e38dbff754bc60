"""Anthropic's protocol, as its clients speak it."""
