"""NVIDIA ModelOpt: 8-bit floats, and NVFP4."""
