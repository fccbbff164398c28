"""What train.py is made of.

Start and resume, the optimizers, the guard against bad steps, saving, validation, the monitor, the plan of --dry-run,
and training on several processes. Imports every other room; only train.py imports this one.
"""
