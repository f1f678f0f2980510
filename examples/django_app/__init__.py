"""A photo gallery with Django. It keeps each photo twice: as a file on disk and in the database.

    export DJANGO_SETTINGS_MODULE=examples.django_app.settings
    python -m django migrate
    gunicorn examples.django_app.wsgi

Add photos, delete the directory `media`, reload the page: they are back.
"""
