"""Files on disk become batches: layouts → scan → frame store → chunks → loaders.

Nothing here normalises, augments or knows a policy; a batch is in the units of the data.
"""
