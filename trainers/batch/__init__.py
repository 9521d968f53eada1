"""One micro-batch.

batch      Batch: sequences laid out as the model and the losses take them
packing    how sequences fill micro-batches
attention  causal attention within each of the sequences that are laid end to end
probe      whether a model keeps these apart; else its batches are padded
scoring    what the model gives for a batch: log-probabilities, scores, the policy loss in its LM head
"""
