"""Attention of rows, as a backend of the host."""
