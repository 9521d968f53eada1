"""One micro-batch.

batch            Batch: sequences laid out as the model and the losses take them
packing          how sequences fill micro-batches
attention        causal attention within each of the sequences that are laid end to end, for CPUs
masks            the same as a mask, for GPUs without flash attention
implementations  the attention functions that models call in place of their own
probe            whether a model keeps sequences apart, else its batches are padded; whether it can share prefixes
scoring          what the model gives for a batch: log-probabilities, scores, the policy loss in its LM head
"""
