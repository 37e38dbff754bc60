"""One answer to a text: vectors, classes, scores."""
