"""Recipes in, pictures out: load, adapters, merge, cache, render, and the engine that ties them together.

Knows nothing of jobs, queues or S3. Import `workers.pipelines.engine.Engine`; this package itself stays free of torch,
so that a program can look at it without paying for the import.
"""
