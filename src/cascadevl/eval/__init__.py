"""Measuring a responder on tasks, with intervals and reports."""
