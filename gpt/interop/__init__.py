"""Models of other programs: Hugging Face checkpoints and tokenizers, in and out, and the sources of --init-from.

Imports the ground, gpt.model, gpt.data and gpt.run."""
