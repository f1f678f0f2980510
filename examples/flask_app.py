"""A photo gallery with Flask. It keeps each picture twice: as a file on disk and in the database.

    SELFHEAL_DATABASE_URL=sqlite:///gallery.db gunicorn --threads 8 examples.flask_app:app

Add pictures, delete their files, reload the page: they are back. Every visitor can add and delete: add your own login.
"""

from __future__ import annotations

from flask import Flask, Response, redirect, render_template_string, request
from werkzeug.wrappers import Response as AnyResponse

from selfheal import DatabaseUnavailable, InvalidName, UploadRefused
from selfheal.flask import SelfHeal

app = Flask(__name__)
uploads = SelfHeal(app).uploads
uploads.database.create_tables()

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Pictures</title><h1>Pictures</h1>
<form action="/upload" method="post" enctype="multipart/form-data">
<input type="file" name="pictures" multiple required aria-label="Pictures to add"><button>Add</button></form>
{% for record in records %}
<p><img src="{{ url_for('static', filename='uploads/' ~ record.name) }}" alt="Picture {{ loop.index }}" width="300">
<form action="/delete" method="post">
<button name="name" value="{{ record.name }}" aria-label="Delete picture {{ loop.index }}">Delete</button></form>
{% else %}<p>No pictures yet: add the first one.{% endfor %}"""


@app.get("/")
def gallery() -> str:
    return render_template_string(PAGE, records=[record for page in uploads.database.pages() for record in page])


@app.post("/upload")
def upload() -> AnyResponse:
    for file in request.files.getlist("pictures"):
        uploads.save_uploaded_file(file)
    return redirect("/", 303)


@app.post("/delete")
def delete() -> AnyResponse:
    uploads.delete(request.form["name"])
    return redirect("/", 303)


@app.errorhandler(UploadRefused)
def refused(error: UploadRefused) -> Response:
    return Response(f"{error}\n", error.status, mimetype="text/plain")


@app.errorhandler(InvalidName)
def not_found(error: InvalidName) -> Response:
    return Response(f"{error}\n", 404, mimetype="text/plain")


@app.errorhandler(DatabaseUnavailable)
def unavailable(_: DatabaseUnavailable) -> Response:
    """Answer 503: the list needs the database. Pictures on disk are served without it."""
    return Response("The database does not answer.\n", 503, {"Retry-After": "2"}, mimetype="text/plain")
