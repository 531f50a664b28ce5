"""Elements of a row as registers hold them, and comparisons of all that one holds at a time.

A *word* is an element in fp32 or, on NVIDIA's devices, where one instruction serves two elements of 16 bits, a pair of
them in an int32, the first in the lower half. Words come in vectors, (GROUPS, words of a vector), each vector in one
thread. A comparison gives a *mask* for each word, all ones for an element of which it is true, 0 for the others, in
each half of a pair; the bits of a vector are its comparisons in one number, the first element's lowest.

Elements are compared by their keys, see ``key_of``.
"""

import triton
import triton.language as tl

_INF = tl.constexpr(float("inf"))
_ALL = tl.constexpr(tl.PropagateNan.ALL)


# --- ordered keys -----------------------------------------------------------------------------------------------------


@triton.jit
def key_of(x, ELEMENT: tl.constexpr):
    """Integer (int32) of a float rounded to ELEMENT, in the order of the floats, the same for -0 and +0."""
    if ELEMENT.primitive_bitwidth == 16:
        bits = x.to(ELEMENT).to(tl.int16, bitcast=True).to(tl.int32)
        key = bits ^ ((bits >> 31) & 0x7FFF)
    else:
        bits = x.to(tl.int32, bitcast=True)
        key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(key == -1, 0, key)


@triton.jit
def float_of(key, ELEMENT: tl.constexpr):
    """Inverse of key_of, in fp32."""
    bits = key ^ ((key >> 31) & (0x7FFF if ELEMENT.primitive_bitwidth == 16 else 0x7FFFFFFF))
    if tl.bfloat16 == ELEMENT:  # by hand: Triton's interpreter turns its subnormals to 0
        return (bits << 16).to(tl.float32, bitcast=True)
    if tl.float16 == ELEMENT:
        return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _pair(key, ELEMENT: tl.constexpr):
    """Two elements with this key."""
    return ((key ^ ((key >> 31) & 0x7FFF)) & 0xFFFF) * 0x10001


@triton.jit
def masked_key(ELEMENT: tl.constexpr):
    """The key of -inf."""
    return key_of(tl.full((), -_INF, tl.float32), ELEMENT)


# --- bits -------------------------------------------------------------------------------------------------------------


@triton.jit
def all_bits(inside, NUMBER: tl.constexpr):
    """NUMBER ones where inside, else none."""
    return tl.where(inside, (1 << NUMBER) - 1, 0)


@triton.jit
def bit_at(place, NUMBER: tl.constexpr):
    """The bit of a place among NUMBER, none where it is not among them."""
    return tl.where((place >= 0) & (place < NUMBER), 1 << (place & 31), 0)


# --- words ------------------------------------------------------------------------------------------------------------


