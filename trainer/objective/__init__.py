"""The objective: one module per piece (ALGORITHMS.md section 3), each a pure function of tensors; `loss` composes them.

Tensors are packed: one dimension over the T refinement tokens of a micro-batch, without padding. Names carry the shape:
`_T` per token, `_B` per sequence; `segment_T` (int64) is the sequence of each token, 0 to B - 1, in order.
"""
