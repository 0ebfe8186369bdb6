"""From a checkpoint to a bundle: read, quantize, build graphs, cut, validate."""
