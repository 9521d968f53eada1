"""The LM head in tiles. PyTorch does the matrix products, our kernels the arithmetic on rows.

A tile is a block of rows by a range of the vocabulary. Only scored rows are projected. They are gathered in order and
padded to whole blocks, so that every matrix product has the same shape and a row's result does not depend on how many
other rows there are. A row's sums over one tile (`token_logprobs_part`) are joined over all tiles, and over the
processes that share a vocabulary, always in the same order.

    inputs     checks the arguments and makes a Head and its scored rows from them
    tiles      the size of tiles, scored rows in blocks, the memory of kept logits, and how sums are joined
    head       the loop over tiles, forward and backward
    gradients  the gradients of the inputs
    outputs    what `linear_token_logprobs` can return besides log-probabilities and entropy
"""
