"""Who changes what is everybody's in torch for a while, and who must not see it changed."""

from threading import Lock

LOADING = Lock()
"""Held while a model is read, and while one is traced. diffusers and transformers patch `nn.Module` and `nn.init` and
set the default number type while they read, and put back what they found: two at once can leave a patch behind, and
every weight that is set afterwards goes lost; what is traced meanwhile fails or is spoilt."""
