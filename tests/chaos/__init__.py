"""The chaos suite: the farm's promises while its parts are killed, frozen, emptied and lied to.

Real servers, real processes of the farm, a stub for a renderer; see docs/chaos.md. Every fault switch is in here, none
is in the product.
"""
