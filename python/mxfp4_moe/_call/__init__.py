"""One call: its checks, the tile it takes, its launch, and the operators that torch.compile sees."""
