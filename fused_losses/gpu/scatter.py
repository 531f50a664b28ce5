"""The losses over the k hardest negatives, backward: one launch that writes every element of the gradient once.

``scatter_kernel`` (compact form) fills the row and then writes the picks' gradients into it; no logit is read.
``threshold_kernel`` walks the logits again and asks of each whether it is a pick.
"""

import triton
import triton.language as tl

from .formulas import sigmoid
from .logistic import multi_hot, open_target
from .rows import SIZES, load_tile, open_row, part_of, read_index, store_tile, tile_lanes
from .select import rim_positions
from .softmax import share_of_negatives

_SIZES = (*SIZES, "dlogits_phase", "k")


# --- families ---------------------------------------------------------------------------------------------------------


@triton.jit
def softmax_coefficients(
    grad_ptr, grad_row_stride, grad_stride, state_ptr, row, a, b, SLOPE: tl.constexpr
):  # fmt: skip
    """-> (gradient at an index target, factor of a positive, factor of a negative, and its two parameters, whether no
    NaN)"""
    top = tl.load(state_ptr + row * 3)
    log_total = tl.load(state_ptr + row * 3 + 1)
    margin = (tl.load(state_ptr + row * 3 + 2) - top) - log_total
    coefficient = tl.load(grad_ptr + row * grad_row_stride).to(tl.float32) * SLOPE(margin, a, b, False)
    coefficient = tl.where(margin == margin, coefficient, float("nan"))
    log_total = tl.where(log_total == float("-inf"), 0.0, log_total)  # every pick is -inf: exp gives 0, not NaN
    return coefficient, 0.0, -coefficient, top, log_total, coefficient == coefficient


@triton.jit
def softmax_negative(z, top, log_total, SLOPE: tl.constexpr, FAST: tl.constexpr):
    return share_of_negatives(z, top, log_total, FAST)


@triton.jit
def logistic_coefficients(
    grad_ptr, grad_row_stride, grad_stride, state_ptr, row, a, b, SLOPE: tl.constexpr
):  # fmt: skip
    grad_pos = tl.load(grad_ptr + row * grad_row_stride).to(tl.float32)
    grad_neg = tl.load(grad_ptr + row * grad_row_stride + grad_stride).to(tl.float32)
    z_y = tl.load(state_ptr + row * 2)
    return -grad_pos * sigmoid(-z_y, False), -grad_pos, grad_neg, a, b, z_y == z_y


@triton.jit
def logistic_negative(z, a, b, SLOPE: tl.constexpr, FAST: tl.constexpr):
    return SLOPE(z, a, b, FAST)


# --- targets ----------------------------------------------------------------------------------------------------------


