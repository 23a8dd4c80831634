"""vrag_lib: a notebook-first reproduction of VRAG-RL (arXiv 2505.22019)."""

__version__ = "0.1.0"
