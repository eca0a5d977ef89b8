"""What is done with a built wheel until it is published: repair, audit, index, sdist."""
