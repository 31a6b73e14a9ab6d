"""From the files people have to packed batches: records, tiles, conversations, mixtures."""
