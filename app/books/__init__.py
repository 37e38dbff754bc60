"""The books: who pays for device time, and how much. Pure; the store keeps what comes of it."""
