"""Loaders of public data formats, from a folder or a hub."""

from implicitly.data.images import ImageData, ImageSet, cifar10, digits, load_images, mnist

__all__ = ["ImageData", "ImageSet", "cifar10", "digits", "load_images", "mnist"]
