"""OpenAI's protocol, as its clients speak it."""
