"""Planning: what a server of some shape will do on some hardware, before anybody pays for it."""
