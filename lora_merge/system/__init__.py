"""What the operating system and the libraries do to a run: signals, closed streams, memory that is not given."""
