"""Weight stores: how perturbed weights exist during a step."""

from pyzo.stores.base import Store
from pyzo.stores.choice import choose
from pyzo.stores.in_place import InPlace
from pyzo.stores.scratch import Scratch
from pyzo.stores.snapshot import Snapshot

__all__ = ["InPlace", "Scratch", "Snapshot", "Store", "choose"]