@triton.jit
def words_of(ptr, inside, VECTOR: tl.constexpr, FAST: tl.constexpr):
    """The vectors that begin at these addresses, -inf where not inside."""
    if FAST and ptr.dtype.element_ty.primitive_bitwidth == 16:
        pairs = ptr.to(tl.pointer_type(tl.int32), bitcast=True)[:, None] + tl.arange(0, VECTOR // 2)[None, :]
        nothing = _pair(masked_key(ptr.dtype.element_ty), ptr.dtype.element_ty)
        words = tl.load(pairs, mask=inside[:, None], other=nothing)
    else:
        elements = ptr[:, None] + tl.arange(0, VECTOR)[None, :]
        words = tl.load(elements, mask=inside[:, None], other=-_INF).to(tl.float32)
    return words


@triton.jit
def no_words(GROUPS: tl.constexpr, ELEMENT: tl.constexpr, FAST: tl.constexpr):
    """-inf in (GROUPS,) words."""
    if FAST and ELEMENT.primitive_bitwidth == 16:
        words = tl.zeros((GROUPS,), tl.int32) + _pair(masked_key(ELEMENT), ELEMENT)
    else:
        words = tl.full((GROUPS,), -_INF, tl.float32)
    return words


@triton.jit
def load_words(array, tile, GROUPS: tl.constexpr, VECTOR: tl.constexpr, FAST: tl.constexpr):
    """-> (words of a tile of vectors, -inf behind the body; position of the first element of each vector; which are
    inside)"""
    group = tl.arange(0, GROUPS)
    first = tile * (GROUPS * VECTOR)
    inside = group < array.body // VECTOR - tile * GROUPS
    return words_of(array.ptr + first + group * VECTOR, inside, VECTOR, FAST), first + group * VECTOR, inside


@triton.jit
def floats(words, ELEMENT: tl.constexpr, FAST: tl.constexpr):
    """The elements in fp32, (GROUPS, VECTOR)"""
    if FAST and ELEMENT.primitive_bitwidth == 16:
        if tl.bfloat16 == ELEMENT:
            even, odd = (words << 16).to(tl.float32, bitcast=True), (words & -65536).to(tl.float32, bitcast=True)
        else:
            even = words.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            odd = (words >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        words = tl.reshape(tl.join(even, odd), (words.shape[0], 2 * words.shape[1]))
    return words


@triton.jit
def at_least(words, key, ELEMENT: tl.constexpr, FAST: tl.constexpr):
    """Masks of the elements whose key is at least ``key``, which is above that of -inf; never of a NaN.

    Of a pair: the sign of what is just below less the element, which is no sign where that is a NaN.
    """
    if FAST and ELEMENT.primitive_bitwidth == 16:
        below = _pair(tl.where(key == 0, -2, key - 1), ELEMENT)
        if tl.bfloat16 == ELEMENT:
            less = tl.inline_asm_elementwise(
                "fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r", [words, -0x407F4080, below], tl.int32, True, 1
            )  # fmt: skip
        else:
            less = tl.inline_asm_elementwise(
                "fma.rn.f16x2 $0, $1, $2, $3;", "=r,r,r,r", [words, -0x43FF4400, below], tl.int32, True, 1
            )  # fmt: skip
        masks = _signs(less)
    else:
        masks = tl.where(words >= float_of(key, ELEMENT), -1, 0)
    return masks


@triton.jit
def equal(words, key, above, ELEMENT: tl.constexpr, FAST: tl.constexpr):
    """Masks of the elements that have a key, that of -inf or another; above: masks of those with a higher one."""
    if FAST and ELEMENT.primitive_bitwidth == 16:
        masked = masked_key(ELEMENT)
        lowest = _pair(tl.where(key == masked, masked + 1, masked), ELEMENT)
        no_lower = higher(words, words * 0 + lowest, ELEMENT, FAST)  # -inf as the lowest that a comparison can ask for
        masks = at_least(no_lower, tl.maximum(key, masked + 1), ELEMENT, FAST) & ~above
    else:
        masks = tl.where(words == float_of(key, ELEMENT), -1, 0)
    return masks


@triton.jit
def _signs(pairs):
    """Each half of a pair, its sign in all its bits."""
    return tl.inline_asm_elementwise("prmt.b32 $0, $1, 0, 0xBB99;", "=r,r", [pairs], tl.int32, True, 1)


@triton.jit
def kept(words, masks, ELEMENT: tl.constexpr, FAST: tl.constexpr, ELSE: tl.constexpr = -_INF):
    """The elements under the masks, -inf or ELSE elsewhere."""
    if FAST and ELEMENT.primitive_bitwidth == 16:
        other = _pair(key_of(tl.full((), ELSE, tl.float32), ELEMENT), ELEMENT)
        words = other ^ ((words ^ other) & masks)
    else:
        words = tl.where(masks != 0, words, ELSE)
    return words


@triton.jit
def count(masks, THREADS: tl.constexpr, ELEMENT: tl.constexpr, FAST: tl.constexpr):
    """How many elements are under the masks of each thread, (THREADS,)"""
    sums = -tl.sum(tl.reshape(tl.sum(masks, axis=1), (masks.shape[0] // THREADS, THREADS)), axis=0)
    if FAST and ELEMENT.primitive_bitwidth == 16:  # the odd ones' number less the even ones', above the even ones'
        sums = (sums >> 16) + 2 * (sums & 0xFFFF)
    return sums


@triton.jit
def bits_of(masks, ELEMENT: tl.constexpr, FAST: tl.constexpr):
    """The bits of each vector, (GROUPS,)"""
    word = tl.arange(0, masks.shape[1])
    if FAST and ELEMENT.primitive_bitwidth == 16:
        found = tl.sum(masks & ((1 << (2 * word)) | (2 << (2 * word + 16)))[None, :], axis=1)
        bits = (found & 0xFFFF) | (found >> 16)
    else:
        bits = tl.sum(masks & (1 << word)[None, :], axis=1)
    return bits


@triton.jit
def masks_of(bits, VECTOR: tl.constexpr, ELEMENT: tl.constexpr, FAST: tl.constexpr):
    """Inverse of bits_of."""
    if FAST and ELEMENT.primitive_bitwidth == 16:
        even = 2 * tl.arange(0, VECTOR // 2)
        masks = _signs(bits[:, None] * ((1 << (15 - even)) + (1 << (30 - even)))[None, :])
    else:
        masks = -((bits[:, None] >> tl.arange(0, VECTOR)[None, :]) & 1)
    return masks


@triton.jit
def columns(words, ELEMENT: tl.constexpr, FAST: tl.constexpr):
    """The VECTOR elements of each vector, (GROUPS,) each, without leaving the threads that hold them."""
    if FAST and ELEMENT.primitive_bitwidth == 16:
        found = ()
        for pair in tl.static_range(words.shape[1]):
            word = _columns(words)[pair]
            even, odd = word.to(tl.int16), (word >> 16).to(tl.int16)
            found = found + (even.to(ELEMENT, bitcast=True), odd.to(ELEMENT, bitcast=True))  # noqa: RUF005
    else:
        found = _columns(words.to(ELEMENT))
    return found


@triton.jit
def _columns(x):
    GROUPS: tl.constexpr = x.shape[0]
    if x.shape[1] == 1:
        found = (tl.reshape(x, (GROUPS,)),)
    elif x.shape[1] == 2:
        found = tl.split(x)
    elif x.shape[1] == 4:
        even, odd = tl.split(tl.reshape(x, (GROUPS, 2, 2)))
        x0, x2 = tl.split(even)
        x1, x3 = tl.split(odd)
        found = (x0, x1, x2, x3)
    else:
        even, odd = tl.split(tl.reshape(x, (GROUPS, 4, 2)))
        x0, x2, x4, x6 = _columns(even)
        x1, x3, x5, x7 = _columns(odd)
        found = (x0, x1, x2, x3, x4, x5, x6, x7)
    return found


@triton.jit
def higher(x, y, ELEMENT: tl.constexpr, FAST: tl.constexpr):
    """Of each two elements the larger, NaN if one is."""
    if FAST and ELEMENT.primitive_bitwidth == 16:
        if tl.bfloat16 == ELEMENT:
            found = tl.inline_asm_elementwise("max.NaN.bf16x2 $0, $1, $2;", "=r,r,r", [x, y], tl.int32, True, 1)
        else:
            found = tl.inline_asm_elementwise("max.NaN.f16x2 $0, $1, $2;", "=r,r,r", [x, y], tl.int32, True, 1)
    else:
        found = tl.maximum(x, y, propagate_nan=_ALL)
    return found


@triton.jit
def lower(x, y, ELEMENT: tl.constexpr, FAST: tl.constexpr):
    """Of each two elements the smaller; none is NaN."""
    if FAST and ELEMENT.primitive_bitwidth == 16:
        if tl.bfloat16 == ELEMENT:
            found = tl.inline_asm_elementwise("min.bf16x2 $0, $1, $2;", "=r,r,r", [x, y], tl.int32, True, 1)
        else:
            found = tl.inline_asm_elementwise("min.f16x2 $0, $1, $2;", "=r,r,r", [x, y], tl.int32, True, 1)
    else:
        found = tl.minimum(x, y)
    return found


@triton.jit
def of_vector(words, COMBINE: tl.constexpr, ELEMENT: tl.constexpr, FAST: tl.constexpr):
    """The words of each vector combined in one, (GROUPS,): a tree inside each thread's vectors.

    tl.max would lose a NaN, and a reduction with a combine function of our own is one call per element in the
    interpreter.
    """
    GROUPS: tl.constexpr = words.shape[0]
    WORDS: tl.constexpr = words.shape[1]
    if WORDS >= 16:
        left, right = tl.split(tl.reshape(words, (GROUPS, 8, 2)))
        words = COMBINE(left, right, ELEMENT, FAST)
    if WORDS >= 8:
        left, right = tl.split(tl.reshape(words, (GROUPS, 4, 2)))
        words = COMBINE(left, right, ELEMENT, FAST)
    if WORDS >= 4:
        left, right = tl.split(tl.reshape(words, (GROUPS, 2, 2)))
        words = COMBINE(left, right, ELEMENT, FAST)
    if WORDS >= 2:
        left, right = tl.split(words)
        words = COMBINE(left, right, ELEMENT, FAST)
    return tl.reshape(words, (GROUPS,))


@triton.jit
def of_thread(words, COMBINE: tl.constexpr, THREADS: tl.constexpr, ELEMENT: tl.constexpr, FAST: tl.constexpr):
    """The same of all vectors of each thread, (THREADS,)"""
    words = of_vector(words, COMBINE, ELEMENT, FAST)
    return of_vector(tl.trans(tl.reshape(words, (words.shape[0] // THREADS, THREADS))), COMBINE, ELEMENT, FAST)


@triton.jit
def element_of(words, COMBINE: tl.constexpr, ELEMENT: tl.constexpr, FAST: tl.constexpr):
    """Of what ``of_vector`` returns the element, in fp32."""
    if FAST and ELEMENT.primitive_bitwidth == 16:
        even, odd = tl.split(floats(words[:, None], ELEMENT, FAST))
        words = COMBINE(even, odd, tl.float32, FAST)
    return words


@triton.jit
def number_of(bits, FAST: tl.constexpr):
    """How many bits are set of at most eight; of more with FAST."""
    if FAST:
        number = tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [bits], tl.int32, True, 1)
    else:
        twos = bits - ((bits >> 1) & 0x55)
        fours = (twos & 0x33) + ((twos >> 2) & 0x33)
        number = (fours + (fours >> 4)) & 0xF
    return number
