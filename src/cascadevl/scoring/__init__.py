"""Answer checking and metrics: pure functions of strings and numbers."""
