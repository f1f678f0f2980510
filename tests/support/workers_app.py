"""The app that `uvicorn --workers` loads: the wrapped app of `faulty_app` over a store, as FAULTS says."""

from __future__ import annotations

import json
import os

from selfheal import SelfHealMiddleware, UploadStore
from tests.support.faulty_app import App
from tests.support.process_faults import Faults


def app() -> SelfHealMiddleware:
    """Return an app; each worker calls this factory for itself."""
    faults = Faults(**json.loads(os.environ["FAULTS"]))
    store = UploadStore(faults.directory, faults.database, deadline=faults.deadline)
    return SelfHealMiddleware(App(store, None, []), store)
