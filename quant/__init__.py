"""Numbers only: weight formats, precision assignment, codecs, sampling noise. NumPy and nothing of ours."""
