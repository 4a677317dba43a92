"""Readers of image formats: encoded bytes become pixels, or an ImageError that says why not.

`formats` is where a format is added; the others mend what Pillow reads wrongly or not at all.
"""
