"""vLLM as an engine: its scheduler and its kernels, under our queue, our books and our fences."""
