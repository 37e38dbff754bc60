"""The demo: real prompts through the whole system."""