@triton.jit
def index_positives(
    target_ptr, target_phase, target_stride, row, num_classes, ignore_index, first_class, all_classes,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """-> (class or -1, address of the target's entry at position 0 if multi-hot, live, dead)"""
    target, live, dead = read_index(target_ptr, row, target_stride, num_classes, ignore_index, first_class, all_classes)
    return target, target_ptr, live, dead


@triton.jit
def index_fill(fill, target_body_ptr, body_ptr, positions, inside, grad_pos, FAST: tl.constexpr):
    """What stands in the gradient before the picks are written."""
    return tl.full(positions.shape, 0.0, tl.float32) + fill


@triton.jit
def index_positive(
    z, target, at_target, target_body_ptr, head, positions, inside, grad_pos, FAST: tl.constexpr
):  # fmt: skip
    """-> (which elements are positives, their gradient)"""
    return head + positions == target, at_target


@triton.jit
def multi_hot_positives(
    target_ptr, target_phase, target_stride, row, num_classes, ignore_index, first_class, all_classes,
    VECTOR: tl.constexpr,
):  # fmt: skip
    _, target_body_ptr = open_target(target_ptr, target_phase, row, target_stride, VECTOR)
    return -1, target_body_ptr, num_classes >= 0, 0.0


@triton.jit
def multi_hot_fill(fill, target_body_ptr, body_ptr, positions, inside, grad_pos, FAST: tl.constexpr):
    positive = multi_hot(target_body_ptr, positions, inside)
    z = tl.load(body_ptr + positions, mask=positive, other=0.0).to(tl.float32)
    return fill + tl.where(positive, grad_pos * sigmoid(-z, FAST), 0.0)


@triton.jit
def multi_hot_positive(
    z, target, at_target, target_body_ptr, head, positions, inside, grad_pos, FAST: tl.constexpr
):  # fmt: skip
    return multi_hot(target_body_ptr, positions, inside), grad_pos * sigmoid(-z, FAST)


# --- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _filled_here(position, first, behind, body):
    """Whether this program fills a position, from the range of its tiles. The first program of a row has the rim."""
    first = tl.where(tl.program_id(1) == 0, -2147483648, first)
    tail = tl.where(tl.program_id(1) == 0, body, 2147483647)
    return ((position >= first) & (position < tl.minimum(behind, body))) | (position >= tail)


@triton.jit(do_not_specialize=_SIZES)
def scatter_kernel(
    dlogits_ptr, dlogits_phase, dlogits_stride,  # (rows, classes)
    grad_ptr, grad_row_stride, grad_stride,  # (rows,) or (rows, 2)
    state_ptr,  # (rows, 3) or (rows, 2)
    pick_index_ptr, pick_logit_ptr,  # (rows, k)
    logits_ptr, phase, row_stride,  # (rows, classes), read at multi-hot positives only
    target_ptr, target_phase, target_stride,  # (rows,) or (rows, classes)
    num_classes, ignore_index, first_class, all_classes, k, a, b,
    POSITIVES: tl.constexpr, FILL: tl.constexpr, COEFFICIENTS: tl.constexpr, NEGATIVE: tl.constexpr,
    SLOPE: tl.constexpr,
    FAST: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One program, one part of a row. It writes the picks whose classes it has filled itself, so a barrier orders the
    two."""
    VECTOR: tl.constexpr = 128 // dlogits_ptr.dtype.element_ty.primitive_bitwidth
    TILE: tl.constexpr = ROWS * LANES
    element = dlogits_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    drow_ptr, dbody_ptr, head, body = open_row(dlogits_ptr, dlogits_phase, row, dlogits_stride, num_classes)
    _, body_ptr, _, _ = open_row(logits_ptr, phase, row, row_stride, num_classes)
    target, target_body_ptr, live, dead = POSITIVES(
        target_ptr, target_phase, target_stride, row, num_classes, ignore_index, first_class, all_classes, VECTOR
    )
    at_target, grad_pos, scale, p, q, sound = COEFFICIENTS(
        grad_ptr, grad_row_stride, grad_stride, state_ptr, row, a, b, SLOPE
    )
    fill = tl.where(live, tl.where(sound, 0.0, float("nan")), dead)
    first, behind = part_of(body, TILE)
    for tile in range(first, behind):
        positions = tile * TILE + tile_lanes(ROWS, LANES)
        tile_fill = FILL(fill, target_body_ptr, body_ptr, positions, positions < body, grad_pos, FAST)
        store_tile(dbody_ptr, tile, body, tile_fill, ROWS, LANES)
    rim, inside = rim_positions(head, body, num_classes, VECTOR)
    inside = inside & _filled_here(rim, first * TILE, behind * TILE, body)
    rim_fill = FILL(fill, target_body_ptr, body_ptr, rim, inside, grad_pos, FAST)
    tl.store(dbody_ptr + rim, rim_fill.to(element), mask=inside)

    tl.debug_barrier()
    sound = live & sound
    has_target = (target >= 0) & _filled_here(target - head, first * TILE, behind * TILE, body)
    tl.store(drow_ptr + target, at_target.to(element), mask=sound & has_target)
    for start in range(0, tl.where(sound, k, 0), LANES):
        slot = start + tl.arange(0, LANES)
        classes = tl.load(pick_index_ptr + row * k + slot, mask=slot < k, other=-1)
        z = tl.load(pick_logit_ptr + row * k + slot, mask=slot < k, other=float("-inf")).to(tl.float32)
        here = _filled_here(classes - head, first * TILE, behind * TILE, body)
        values = scale * NEGATIVE(z, p, q, SLOPE, FAST)
        tl.store(drow_ptr + classes, values.to(element), mask=(classes >= 0) & (classes < num_classes) & here)


@triton.jit
def _gradient(
    z, positions, inside, head, target, at_target, target_body_ptr, edge, edge_class, scale, p, q, grad_pos,
    POSITIVE: tl.constexpr, NEGATIVE: tl.constexpr, SLOPE: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    picked = (z > edge) | ((z == edge) & (positions <= edge_class - head))
    positive, gradient = POSITIVE(z, target, at_target, target_body_ptr, head, positions, inside, grad_pos, FAST)
    return tl.where(positive, gradient, tl.where(picked, scale * NEGATIVE(z, p, q, SLOPE, FAST), 0.0))


@triton.jit(do_not_specialize=_SIZES)
def threshold_kernel(
    dlogits_ptr, dlogits_stride,  # (rows, classes), of the logits' phase
    grad_ptr, grad_row_stride, grad_stride,  # (rows,) or (rows, 2)
    state_ptr,  # (rows, 3) or (rows, 2)
    pick_index_ptr, pick_logit_ptr,  # (rows, 1)
    logits_ptr, phase, row_stride,  # (rows, classes)
    target_ptr, target_phase, target_stride,  # (rows,) or (rows, classes)
    num_classes, ignore_index, first_class, all_classes, a, b,
    POSITIVES: tl.constexpr, POSITIVE: tl.constexpr, COEFFICIENTS: tl.constexpr, NEGATIVE: tl.constexpr,
    SLOPE: tl.constexpr,
    FAST: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One program, one part of a row."""
    VECTOR: tl.constexpr = 128 // logits_ptr.dtype.element_ty.primitive_bitwidth
    TILE: tl.constexpr = ROWS * LANES
    element = dlogits_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    _, body_ptr, head, body = open_row(logits_ptr, phase, row, row_stride, num_classes)
    _, dbody_ptr, _, _ = open_row(dlogits_ptr, phase, row, dlogits_stride, num_classes)
    target, target_body_ptr, live, dead = POSITIVES(
        target_ptr, target_phase, target_stride, row, num_classes, ignore_index, first_class, all_classes, VECTOR
    )
    at_target, grad_pos, scale, p, q, sound = COEFFICIENTS(
        grad_ptr, grad_row_stride, grad_stride, state_ptr, row, a, b, SLOPE
    )
    edge_class = tl.load(pick_index_ptr + row)
    edge = tl.where(
        edge_class < 0, float("inf"), tl.load(pick_logit_ptr + row).to(tl.float32)
    )  # nothing lies above +inf
    first, behind = part_of(body, TILE)
    rim, inside = rim_positions(head, body, num_classes, VECTOR)
    inside = inside & _filled_here(rim, first * TILE, behind * TILE, body)
    if live & sound:
        for tile in range(first, behind):
            positions = tile * TILE + tile_lanes(ROWS, LANES)
            z = load_tile(body_ptr, tile, body, ROWS, LANES)
            values = _gradient(
                z, positions, positions < body, head, target, at_target, target_body_ptr, edge, edge_class, scale, p, q,
                grad_pos, POSITIVE, NEGATIVE, SLOPE, FAST,
            )  # fmt: skip
            store_tile(dbody_ptr, tile, body, values, ROWS, LANES)
        rim_z = tl.load(body_ptr + rim, mask=inside, other=0.0).to(tl.float32)
        rim_values = _gradient(
            rim_z, rim, inside, head, target, at_target, target_body_ptr, edge, edge_class, scale, p, q, grad_pos,
            POSITIVE, NEGATIVE, SLOPE, FAST,
        )  # fmt: skip
        tl.store(dbody_ptr + rim, rim_values.to(element), mask=inside)
    else:
        fill = tl.where(live, float("nan"), dead)
        for tile in range(first, behind):
            store_tile(dbody_ptr, tile, body, tl.full((ROWS, LANES), 0.0, tl.float32) + fill, ROWS, LANES)
        tl.store(dbody_ptr + rim, (tl.zeros((2 * VECTOR,), tl.float32) + fill).to(element), mask=inside)
