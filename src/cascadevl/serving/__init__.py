"""Serving: an OpenAI-compatible API before the engine."""
