"""Registering models: a worker's spare thread fetches, checks, stores and tests what somebody asked for."""
