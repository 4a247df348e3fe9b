"""What vLLM and llm-compressor write: packed integers and small floats, after schemes in config.json."""
