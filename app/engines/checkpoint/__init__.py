"""A model's folder: what its files say, what is refused of them, and how it is loaded."""
