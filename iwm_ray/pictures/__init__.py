"""Figures of a run. Every function returns a `matplotlib.figure.Figure` and saves nothing; no pyplot, no global state."""
