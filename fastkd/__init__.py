"""fastkd: on-policy distillation of large language models on fused top-k KL kernels.

Importing this package imports nothing else: ``fastkd.kernels`` needs torch alone, and
``python -m fastkd.run RECIPE --check`` needs neither torch nor transformers.
"""

__version__ = "0.1.0"
