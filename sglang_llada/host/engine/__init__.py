"""The scheduler and what it works with: rows, executor, graphs, booking, streaming."""
