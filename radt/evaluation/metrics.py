"""Measures over arrays of features: pure mathematics, each with its source. What the features are is not known here.

Set against set: `frechet_distance`, `kernel_distance` (KID), `gaussian_mmd` (CMMD), `neighborhoods` (precision, recall,
density, coverage). One set: `inception_score`. Pictures and texts: `clip_scores`, `r_precision_hits`. Answers of a
classifier: `object_accuracy`. Retrieval: `recalls`, `hits`, `reciprocal_ranks`.

A mean of one value a picture gets its interval from `mean_score`; what is no such mean from `subset_score`, or from
subsets likewise.
"""

import math
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float64, Int, Num

from index.errors import ConfigError, ModelError
from radt.evaluation.intervals import wilson

ROUNDING = 1e-12  # of a sum of squares in 64 bits
CHUNK = 1024  # rows of a matrix of distances at once
Z95 = 1.959964  # standard errors to each side of a 95 % interval
SUBSET_SIZE = 1000  # of KID (Binkowski et al. 2018, section 4)
SUBSETS = 100
RESAMPLES = 1000
NEIGHBORHOODS = ("precision", "recall", "density", "coverage")
LEAST_OF_BALLS = 6  # pictures in a set with a ball up to the 5th neighbour of each
LEAST = 4  # pictures in a set whose halves still have a variance
CMMD_SIGMA = 10.0  # Jayasumana et al. 2024, over CLIP embeddings of unit length
CMMD_SCALE = 1000.0
CLIP_SCALE = 100.0  # of a cosine
CANDIDATES = 100  # captions of an R-precision

