"""Calls that are waited for, and events as they happen: what all doors share of them."""
