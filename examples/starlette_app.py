"""A photo gallery with Starlette. It keeps each picture twice: as a file on disk and in the database.

    SELFHEAL_DATABASE_URL=sqlite+aiosqlite:///gallery.db uvicorn examples.starlette_app:app

Add pictures, delete their files, reload the page: they are back. Every visitor can add and delete: add your own login.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from html import escape
from urllib.parse import quote

from starlette.applications import Starlette
from starlette.datastructures import UploadFile
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route

from selfheal import (
    IMAGE_EXTENSIONS,
    DatabaseUnavailable,
    InvalidName,
    NotStored,
    Record,
    SelfHealMiddleware,
    Settings,
    UploadPolicy,
    UploadRefused,
    UploadStore,
)

uploads = UploadStore.from_env()
uploads.policy = UploadPolicy(extensions=IMAGE_EXTENSIONS | {"svg"})  # only selfheal serves them, without their scripts
PREFIX = Settings.from_env().prefix


@asynccontextmanager
async def lifespan(_: Starlette) -> AsyncIterator[None]:
    """Create the tables. The middleware opens and closes the store."""
    await uploads.database.create_tables()
    yield


async def gallery(_: Request) -> Response:
    return await page()


async def upload(request: Request) -> Response:
    """Save every file of the form, except those that the policy refuses: too large, not a picture, truncated."""
    refused = []
    async with request.form() as form:
        for file in form.getlist("pictures"):
            if isinstance(file, UploadFile):
                try:
                    await uploads.save_uploaded_file(file)
                except UploadRefused as error:
                    refused.append((file.filename or "unnamed", error))
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
    """Answer 503: the list needs the database. Pictures on disk are served without it."""
    return PlainTextResponse("The database does not answer.\n", 503, {"Retry-After": "2"})


async def page(refused: Sequence[tuple[str, UploadRefused]] = ()) -> HTMLResponse:
    """Return the page, newest picture first. It lists refused files at the top; the first one sets the status."""
    living = [record async for records in uploads.database.pages() for record in records]
    living.sort(key=lambda record: record.modified_ns, reverse=True)
    deleted = [record async for records in uploads.database.pages(deleted=True) for record in records]
    size = sum(record.size for record in living) / 1024
    alerts = [f"<p role=alert><b>{escape(name)}</b>: {escape(str(error))}" for name, error in refused]
    cards = [card(record, f"picture {number}") for number, record in enumerate(living, 1)]
    trash = [f"<li>{about(record)} {button('undo', 'Undo', record, about(record))}" for record in deleted]
    html = f"""{HEAD}<p>{len(living)} pictures, {size:,.0f} KB, each on disk and in the database</p></div>
<form action="/upload" method="post" enctype="multipart/form-data">
<input type="file" name="pictures" multiple required accept="image/*" aria-label="Pictures to add"><button>Add</button>
</form></header><main>{"".join(alerts)}
<ul class="grid">{"".join(cards) or "<li class=none>No pictures yet: add the first one."}</ul>
{"<h2>Deleted</h2>" if trash else ""}<ul class="trash">{"".join(trash)}</ul></main>"""
    return HTMLResponse(html, refused[0][1].status if refused else 200)


def card(record: Record, title: str) -> str:
    source = escape(f"{PREFIX}/{quote(record.name)}")
    return f"""<li><a href="{source}"><img src="{source}" alt="{title}" loading="lazy"></a>
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
* { box-sizing: border-box; margin: 0; padding: 0; font: inherit }
body { font: 1rem/1.5 system-ui, sans-serif; background: var(--paper); color: var(--soft);
  max-width: 80rem; margin: auto; padding: clamp(1rem, 4vw, 3rem) }
h1, h2 { font-weight: 700; color: var(--ink); margin: 2rem 0 .5rem } h1 { font-size: 2.6rem; margin: 0 }
header, header form, li { display: flex; flex-wrap: wrap; gap: .6rem; justify-content: space-between; align-items: end }
button, ::file-selector-button { font: inherit; color: var(--lead); background: none; cursor: pointer;
  padding: .3rem .9rem; border: 1px solid var(--line); border-radius: 9px }
button:hover, ::file-selector-button:hover { border-color: currentColor }
:focus-visible { outline: 3px solid var(--lead); outline-offset: 2px }
header button { color: var(--paper); background: var(--lead) }
input { max-width: 100% } b { font-weight: 700 }
[role=alert] { margin-top: 1rem; padding: .4rem 1rem; border-left: 4px solid; color: var(--alarm) }
.grid { display: grid; gap: 1.4rem; margin-top: 2rem;
  grid-template-columns: repeat(auto-fill, minmax(min(15.5rem, 100%), 1fr)) }
.grid li { align-items: center; gap: 0; background: var(--card); border: 1px solid var(--line); border-radius: 16px }
.grid a { width: 100% } .grid span, .grid form, .none { padding: .6rem .8rem }
.grid img { display: block; width: 100%; aspect-ratio: 3/2; object-fit: cover; border-radius: 15px 15px 0 0 }
.trash li { align-items: center; padding: .4rem 0; border-top: 1px solid var(--line) }
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
