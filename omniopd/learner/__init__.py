"""The learner: token signals in, one optimiser step out. The only place where training tensors live."""
