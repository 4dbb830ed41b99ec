"""What is settled before a server runs: its arguments, and how our algorithms and configurations look to the host."""
