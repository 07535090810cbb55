"""The farm's client: submit jobs, wait for them, collect pictures. `Farm` blocks, `AsyncFarm` is awaited.

from farm.client import Farm

with Farm() as farm:  # FARM_URL and FARM_API_KEY, or what `farm up` left in .farm/credentials.json
    batch = farm.submit_many(f"Crack {i} on a concrete wall" for i in range(100))
    farm.wait(batch)
    farm.download(batch, "pictures")
"""

from farm.client.aio import AsyncFarm
from farm.client.calls import JobFields
from farm.client.connection import Connection
from farm.client.pictures import Downloaded, Saved
from farm.client.sync import Farm

__all__ = ["AsyncFarm", "Connection", "Downloaded", "Farm", "JobFields", "Saved"]
