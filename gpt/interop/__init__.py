"""Models of other programs: Hugging Face checkpoints and tokenizers, in and out, and what training may begin with.

Imports the ground, gpt.model, gpt.data and gpt.run."""
