"""Measurements of parts of the program, each against its slow or dense counterpart."""
