"""How sources of images (official archives, folders and archives of your own) become prepared datasets."""
