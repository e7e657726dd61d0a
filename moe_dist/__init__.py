"""Turn dense Transformers into distilled mixtures of experts.

Importing it teaches transformers' Auto classes our model types; it loads neither torch nor
transformers.
"""

from moe_dist.conversion.registration import register

__version__ = "0.1.0"

register()
