"""The plan carried out, a block of rows at a time."""
