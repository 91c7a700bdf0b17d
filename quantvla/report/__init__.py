"""The report of a compilation: one typed structure, written as JSON and as a self-contained HTML page."""
