"""What `uvicorn --workers` loads: the wrapped app of `faulty_app` over a store; `FAULTS` says where its halves are."""

from __future__ import annotations

import json
import os

from selfheal import SelfHealMiddleware, UploadStore
from tests.support.faulty_app import App, Faults


def app() -> SelfHealMiddleware:
    """A factory: each worker makes its own."""
    faults = Faults(**json.loads(os.environ["FAULTS"]))
    store = UploadStore(faults.directory, faults.database, deadline=faults.deadline)
    return SelfHealMiddleware(App(store, None, []), store)
