"""Files on disk become batches: layouts → scan → frame store → chunks → loaders.

Nothing here normalises or augments; a batch of demonstrations is in the units of the data. Only
``activations.py`` knows a policy: its batches are what the policy computes.
"""
