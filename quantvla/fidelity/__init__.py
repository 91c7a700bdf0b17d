"""How far one policy's actions are from another's: paired errors, distributions, smoothness."""
