"""The REST API: a thin producer in front of `farm.jobs`. It decides nothing and loads neither torch nor diffusers."""
