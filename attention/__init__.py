"""Where a policy looks, how it is found out, and whether the answer can be trusted. Pure torch."""
