"""Mixed precision: which format every linear gets under a budget of bytes or of time."""
