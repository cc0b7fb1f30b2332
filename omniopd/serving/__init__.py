"""`omniopd serve`: a model folder behind an OpenAI-compatible API."""
