"""Answering many prompts at once: pages of keys and values, scheduling, sampling, streams."""
