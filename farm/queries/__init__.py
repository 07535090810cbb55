"""Every SQL statement of the farm, each a small function with its purpose; no SQL anywhere else.

Statements take an open connection and never commit. Lock order: jobs by id, then attempts, then segments, then
counters and claims. Whoever needs a segment while claiming skips the locked ones, so a claim never waits.
Every time-dependent statement compares with the database's clock; tests pass `now` instead of sleeping.
"""
