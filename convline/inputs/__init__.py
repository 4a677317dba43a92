"""Finds and opens input files: folders, globs, lists of paths, archives and URLs become one stream of `InputFile`s.

`listing` is the entry point. `archives` says which archive formats (zip, tar) are read; `remote_files` reads object
stores (s3://, gs://).
"""
