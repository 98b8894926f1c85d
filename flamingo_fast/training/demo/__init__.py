"""A whole Flamingo in minutes on a CPU, from handwritten digits: `flamingo-fast demo`.

A small language model learns from text alone and a small vision encoder from training images alone;
both are frozen then, and what is between them learns from interleaved documents.
"""
