"""The losses of the trainers, and the advantages that go into them."""
