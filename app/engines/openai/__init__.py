"""A server that speaks OpenAI's protocol as an engine: vLLM, SGLang, llama.cpp, TGI, Ollama, or a
paid API. It is called the upstream; a model may have several."""
