"""The photos."""

from django.db import models


class Photo(models.Model):
    """A photo; its size in pixels is read when it is added."""

    image = models.ImageField(upload_to="photos/%Y", width_field="width", height_field="height")
    width = models.PositiveIntegerField(editable=False)
    height = models.PositiveIntegerField(editable=False)
