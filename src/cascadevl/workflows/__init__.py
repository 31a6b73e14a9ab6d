"""Chains of stages: the demos, micro, the reproduction."""
