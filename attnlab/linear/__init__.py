"""Linear attention: keys and values are kept as a state, not as a list."""
