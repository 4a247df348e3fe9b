"""What a person at a terminal types and reads: usage, the bar, tables, reports, and what to do next."""
