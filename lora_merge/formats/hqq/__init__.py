"""HQQ: groups of any direction with a scale and a zero point of floats, fitted without data."""
