"""One file per noun. Routes never commit, and a route that only does blocking work is `def`."""
