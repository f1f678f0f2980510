"""Flask: an extension that serves an app's uploads, heals them, and saves new ones."""

import os
from pathlib import Path

from .errors import MissingExtra
from .settings import Settings
from .store import UploadStore
from .sync import SyncUploadStore
from .wsgi import SelfHealMiddleware

try:
    from flask import Flask
except ImportError as error:
    raise MissingExtra("flask", error.name or "flask") from error

NAME = "selfheal"
"""The key of the extension in `app.extensions`."""


class SelfHeal:
    """`SelfHeal(app)`, or `init_app(app)` later; `uploads` saves and deletes. `store=None` reads what begins with
    `SELFHEAL_` in the app's config, then the environment; the directory is `static/uploads` beside the app by default.
    The other options are those of `selfheal.wsgi.SelfHealMiddleware`.
    """

    def __init__(
        self,
        app: Flask | None = None,
        store: UploadStore | None = None,
        *,
        serve: bool = True,
        adopt: bool = True,
        cache_control: str | None = None,
    ) -> None:
        self.store = store
        self._serve = serve
        self._adopt = adopt
        self._cache_control = cache_control
        if app is not None:
            self.init_app(app)

    @property
    def uploads(self) -> SyncUploadStore:
        """The methods of the store, for synchronous code."""
        if self.store is None:
            raise RuntimeError("the extension has no app yet: call init_app(app) first")
        return self.store.sync

    def init_app(self, app: Flask) -> None:
        """Wrap an app, and be its `app.extensions["selfheal"]`. Raises `SettingsError`."""
        settings = _settings_of(app)
        self.store = self.store or UploadStore.from_settings(settings)
        app.wsgi_app = SelfHealMiddleware(  # type: ignore[method-assign]
            app.wsgi_app,
            self.store,
            prefix=settings.prefix,
            serve=self._serve,
            adopt=self._adopt,
            cache_control=self._cache_control,
        )
        app.extensions[NAME] = self


def _settings_of(app: Flask) -> Settings:
    beside = {"SELFHEAL_DIRECTORY": str(Path(app.root_path) / "static" / "uploads")}
    environ = {key: value for key, value in os.environ.items() if value}
    config = {key: str(value) for key, value in app.config.items() if key.startswith("SELFHEAL_") and value is not None}
    return Settings.from_env(beside | environ | config)
