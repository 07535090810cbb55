"""The project as a whole: its documents, its package, its containers."""
