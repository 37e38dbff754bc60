"""What other settings would do with the same traffic: a trace, replayed through the batcher."""
