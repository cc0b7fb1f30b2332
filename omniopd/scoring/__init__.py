"""How much teacher text and student text say the same: pairwise similarities, and the score of a chunk."""
