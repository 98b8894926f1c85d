"""The ops for Hugging Face's `kernels`: layers, and how they are exported."""
