"""Names and shapes in, the output to the byte out."""
