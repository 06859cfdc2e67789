"""Training over slow links: replicas train locally and exchange compressed pseudo-gradients."""

from ltrain.sync.compress import compress, decompress
from ltrain.sync.exchange import SyncError, SyncRefused
from ltrain.sync.methods import Replica, SyncReport, build_sync
from ltrain.sync.payload import Payload, PayloadError
from ltrain.sync.rendezvous import serve

__all__ = [
    "Payload",
    "PayloadError",
    "Replica",
    "SyncError",
    "SyncRefused",
    "SyncReport",
    "build_sync",
    "compress",
    "decompress",
    "serve",
]
