"""The way in: from a checked request to a row and its message."""
