"""The installed wheel: its files, libraries, loading, errors in words, and what is remembered about a GPU."""
