"""From images to a prepared dataset: class folders and archives of the user's, official archives of known datasets."""
