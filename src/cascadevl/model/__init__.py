"""The model: vision and language halves, positions, attention, loading and conversion."""
