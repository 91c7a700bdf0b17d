"""Closed-loop evaluation: arms on the same seeds and the same flow noise, and what the counts say."""
