"""A whole engine timed with our kernels and with its own: decode, prefill, and a fresh server's first token."""
