"""Webhooks without rows: where they may go, when, how they are signed and how they are sent."""
