"""The words of GPTQ, as AutoGPTQ and GPTQModel write them."""
