"""Divergences and log-probs from hidden states and head weights, without ever holding [tokens, vocabulary].

Plain torch on any device. Shape letters: T tokens, N tokens that are computed, n tokens of a chunk, b rows of a
block, V vocabulary, H hidden width of the student, G of the teacher.
"""

from __future__ import annotations

from omniopd.kernels.divergence import KINDS, REDUCTIONS, chunked_divergence
from omniopd.kernels.logprobs import chunked_logprobs

__all__ = ["KINDS", "REDUCTIONS", "chunked_divergence", "chunked_logprobs"]
