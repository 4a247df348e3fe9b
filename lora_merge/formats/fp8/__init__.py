"""8-bit floats with scales of blocks or rows: fine-grained, and FBGEMM."""
