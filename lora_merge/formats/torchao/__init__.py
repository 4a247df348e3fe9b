"""torchao's tensors, as transformers keeps them in safetensors files."""