Features = Float[np.ndarray, "n d"]
Statistic = Callable[..., float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """A measured number. `low` and `high` bound its 95 % interval, None where there are too few pictures for one.

    `n` counts what the interval rests on: pictures of the measured set, reals, prompts or queries. `method` says how.
    `at_half` is the mean over halves of the sets, None where smaller subsets were taken: what moves between it and
    `value` still moves with N.
    """

    value: float
    low: float | None
    high: float | None
    n: int
    method: str
    at_half: float | None = None


# Intervals


def mean_score(values: Num[np.ndarray, " n"] | Bool[np.ndarray, " n"], *, seed: int = 0) -> Score:
    """The mean of one value for each picture. Shares have Wilson's interval, others the percentile bootstrap's.

    Values that are all 0 or one and the same c are c times a share, and have c times Wilson's interval; c alone, too,
    as if it could have been 0: a bootstrap of equal values would be sure of them. The bootstrap (Efron and Tibshirani
    1993, section 13.3) draws `RESAMPLES` times; one value that is neither 0 nor 1 has no interval.
    """
    numbers = np.asarray(values, np.float64)
    if len(numbers) == 0:
        raise ConfigError("there is nothing to take the mean of: give at least one picture")
    _check_finite(numbers[:, None])
    mean, n = float(numbers.mean()), len(numbers)
    others = np.unique(numbers[numbers != 0])
    if len(others) == 0 or others.tolist() == [1.0]:
        low, high = wilson(mean, n)
        return Score(value=mean, low=low, high=high, n=n, method="Wilson")
    if n < 2:
        return Score(value=mean, low=None, high=None, n=n, method="one value has no interval")
    if len(others) == 1:
        return _scaled_share(numbers, float(others[0]))
    rng = np.random.default_rng(seed)
    means = [float(numbers[rng.integers(n, size=n)].mean()) for _ in range(RESAMPLES)]
    low, high = np.quantile(means, (0.025, 0.975))
    return Score(
        value=mean,
        low=min(mean, float(low)),
        high=max(mean, float(high)),
        n=n,
        method=f"bootstrap of {RESAMPLES}",
    )


def _scaled_share(numbers: Float64[np.ndarray, " n"], c: float) -> Score:
    """The mean of values that are each 0 or c."""
    mean, n = float(numbers.mean()), len(numbers)
    low, high = sorted(c * bound for bound in wilson(np.count_nonzero(numbers) / n, n))
    is_constant = bool((numbers == c).all())
    method = f"Wilson times {c:.4g}, " + ("as if each could be 0 too" if is_constant else f"each is 0 or {c:.4g}")
    return Score(value=mean, low=min(mean, low), high=max(mean, high), n=n, method=method)


def subset_score(
    statistic: Statistic,
    sets: Sequence[np.ndarray],
    *,
    subsets: int = SUBSETS,
    seed: int = 0,
    floor: float | None = 0.0,
) -> Score:
    """A statistic of whole sets, its standard error from random halves: the delete-d jackknife (Shao and Wu 1989).

    `sqrt(m / (n - m))` times the spread over subsets of m among n is the standard error of a smooth statistic. Nothing
    is drawn twice, for a Frechet distance or a nearest neighbour takes a double for agreement: the bootstrap's would
    be too high. The interval says how much the pictures drawn matter; it does not mend a bias that depends on N.
    `floor` cuts it off.
    """
    value, n = statistic(*sets), len(sets[0])
    if min(map(len, sets)) < LEAST:
        return Score(value=value, low=None, high=None, n=n, method=f"fewer than {LEAST} pictures have no interval")
    sizes = [len(each) // 2 for each in sets]
    values = np.array([statistic(*some) for some in _subsets(sets, sizes, subsets=subsets, seed=seed)])
    method = f"jackknife over {subsets} halves"
    error = jackknife_error(values, sizes, list(map(len, sets)))
    return _around(value, error, n=n, method=method, floor=floor, at_half=float(values.mean()))


def jackknife_error(values: Float64[np.ndarray, " s"], sizes: Sequence[int], totals: Sequence[int]) -> float:
    """The standard error over all of `totals`, from values over random subsets of `sizes` (Shao and Wu 1989).

    With sets of different shares the largest factor is taken, which is at worst too wide.
    """
    return float(values.std(ddof=1)) * max(m / (n - m) for m, n in zip(sizes, totals, strict=True)) ** 0.5


def _around(
    value: float, error: float, *, n: int, method: str, floor: float | None = None, at_half: float | None = None
) -> Score:
    low = value - Z95 * error if floor is None else max(min(floor, value), value - Z95 * error)
    return Score(value=value, low=low, high=value + Z95 * error, n=n, method=method, at_half=at_half)


def _subsets(
    sets: Sequence[np.ndarray], sizes: Sequence[int], *, subsets: int, seed: int
) -> Iterator[list[np.ndarray]]:
    rng = np.random.default_rng(seed)
    for _ in range(subsets):
        yield [each[rng.permutation(len(each))[:size]] for each, size in zip(sets, sizes, strict=True)]


# Set against set


def frechet_distance(a: Features, b: Float[np.ndarray, "m d"]) -> float:
    """Squared Frechet distance of the Gaussians fitted to both (Dowson and Landau 1982; Heusel et al. 2017).

    |mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2)). With the centred rows X and Y, tr (A B)^(1/2) is the nuclear norm of
    X Y^T / sqrt((n - 1)(m - 1)): no root of a matrix is taken, and a singular covariance is no special case.
    """
    x, y = _wide(a, b, least=2)
    mean_x, mean_y = x.mean(axis=0), y.mean(axis=0)
    x, y = (x - mean_x) / np.sqrt(len(x) - 1), (y - mean_y) / np.sqrt(len(y) - 1)
    if min(len(x), len(y)) > x.shape[1]:  # a rotation of the rows, so that the product is d by d
        x, y = (np.asarray(np.linalg.qr(each, mode="r")) for each in (x, y))
    cross = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    distance = ((mean_x - mean_y) ** 2).sum() + (x**2).sum() + (y**2).sum() - 2 * cross
    return max(0.0, float(distance))


def frechet_score(a: Features, b: Float[np.ndarray, "m d"], *, subsets: int = SUBSETS, seed: int = 0) -> Score:
    """`frechet_distance` with its interval; `at_half` shows how far it would still fall with more pictures.

    The distance of finite sets is too high, by about c / N (Chong and Forsyth 2020).
    """
    return subset_score(frechet_distance, (a, b), subsets=subsets, seed=seed)


def polynomial_mmd(a: Features, b: Float[np.ndarray, "m d"]) -> float:
    """Unbiased squared maximum mean discrepancy, kernel (x.y / d + 1)^3 (Binkowski et al. 2018, section 4).

    May be below 0, where the sets are alike.
    """
    x, y = _wide(a, b, least=2)
    n, m, d = len(x), len(y), x.shape[1]

    def kernel(p: np.ndarray, q: np.ndarray) -> np.ndarray:
        return (p @ q.T / d + 1) ** 3

    own_x = (kernel(x, x).sum() - (((x**2).sum(axis=1) / d + 1) ** 3).sum()) / (n * (n - 1))
    own_y = (kernel(y, y).sum() - (((y**2).sum(axis=1) / d + 1) ** 3).sum()) / (m * (m - 1))
    return float(own_x + own_y - 2 * kernel(x, y).mean())


def kernel_distance(
    a: Features,
    b: Float[np.ndarray, "m d"],
    *,
    subset_size: int | None = None,
    subsets: int = SUBSETS,
    seed: int = 0,
) -> Score:
    """The mean of `polynomial_mmd` over random subsets of both sets (KID; Binkowski et al. 2018, section 4).

    Without `subset_size` they have 1000 pictures, or half of the smaller set. ConfigError when a set has not as many.
    The error joins that of the pictures (the jackknife's) and that of the lot by which the subsets are drawn, as the
    mean over few subsets of few pictures is far from the mean over all of them.
    """
    _wide(a, b, least=2)
    fewest = min(len(a), len(b))
    size = max(2, min(SUBSET_SIZE, fewest // 2)) if subset_size is None else subset_size
    if not 2 <= size <= fewest:
        raise too_few_for_subsets(size, fewest)
    if len(a) == len(b) == size:
        value = polynomial_mmd(a, b)
        return Score(value=value, low=None, high=None, n=len(a), method="all pictures at once have no interval")
    parts = _subsets((a, b), (size, size), subsets=subsets, seed=seed)
    values = np.array([polynomial_mmd(*some) for some in parts])
    value, method = float(values.mean()), f"jackknife over {subsets} subsets of {size}, and the lot of these"
    if size == fewest:
        return Score(value=value, low=None, high=None, n=len(a), method=f"no subset of {size} leaves any out")
    of_pictures = jackknife_error(values, (size, size), (len(a), len(b)))
    error = math.hypot(of_pictures, float(values.std(ddof=1)) / subsets**0.5)
    return _around(value, error, n=len(a), method=method)


def too_few_for_subsets(size: int, fewest: int) -> ConfigError:
    """What is wrong with subsets of `size`: 0 or 1, or more than the `fewest` pictures that the smaller set has."""
    if size < 2:
        return ConfigError(f"a kernel distance is taken over subsets of 2 pictures or more, got --subset-size {size}")
    return ConfigError(
        f"a kernel distance over subsets of {size} needs as many pictures in both sets, and the smaller has {fewest}: "
        f"give --subset-size {fewest} or less"
    )


def gaussian_mmd(
    a: Features, b: Float[np.ndarray, "m d"], *, sigma: float = CMMD_SIGMA, scale: float = CMMD_SCALE
) -> float:
    """Squared maximum mean discrepancy, kernel exp(-|x - y|^2 / (2 sigma^2)), times 1000 (Jayasumana et al. 2024).

    The biased estimator, of minimum variance, which they use too (Gretton et al. 2012, eq. 5); 0 of a set and itself.
    """
    x, y = _wide(a, b, least=1)

    def mean_kernel(p: np.ndarray, q: np.ndarray) -> float:
        return sum(float(np.exp(-each / (2 * sigma**2)).sum()) for each in _distances(p, q)) / (len(p) * len(q))

    return max(0.0, scale * (mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y)))


def gaussian_mmd_score(a: Features, b: Float[np.ndarray, "m d"], *, subsets: int = SUBSETS, seed: int = 0) -> Score:
    """`gaussian_mmd` of all pictures, its error from halves, or subsets of 1000 where halves are more: no `at_half`."""
    value = gaussian_mmd(a, b)
    if min(len(a), len(b)) < LEAST:
        return Score(value=value, low=None, high=None, n=len(a), method=f"fewer than {LEAST} pictures, no interval")
    halves = [len(each) // 2 for each in (a, b)]
    sizes = [min(SUBSET_SIZE, half) for half in halves]
    values = np.array([gaussian_mmd(*some) for some in _subsets((a, b), sizes, subsets=subsets, seed=seed)])
    error = jackknife_error(values, sizes, (len(a), len(b)))
    method = f"jackknife over {subsets} subsets of {sizes[0]} and {sizes[1]}"
    at_half = float(values.mean()) if sizes == halves else None
    return _around(value, error, n=len(a), method=method, floor=0.0, at_half=at_half)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Neighborhoods:
    """One value for each picture, whose means are the four measures.

    `precision` and `density` are of the measured pictures, given the reals; `recall` and `coverage` of the reals, given
    the measured ones. All balls are closed.
    """

    precision: Bool[np.ndarray, " n"]
    density: Float64[np.ndarray, " n"]
    recall: Bool[np.ndarray, " m"]
    coverage: Bool[np.ndarray, " m"]


def neighborhoods(
    pictures: Features, reals: Float[np.ndarray, "m d"], *, k: int = 3, k_density: int = 5
) -> Neighborhoods:
    """Improved precision and recall (Kynkaanniemi et al. 2019, eq. 2), density and coverage (Naeem et al. 2020, 3.2).

    A picture counts as precise when it lies in the ball of some real up to its k-th nearest real; recall turns that
    around. Density counts the balls, divided by k; a real is covered when its ball holds a picture. Balls reach to the
    `k`-th neighbour for the first two and to the `k_density`-th for the others, as in the papers.
    """
    x, y = _wide(pictures, reals, least=2)
    most = max(k, k_density)
    if min(len(x), len(y)) <= most or min(k, k_density) < 1:
        raise ConfigError(
            f"balls up to the {most}th neighbour need more than {most} pictures in each set, and there are {len(x)} "
            f"and {len(y)}: give more, or leave out precision, recall, density and coverage"
        )
    real_radii, wide_radii = kth_distances(y, (k, k_density))
    (own_radii,) = kth_distances(x, (k,))
    precision, density = [], []
    recall, coverage = np.zeros(len(y), bool), np.zeros(len(y), bool)
    for start, distances in zip(range(0, len(x), CHUNK), _distances(x, y), strict=True):
        precision.append((distances <= real_radii).any(axis=1))
        inside = distances <= wide_radii
        density.append(inside.sum(axis=1) / k_density)
        coverage |= inside.any(axis=0)
        recall |= (distances <= own_radii[start : start + CHUNK, None]).any(axis=0)
    return Neighborhoods(
        precision=np.concatenate(precision), density=np.concatenate(density), recall=recall, coverage=coverage
    )


def neighborhood_scores(
    pictures: Features, reals: Float[np.ndarray, "m d"], *, subsets: int = SUBSETS, seed: int = 0
) -> dict[str, Score]:
    """The means of `neighborhoods` by name, their errors from random halves of both sets: the delete-d jackknife.

    Every ball rests on several pictures and every picture on several balls, so that their values are not independent,
    and both sets are drawn by lot: the interval of a mean over one set, the other fixed, would be far too narrow. That
    of a share is never narrower than Wilson's, for at 0 and 1 halves do not differ.
    """
    found = neighborhoods(pictures, reals)
    sizes, totals = [len(pictures) // 2, len(reals) // 2], [len(pictures), len(reals)]
    values: dict[str, list[float]] = {name: [] for name in NEIGHBORHOODS}
    if min(sizes) >= LEAST_OF_BALLS:
        for a, b in _subsets((pictures, reals), sizes, subsets=subsets, seed=seed):
            half = neighborhoods(a, b)
            for name in NEIGHBORHOODS:
                values[name].append(float(getattr(half, name).mean()))
    scores = {}
    for name, of_halves in values.items():
        each = getattr(found, name)
        value, method = float(each.mean()), f"jackknife over {subsets} halves"
        if not of_halves:
            method = f"fewer than {2 * LEAST_OF_BALLS} pictures in a set have no interval"
            scores[name] = Score(value=value, low=None, high=None, n=len(each), method=method)
            continue
        error = jackknife_error(np.array(of_halves), sizes, totals)
        low, high = max(0.0, value - Z95 * error), value + Z95 * error
        if name != "density":
            least = wilson(value, len(each))
            low, high, method = min(low, least[0]), min(1.0, max(high, least[1])), f"{method}, or Wilson if wider"
        half_mean = float(np.mean(of_halves))
        scores[name] = Score(value=value, low=low, high=high, n=len(each), method=method, at_half=half_mean)
    return scores


def kth_distances(x: Features, ks: Sequence[int]) -> list[Float64[np.ndarray, " n"]]:
    """For each k the squared distance of every row to its k-th nearest other row."""
    parts = [np.partition(distances, ks, axis=1)[:, list(ks)] for distances in _distances(x, x)]  # itself comes first
    return list(np.concatenate(parts).T)


def nearest_rows(x: Features, y: Float[np.ndarray, "m d"], k: int) -> Int[np.ndarray, "n k"]:
    """The rows of y that are nearest to each of x, nearest first."""
    a, b = _wide(x, y, least=1)
    return np.concatenate([np.argsort(each, axis=1, kind="stable")[:, :k] for each in _distances(a, b)])


def _distances(x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "m d"]) -> Iterator[Float64[np.ndarray, "chunk m"]]:
    """Squared distances of the rows of x from those of y, in chunks of rows; what is 0 but for rounding is 0."""
    squares = (y**2).sum(axis=1)
    for start in range(0, len(x), CHUNK):
        rows = x[start : start + CHUNK]
        sizes = (rows**2).sum(axis=1)[:, None] + squares
        distances = sizes - 2 * rows @ y.T
        yield np.where(distances > ROUNDING * sizes, distances, 0.0)


# One set


def inception_score(logits: Float[np.ndarray, "n c"]) -> float:
    """The exponential of the mean KL divergence of p(class | picture) from its mean (Salimans et al. 2016, section 4).

    Between 1 and the number of classes. One split, unlike the paper's ten, whose means depend on N more (Barratt and
    Sharma 2018).
    """
    wide = logits.astype(np.float64)
    _check_finite(wide)
    log_p = wide - wide.max(axis=1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(axis=1, keepdims=True))
    p = np.exp(log_p)
    log_mean = np.log(np.maximum(p.mean(axis=0), np.finfo(np.float64).tiny))
    return float(np.exp((p * (log_p - log_mean)).sum(axis=1).mean()))


# Pictures and texts


def clip_scores(pictures: Features, texts: Features) -> Float64[np.ndarray, " n"]:
    """100 times the cosine of each picture with its text (as torchmetrics; 40 times Hessel et al.'s w = 2.5)."""
    return CLIP_SCALE * (_unit(pictures) * _unit(texts)).sum(axis=1)


def r_precision_hits(
    pictures: Features,
    texts: Float[np.ndarray, "t d"],
    own: Int[np.ndarray, " n"],
    *,
    candidates: int = CANDIDATES,
    seed: int = 0,
) -> Bool[np.ndarray, " n"]:
    """Whether each picture is nearer to its own text than to `candidates` - 1 others by lot (Xu et al. 2018).

    `texts` are all different captions, and `own` says which is each picture's. A tie is no hit. ConfigError when there
    are not as many texts.
    """
    if not 2 <= candidates <= len(texts):
        raise too_few_captions(candidates, len(texts))
    x, y = _unit(pictures), _unit(texts)
    hits = np.zeros(len(x), bool)
    for place, mine in enumerate(own.tolist()):
        others = np.random.default_rng([seed, place]).permutation(len(y) - 1)[: candidates - 1]
        others += others >= mine  # all but its own
        hits[place] = x[place] @ y[mine] > (y[others] @ x[place]).max()
    return hits


def too_few_captions(candidates: int, different: int) -> ConfigError:
    """What is wrong with so many candidates when there are so many different captions."""
    if candidates < 2:
        return ConfigError(f"R-precision is among 2 captions or more, got --candidates {candidates}")
    return ConfigError(
        f"R-precision among {candidates} captions needs as many different ones, and there are {different}: give "
        "--candidates no more than that, or leave it out"
    )


def _unit(x: Features) -> Float64[np.ndarray, "n d"]:
    wide = x.astype(np.float64)
    _check_finite(wide)
    return wide / np.linalg.norm(wide, axis=1, keepdims=True)


# A classifier's answers


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectAccuracy:
    """Semantic object accuracy: the mean over pictures, and the mean over classes of the means in each."""

    by_picture: Score
    by_class: Score


def object_accuracy(
    asked: Int[np.ndarray, " n"], answers: Int[np.ndarray, "n top"], *, seed: int = 0
) -> ObjectAccuracy:
    """SOA-I and SOA-C of Hinz et al. 2022, a classifier's best `top` answers in the place of a detector.

    `asked` is the class that each picture should show. The interval of the second is over classes.
    """
    hits = (answers == asked[:, None]).any(axis=1)
    classes = np.unique(asked)
    by_class = np.array([hits[asked == each].mean() for each in classes])
    return ObjectAccuracy(by_picture=mean_score(hits, seed=seed), by_class=mean_score(by_class, seed=seed))


# Retrieval


def recalls(
    found: Sequence[Sequence[Hashable]], relevant: Sequence[Collection[Hashable]], k: int
) -> Float64[np.ndarray, " q"]:
    """The share of each query's relevant items that are among its first k (Manning et al. 2008, section 8.4)."""
    return np.array([_found(ids, wanted, k) / len(set(wanted)) for ids, wanted in _queries(found, relevant)])


def hits(
    found: Sequence[Sequence[Hashable]], relevant: Sequence[Collection[Hashable]], k: int
) -> Bool[np.ndarray, " q"]:
    """Whether any relevant item is among each query's first k: the R@k of image-text retrieval."""
    return np.array([_found(ids, wanted, k) > 0 for ids, wanted in _queries(found, relevant)], bool)


def reciprocal_ranks(
    found: Sequence[Sequence[Hashable]], relevant: Sequence[Collection[Hashable]]
) -> Float64[np.ndarray, " q"]:
    """1 over the place of each query's first relevant item, 0 where none was found (Voorhees 1999)."""

    def reciprocal(ids: Sequence[Hashable], wanted: Collection[Hashable]) -> float:
        return next((1 / rank for rank, each in enumerate(ids, start=1) if each in wanted), 0.0)

    return np.array([reciprocal(ids, set(wanted)) for ids, wanted in _queries(found, relevant)])


def _found(ids: Sequence[Hashable], wanted: Collection[Hashable], k: int) -> int:
    return len(set(ids[:k]) & set(wanted))


def _queries(found: Sequence[Any], relevant: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
    if len(found) != len(relevant) or not all(relevant):
        raise ConfigError("every query has a list of what was found, and at least one item that is relevant")
    return zip(found, relevant, strict=True)


# Checks


def _wide(a: Features, b: Float[np.ndarray, "m d"], *, least: int) -> tuple[np.ndarray, np.ndarray]:
    """Both in 64 bits: sums over thousands of features cancel."""
    if min(len(a), len(b)) < least:
        raise ConfigError(
            f"a distance of two sets needs at least {least} pictures in each, and there are {len(a)} and {len(b)}"
        )
    x, y = a.astype(np.float64), b.astype(np.float64)
    _check_finite(x)
    _check_finite(y)
    return x, y


def _check_finite(x: Num[np.ndarray, "n d"]) -> None:
    bad = np.flatnonzero(~np.isfinite(x).all(axis=1))
    if len(bad):
        raise ModelError(
            f"{len(bad)} of {len(x)} rows of features are not finite, the first is number {bad[0] + 1}: leave those "
            "pictures out, or use another extractor"
        )
