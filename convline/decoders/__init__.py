"""Decoders of image formats: the bytes of a file become pixels, or an ImageError that says why not.

`supported_formats` is the entry point, and the place to add a format. `unsupported_formats` recognises the others, such
as camera raw, to name them in the reject. The other modules correct what Pillow decodes wrongly or not at all.
"""
