"""The pages of docs/ that are made from code and data; a test keeps each current."""
