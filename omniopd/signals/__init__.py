"""From chunk scores to per-token signals, and what adjusts them on the way to the learner."""
