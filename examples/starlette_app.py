"""A photo gallery with Starlette. Every picture is kept twice: as a file on disk, and in the database.

    SELFHEAL_DATABASE_URL=sqlite+aiosqlite:///gallery.db uvicorn examples.starlette_app:app

Add pictures, delete their files, reload: they are back. Anybody may add and delete: put your own login in front.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from html import escape
from urllib.parse import quote

from starlette.applications import Starlette
from starlette.datastructures import UploadFile
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route

from selfheal import DatabaseUnavailable, InvalidName, NotStored, Record, UploadRefused
from selfheal import SelfHealMiddleware, Settings, UploadStore

uploads = UploadStore.from_env()
PREFIX = Settings.from_env().prefix


@asynccontextmanager
async def lifespan(_: Starlette) -> AsyncIterator[None]:
    """The middleware opens and closes the store; the tables are the app's to make."""
    await uploads.database.create_tables()
    yield


async def gallery(_: Request) -> Response:
    return await page()


async def upload(request: Request) -> Response:
    """Keep every file of the form but those that are refused: too large, no picture, not whole."""
    refused: dict[str, UploadRefused] = {}
    async with request.form() as form:
        for file in form.getlist("pictures"):
            if isinstance(file, UploadFile):
                try:
                    await uploads.save_uploaded_file(file)
                except UploadRefused as error:
                    refused[file.filename or "unnamed"] = error
    return await page(refused) if refused else RedirectResponse("/", 303)


async def delete(request: Request) -> Response:
    async with request.form() as form:
        await uploads.delete(str(form.get("name", "")))
    return RedirectResponse("/", 303)


async def undo(request: Request) -> Response:
    async with request.form() as form:
        await uploads.undo(str(form.get("name", "")))
    return RedirectResponse("/", 303)


async def not_found(_: Request, error: Exception) -> Response:
    return PlainTextResponse(f"{error}\n", 404)


async def unavailable(_: Request, __: Exception) -> Response:
    """Without the database there is no list; the pictures on disk are served all the same."""
    return PlainTextResponse("The database gives no answer now.\n", 503, {"Retry-After": "2"})


async def page(refused: dict[str, UploadRefused] | None = None) -> HTMLResponse:
    """The whole gallery, newest picture first; above it the files that were refused, with the first one's status."""
    found = [record async for records in uploads.database.pages() for record in records]
    living = sorted(found, key=lambda record: record.modified_ns, reverse=True)
    deleted = [record async for records in uploads.database.pages(deleted=True) for record in records]
    alerts = [f"<p role=alert><b>{escape(name)}</b>: {escape(str(error))}" for name, error in (refused or {}).items()]
    cards = [card(record, f"picture {number}") for number, record in enumerate(living, 1)]
    trash = [f"<li>{about(record)}{button('undo', 'Undo', record, about(record))}" for record in deleted]
    total = sum(record.size for record in living)
    html = f"""{HEAD}<p>{len(living)} pictures, {total / 1024:,.0f} KB, each of them on disk and in the database</p></div>
<form action="/upload" method="post" enctype="multipart/form-data">
<input type="file" name="pictures" multiple required accept="image/*" aria-label="Pictures to add"><button>Add</button>
</form></header><main>{"".join(alerts)}
<ul class="grid">{"".join(cards) or "<li class=none>Nothing here yet: add the first picture."}</ul>
{"<h2>Deleted</h2>" if trash else ""}<ul class="trash">{"".join(trash)}</ul></main>"""
    return HTMLResponse(html, next((error.status for error in (refused or {}).values()), 200))


def card(record: Record, title: str) -> str:
    source = escape(f"{PREFIX}/{quote(record.name)}")
    return f"""<li><a href="{source}"><img src="{source}" alt="{title}" loading="lazy" decoding="async"></a>
<span>{about(record)}</span>{button("delete", "Delete", record, title)}"""


def about(record: Record) -> str:
    return escape(f"{record.name.rpartition('.')[2].upper()}, {record.size / 1024:,.0f} KB")


def button(action: str, label: str, record: Record, title: str) -> str:
    return f"""<form action="/{action}" method="post">
<button name="name" value="{escape(record.name)}" aria-label="{label} {title}">{label}</button></form>"""


HEAD = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Pictures</title>
<meta name="viewport" content="width=device-width"><style>
:root { color-scheme: light dark; --paper: light-dark(#f7f4ee, #121316); --card: light-dark(#fff, #1c1e22);
  --ink: light-dark(#22201c, #edeae3); --soft: light-dark(#676157, #a8a297); --line: light-dark(#ddd6c9, #34373d);
  --lead: light-dark(#0b6b62, #6fe0d0); --alarm: light-dark(#a3201d, #ff9c94) }
* { box-sizing: border-box; margin: 0 }
body { max-width: 80rem; margin: auto; padding: clamp(1rem, 4vw, 3rem); background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif }
header { display: flex; flex-wrap: wrap; gap: 1rem 2rem; justify-content: space-between; align-items: end }
h1 { font: 600 clamp(2rem, 6vw, 3.2rem)/1 Georgia, serif; letter-spacing: -.02em; margin-bottom: .6rem }
h2 { font: 600 1.3rem/1 Georgia, serif; margin: 2.5rem 0 .8rem }
header p, span, .none, .trash { color: var(--soft) }
ul { list-style: none; padding: 0 }
button, ::file-selector-button { font: inherit; color: var(--lead); background: none; cursor: pointer;
  border: 1px solid var(--line); border-radius: 9px; padding: .3rem .9rem }
button:hover, ::file-selector-button:hover { border-color: currentColor }
:focus-visible { outline: 3px solid var(--lead); outline-offset: 2px }
header form { display: flex; flex-wrap: wrap; gap: .6rem; align-items: center }
header button { background: var(--lead); color: var(--paper) }
input { font: inherit; color: var(--soft); max-width: 100% }
[role=alert] { color: var(--alarm); border-left: 4px solid; padding: .4rem 1rem; margin-top: 1rem }
.grid { display: grid; gap: 1.4rem; margin-top: 2rem; grid-template-columns: repeat(auto-fill, minmax(min(15.5rem, 100%), 1fr)) }
.grid li:not(.none) { display: flex; flex-wrap: wrap; justify-content: space-between; align-items: center;
  background: var(--card); border: 1px solid var(--line); border-radius: 16px; overflow: clip }
.grid a { flex-basis: 100%; overflow: clip }
.grid img { display: block; width: 100%; aspect-ratio: 3/2; object-fit: cover; transition: scale .3s }
.grid span, .grid form { padding: .6rem .8rem }
.trash li { display: flex; gap: 1rem; align-items: center; padding: .4rem 0; border-top: 1px solid var(--line) }
@media (prefers-reduced-motion: no-preference) { .grid a:hover img { scale: 1.04 } }
</style><header><div><h1>Pictures</h1>"""


app = Starlette(
    routes=[
        Route("/", gallery),
        Route("/upload", upload, methods=["POST"]),
        Route("/delete", delete, methods=["POST"]),
        Route("/undo", undo, methods=["POST"]),
    ],
    middleware=[Middleware(SelfHealMiddleware, store=uploads, prefix=PREFIX)],
    exception_handlers={InvalidName: not_found, NotStored: not_found, DatabaseUnavailable: unavailable},
    lifespan=lifespan,
)
