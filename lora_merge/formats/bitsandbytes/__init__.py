"""The codes of bitsandbytes: LLM.int8, NF4 and FP4."""
