"""Where a gradient lies in memory. Imports no Triton: the ops' shape functions need it on every machine."""


def gradient_row_stride(num_classes: int, logits_strides: tuple[int, int], itemsize: int) -> int:
    """Row stride of dlogits, which is contiguous within a row.

    Vector loads and vector stores of 16 bytes can both be aligned only where a row of dlogits begins at the same
    remainder by 16 bytes as the row of logits. For contiguous logits this is the contiguous stride; for rows cut out of
    a wider matrix, fewer than 16 bytes more.
    """
    row_stride, column_stride = logits_strides
    if column_stride != 1 and num_classes != 1:  # such logits are copied first
        return num_classes
    return num_classes + (row_stride - num_classes) % (16 // itemsize)
