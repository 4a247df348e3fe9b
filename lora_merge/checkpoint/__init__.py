"""A folder opened: which files are what, and rows of any stored weight decoded."""
