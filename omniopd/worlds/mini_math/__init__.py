"""Mini-math: chains of two-digit sums, their verifier, and the recipe for two tiny models.

A problem is an expression such as `48+37-19`; a solution works from left to right and ends in the answer:
`48+37=85;85-19=66;#66`. Standard library only; `build.py` trains the models and `tokenizer.py` makes their tokenizer.
"""

from omniopd.worlds.mini_math.world import (
    MODELS,
    Problem,
    final_answer,
    is_correct,
    make_problems,
    model_path,
    solution,
)

__all__ = ["MODELS", "Problem", "final_answer", "is_correct", "make_problems", "model_path", "solution"]
