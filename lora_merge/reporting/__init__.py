"""The record of an output as one HTML page to look at."""
