"""Which names of the host we hold on to, whether they are there, and the hooks on them."""
