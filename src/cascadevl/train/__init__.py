"""Training recipes and the one loop they share."""
