"""The page of the gallery, and its form."""

from django.forms import modelform_factory
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect
from django.shortcuts import get_object_or_404
from django.template import engines
from django.urls import path

from .models import Photo

PhotoForm = modelform_factory(Photo, fields=["image"])
PAGE = """<!doctype html><title>Photos</title>
<form action="/" method="post" enctype="multipart/form-data">{{ form.as_div }}<button>Add</button></form>
{% for photo in photos %}
<form action="/delete/{{ photo.pk }}" method="post">
<img src="{{ photo.image.url }}" width="{{ photo.width }}" height="{{ photo.height }}" alt="photo {{ photo.pk }}">
<button>Delete</button></form>
{% endfor %}"""


def gallery(request: HttpRequest) -> HttpResponse:
    """Show all photos; add the one of the form."""
    form = PhotoForm(request.POST or None, request.FILES or None)
    if form.is_valid():
        form.save()
        return HttpResponseRedirect("/")
    page = engines["django"].from_string(PAGE)
    return HttpResponse(page.render({"form": form, "photos": Photo.objects.all()}, request))


def delete(_: HttpRequest, pk: int) -> HttpResponse:
    """Delete a photo: its row, and its file."""
    photo = get_object_or_404(Photo, pk=pk)
    photo.image.delete(save=False)
    photo.delete()
    return HttpResponseRedirect("/")


urlpatterns = [path("", gallery), path("delete/<int:pk>", delete)]
