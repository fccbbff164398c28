"""From text to batches.

Sources, downloads and readers give documents; a split, a tokenizer and the cache turn them into token files; loaders
turn those into rows. Tokenizers live here too. Imports the ground only.
"""
