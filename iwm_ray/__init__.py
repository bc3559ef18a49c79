"""iwm_ray: train, measure and use Image World Models (arXiv 2403.00504) on a Ray cluster."""

__version__ = "0.1.0"
