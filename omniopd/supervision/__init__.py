"""Supervision: finished rollouts in, token signals out. Black-box, white-box, verified or imitated, one seam."""
