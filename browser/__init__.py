"""A page on this machine's own address: features to browse, landscapes to poke."""
