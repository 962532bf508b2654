"""Loaders of public data formats, from a folder or a hub."""

from implicitly.data.images import DataError, ImageData, ImageSet, cifar10, digits, load_images, mnist

__all__ = ["DataError", "ImageData", "ImageSet", "cifar10", "digits", "load_images", "mnist"]
