"""One autograd operation a file: the maths in the header, the torch reference, the Triton path."""
