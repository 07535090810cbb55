"""A farm of simulated workers in simulated time, whose choices are the real `farm.scheduling`."""
