"""Behavior: who writes the rollouts."""
