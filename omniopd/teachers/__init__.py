"""Teachers: models that can only be prompted."""
