"""Training over slow links: replicas train locally and exchange compressed pseudo-gradients."""

from ltrain.sync.compress import compress, decompress
from ltrain.sync.payload import Payload, PayloadError

__all__ = ["Payload", "PayloadError", "compress", "decompress"]
