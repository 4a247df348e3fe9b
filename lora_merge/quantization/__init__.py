"""Real values to codes and back, and what survives of a change; knows no file, no format and no adapter."""
