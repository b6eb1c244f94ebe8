"""The k largest of a row of scores, held in registers: keys in score order, ranks by counted bits, exact search."""

import triton
import triton.language as tl

NO_KEY = tl.constexpr(-2147483648)  # not a candidate
DROPPED = tl.constexpr(-2147483647)  # a candidate that lost a tie
NAN_KEY = tl.constexpr(-2147483646)  # below -inf, which is -2139095041


@triton.jit
def to_key(score):
    """float32 -> int32 in the same order."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)  # -0.0 + 0.0 = 0.0; denormals stay
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(score != score, NAN_KEY, key)


@triton.jit
def to_score(key):
    """int32 key -> float32."""
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def log_count(count):
    """The logarithm of a count + 1/2, in units and with an accuracy that only interpolation is content with.

    A float's bits are its logarithm, bent by less than a tenth of an octave: two instructions for twenty.
    """
    return (count.to(tl.float32) + 0.5).to(tl.int32, bitcast=True).to(tl.float32)


@triton.jit
def next_guess(low, high, part, step, INTERPOLATIONS: tl.constexpr):
    """Next threshold, strictly between the keys ``low`` and ``high``, ``part`` of the way between their scores."""
    guess = (low & high) + ((low ^ high) >> 1)
    if step < INTERPOLATIONS:
        x_low = to_score(low)
        x_high = to_score(high)
        if (x_low > float("-inf")) & (x_high < float("inf")):
            bits = (x_low + (x_high - x_low) * part).to(tl.int32, bitcast=True)
            guess = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.minimum(tl.maximum(guess, low + 1), high - 1)


@triton.jit
def popcount(x):
    """Bits set in each uint32. LLVM knows this sequence as one instruction."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def words_of(flag):
    """Flags (R, 32) -> R words of 32 bits: one warp-wide reduction each."""
    bit = tl.arange(0, 32).to(tl.uint32)
    return tl.sum(flag.to(tl.uint32) << bit[None, :], axis=1)


@triton.jit
def ranks_of(word):
    """Set bits before each position in row-major order, (R, 32), and up to each word's end, (R,), from the words."""
    count = popcount(word)
    so_far = tl.cumsum(count, axis=0)
    below = ((1 << tl.arange(0, 32)) - 1).to(tl.uint32)
    return (so_far - count)[:, None] + popcount(word[:, None] & below[None, :]), so_far


@triton.jit
def count_reaching(key, least):
    """How many keys are at least ``least``."""
    return tl.sum((key >= least).to(tl.int32))


@triton.jit
def top_k(key, n, k, INTERPOLATIONS: tl.constexpr):
    """Keys and threshold such that exactly the k largest of n > k keys, ties to the lower index, reach it."""
    low = tl.min(tl.where(key > NO_KEY, key, 2147483647))
    high = tl.max(key) + 1
    above_low = n
    above_high = n * 0
    side = n * 0
    step = n * 0
    wanted = log_count(k)
    y_low = log_count(above_low) - wanted
    y_high = log_count(above_high) - wanted
    while (low + 1 < high) & (above_low != k):
        guess = next_guess(low, high, y_low / (y_low - y_high), step, INTERPOLATIONS)
        above = count_reaching(key, guess)
        enough = above >= k
        y = log_count(above) - wanted
        # Illinois: of two steps on one side the other end, which did not move, is taken for half as far off.
        y_high = tl.where(enough, tl.where(side > 0, 0.5 * y_high, y_high), y)
        y_low = tl.where(enough, y, tl.where(side < 0, 0.5 * y_low, y_low))
        side = tl.where(enough, 1, -1)
        low = tl.where(enough, guess, low)
        above_low = tl.where(enough, above, above_low)
        high = tl.where(enough, high, guess)
        above_high = tl.where(enough, above_high, above)
        step += 1
    if above_low != k:
        before, _ = ranks_of(words_of(key == low))
        key = tl.where((key == low) & (before >= k - above_high), DROPPED, key)
    return key, low
