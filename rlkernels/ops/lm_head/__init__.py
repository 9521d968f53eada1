"""The LM head in tiles: its matrix products are the library's, its rows our kernels'.

Only scored rows are worked on: they are gathered, in order, and filled up to blocks of one number of rows, so that
every matrix product has one shape and a row's result does not depend on how many others there are. A tile is a block of
rows by a range of the vocabulary. What a tile has in the sums of its rows (`token_logprobs_part`) is joined over tiles,
and over the processes that share a vocabulary, in one order.
"""
