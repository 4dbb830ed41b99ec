"""What the network is: configuration, router, weight names and a reference that is slow and obvious."""
