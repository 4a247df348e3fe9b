"""AWQ: 4 bits with a scale and a zero point for each group, in three layouts."""
