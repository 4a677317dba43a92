"""Finding and opening files: folders, globs, lists, archives and URLs become one stream of `InputFile`s.

`listing` is the entry; `archives` reads zip and tar in place; `remote` reads object stores.
"""
