"""The parts of training, which train.py puts together.

Starting and resuming, optimizers, skipped steps and rollbacks, checkpoints, validation, metrics, --dry-run, and several
processes. Imports every other room; only train.py imports this one.
"""
