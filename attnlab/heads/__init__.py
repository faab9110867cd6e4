"""How heads divide the work: which speak, and what they share."""
