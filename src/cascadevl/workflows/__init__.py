"""Chains of stages: the demo, the cascade, the reproduction."""
