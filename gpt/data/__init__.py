"""From text to batches.

Sources, downloads and readers produce documents; a split, a tokenizer and the cache turn documents into token files;
loaders turn token files into training rows. Tokenizers live here too. Imports the ground and the rooms' options.
"""
