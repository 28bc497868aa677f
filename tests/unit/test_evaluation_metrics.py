"""The measures on closed forms, and beside torchmetrics and torch-fidelity on the same features."""

import math
import warnings

import numpy as np
import pytest
import scipy.linalg
import torch

from index.errors import ConfigError, ModelError
from radt.evaluation import metrics
from radt.evaluation.intervals import wilson
from radt.evaluation.metrics import (
    clip_scores,
    frechet_distance,
    frechet_score,
    gaussian_mmd,
    gaussian_mmd_score,
    hits,
    inception_score,
    kernel_distance,
    mean_score,
    neighborhood_scores,
    neighborhoods,
    object_accuracy,
    polynomial_mmd,
    r_precision_hits,
    recalls,
    reciprocal_ranks,
    subset_score,
)


def normal(n, d, *, seed=0, mean=0.0, scale=1.0):
    return (mean + scale * np.random.default_rng(seed).normal(size=(n, d))).astype(np.float32)


def exactly(mean, covariance, n, *, seed=0):
    """Rows whose sample mean and covariance are these, to the last bits."""
    mean, covariance = np.asarray(mean, np.float64), np.asarray(covariance, np.float64)
    x = np.random.default_rng(seed).normal(size=(n, len(mean)))
    q = np.linalg.qr(x - x.mean(axis=0))[0] * math.sqrt(n - 1)  # orthonormal columns that add up to 0
    return mean + q @ np.linalg.cholesky(covariance).T


def random_covariance(d, *, seed):
    root = np.random.default_rng(seed).normal(size=(d, d))
    return root @ root.T / d + 0.1 * np.eye(d)


# Frechet distance


def test_the_frechet_distance_of_gaussians_with_known_moments():
    a, b = [0.5, -1.0, 2.0], [0.0, 1.0, 2.0]
    spread_a, spread_b = np.diag([1.0, 4.0, 9.0]), np.diag([4.0, 1.0, 0.25])
    # (0.5^2 + 2^2) + sum of (s - t)^2 over the standard deviations, since they share their axes
    expected = 4.25 + (1 - 2) ** 2 + (2 - 1) ** 2 + (3 - 0.5) ** 2
    assert frechet_distance(exactly(a, spread_a, 50), exactly(b, spread_b, 70, seed=1)) == pytest.approx(expected)


@pytest.mark.parametrize(("n", "m"), [(200, 150), (9, 200), (200, 9), (5, 6)])
def test_the_frechet_distance_equals_the_formula_with_a_matrix_root(n, m):
    x, y = normal(n, 8).astype(np.float64), normal(m, 8, seed=1, mean=0.3, scale=2.0).astype(np.float64)
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    with np.errstate(all="ignore"):
        root = scipy.linalg.sqrtm(a @ b + 1e-14 * np.eye(8))  # singular where there are fewer rows than columns
    slow = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a + b - 2 * root.real)
    assert frechet_distance(x, y) == pytest.approx(slow, rel=1e-5)


def test_the_frechet_distance_is_a_distance_of_sets():
    x, y = normal(40, 6), normal(60, 6, seed=1)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(x, x[::-1].copy()) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(x, y) == pytest.approx(frechet_distance(y, x))
    assert frechet_distance(x, x + np.float32(2)) == pytest.approx(6 * 4, rel=1e-5)  # moved by 2 in 6 directions
    turn = np.linalg.qr(np.random.default_rng(2).normal(size=(6, 6)))[0].astype(np.float32)
    assert frechet_distance(x @ turn, y @ turn) == pytest.approx(frechet_distance(x, y), rel=1e-4)


@pytest.mark.parametrize(("n", "m", "d"), [(300, 200, 16), (30, 40, 64)])
def test_the_frechet_distance_beside_torchmetrics_and_torch_fidelity(n, m, d):
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torchmetrics.image.fid import _compute_fid

    x, y = normal(n, d), normal(m, d, seed=1, mean=0.2, scale=1.3)
    wide = [torch.from_numpy(each.astype(np.float64)) for each in (x, y)]
    theirs = fid_statistics_to_metric(*map(fid_features_to_statistics, wide), False)["frechet_inception_distance"]
    moments = [part for each in wide for part in (each.mean(0), torch.cov(each.T))]
    assert frechet_distance(x, y) == pytest.approx(theirs, rel=1e-4)
    assert frechet_distance(x, y) == pytest.approx(float(_compute_fid(*moments)), rel=1e-4)


def test_the_interval_of_a_frechet_distance_holds_the_spread_over_fresh_sets():
    fresh = [frechet_distance(normal(200, 4, seed=2 * i), normal(200, 4, seed=2 * i + 1, mean=1.0)) for i in range(60)]
    score = frechet_score(normal(200, 4, seed=999), normal(200, 4, seed=998, mean=1.0))
    assert score.low < 4 < score.high  # the distance of the two Gaussians
    assert (score.high - score.low) / 2 / metrics.Z95 == pytest.approx(np.std(fresh), rel=0.4)


def test_halves_show_that_few_pictures_make_a_frechet_distance_too_high():
    few = frechet_score(normal(40, 64), normal(40, 64, seed=1), subsets=5)  # of one and the same Gaussian
    many = frechet_score(normal(4000, 64), normal(4000, 64, seed=1), subsets=5)
    assert few.at_half > few.value > 20 * many.value
    assert many.at_half == pytest.approx(2 * many.value, rel=0.1)  # the bias is c / N
    assert few.low < few.value < few.high


# Kernel distances


def test_the_kernel_distance_by_hand():
    # d = 1, kernel (xy + 1)^3: 0.5 for k(0, 0) = 1 twice over 2, 8 and 27 for {1, 2}, and 1 for every mixed pair
    x, y = np.array([[0.0], [0.0]]), np.array([[1.0], [2.0]])
    assert polynomial_mmd(x, y) == pytest.approx(1 + 27 - 2 * 1)


def test_the_kernel_distance_equals_the_sum_over_pairs():
    x, y = normal(7, 3), normal(5, 3, seed=1)

    def k(p, q):
        return (float(p @ q) / 3 + 1) ** 3

    own_x = np.mean([k(p, q) for i, p in enumerate(x) for j, q in enumerate(x) if i != j])
    own_y = np.mean([k(p, q) for i, p in enumerate(y) for j, q in enumerate(y) if i != j])
    mixed = np.mean([k(p, q) for p in x for q in y])
    assert polynomial_mmd(x, y) == pytest.approx(own_x + own_y - 2 * mixed, rel=1e-5)


def test_the_kernel_distance_beside_torchmetrics_and_torch_fidelity():
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torchmetrics.image.kid import poly_mmd

    x, y = normal(60, 10), normal(60, 10, seed=1, mean=0.5)
    whole = kernel_distance(x, y, subset_size=60)
    wide = [torch.from_numpy(each.astype(np.float64)) for each in (x, y)]
    assert whole.value == pytest.approx(float(poly_mmd(*wide)), rel=1e-6)
    theirs = kid_features_to_metric(*wide, kid_subset_size=60, kid_subsets=1, verbose=False)
    assert whole.value == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-6)
    theirs = kid_features_to_metric(*wide, kid_subset_size=30, kid_subsets=100, verbose=False)
    ours = kernel_distance(x, y, subset_size=30)  # by other lots
    assert ours.value == pytest.approx(
        theirs["kernel_inception_distance_mean"], abs=4 * theirs["kernel_inception_distance_std"] / 10
    )


def test_the_kernel_distance_is_unbiased_so_that_it_is_around_0_for_sets_of_one_kind():
    values = [polynomial_mmd(normal(20, 4, seed=2 * i), normal(20, 4, seed=2 * i + 1)) for i in range(200)]
    assert abs(np.mean(values)) < 3 * np.std(values) / math.sqrt(200)
    assert min(values) < 0


def test_the_interval_of_a_kernel_distance_holds_the_spread_over_fresh_sets():
    fresh = [polynomial_mmd(normal(100, 4, seed=2 * i), normal(100, 4, seed=2 * i + 1, mean=1.0)) for i in range(60)]
    score = kernel_distance(normal(100, 4, seed=999), normal(100, 4, seed=998, mean=1.0))
    assert (score.high - score.low) / 2 / metrics.Z95 == pytest.approx(np.std(fresh), rel=0.5)
    assert score.low < np.mean(fresh) < score.high
    assert score.method == "jackknife over 100 subsets of 50, and the lot of these"


def test_the_interval_of_a_kernel_distance_holds_the_truth_where_subsets_are_few_and_small():
    """Signs, d = 1: (xy + 1)^3 = 4 (1 + xy), so that the squared discrepancy is 4 (E x - E y)^2."""
    truth, inside = 4 * (0.0 - 0.8) ** 2, []
    for seed in range(120):
        rng = np.random.default_rng(seed)
        x, y = (np.where(rng.random((1000, 1)) < share, 1.0, -1.0) for share in (0.5, 0.9))
        score = kernel_distance(x, y, subset_size=5, subsets=20, seed=seed)
        inside.append(score.low <= truth <= score.high)
    assert np.mean(inside) >= 0.87  # by the jackknife alone under a half


def test_fewer_pictures_than_a_subset_has_is_one_sentence():
    with pytest.raises(ConfigError, match=r"subsets of 100 needs .* the smaller has 12: give --subset-size 12 or less"):
        kernel_distance(normal(12, 3), normal(50, 3), subset_size=100)


def test_the_gaussian_mmd_of_points():
    # one point in each set, at distance r: k(x, x) + k(y, y) - 2 exp(-r^2 / (2 sigma^2))
    x, y = np.zeros((1, 2)), np.array([[3.0, 4.0]])
    assert gaussian_mmd(x, y, sigma=5, scale=1) == pytest.approx(2 - 2 * math.exp(-0.5))
    assert gaussian_mmd(x, y) == pytest.approx(1000 * (2 - 2 * math.exp(-25 / 200)))
    far = np.array([[1e6, 0.0]])
    assert gaussian_mmd(x, far) == pytest.approx(2000)  # nothing in common: the largest there is
    assert gaussian_mmd(normal(30, 5), normal(30, 5)) == 0


def test_the_gaussian_mmd_of_gaussians():
    """E k over N(0, 1) and N(m, 1), sigma^2 = s: sqrt(s / (s + 2)) and that times exp(-m^2 / (2 (s + 2)))."""
    x, y = normal(3000, 1), normal(3000, 1, seed=1, mean=2.0)
    expected = 2 * math.sqrt(4 / 6) * (1 - math.exp(-4 / 12))
    assert gaussian_mmd(x, y, sigma=2, scale=1) == pytest.approx(expected, rel=0.06)


def test_the_gaussian_mmd_beside_that_of_torch_fidelity():
    from torch_fidelity.metric_kid import kernel_rbf

    x, y = normal(20, 6), normal(30, 6, seed=1, mean=1.0)
    parts = [kernel_rbf(p, q, kid_kernel_rbf_sigma=10.0).mean() for p, q in ((x, x), (y, y), (x, y))]
    assert gaussian_mmd(x, y) == pytest.approx(1000 * (parts[0] + parts[1] - 2 * parts[2]), rel=1e-3)


def test_the_interval_of_a_gaussian_mmd_holds_the_spread_over_fresh_sets():
    fresh = [gaussian_mmd(normal(80, 3, seed=2 * i), normal(80, 3, seed=2 * i + 1, mean=1.0)) for i in range(60)]
    score = gaussian_mmd_score(normal(80, 3, seed=999), normal(80, 3, seed=998, mean=1.0))
    assert (score.high - score.low) / 2 / metrics.Z95 == pytest.approx(np.std(fresh), rel=0.5)


def test_at_half_is_of_halves_or_of_nothing(monkeypatch):
    x, y = normal(40, 3), normal(40, 3, seed=1)
    of_halves = gaussian_mmd_score(x, y, subsets=400)
    # k(x, x) = 1 is 1 / n of the biased estimator: over all halves its mean is higher by (1 - E k) / n of each set
    different = [1 - np.exp(-((z[:, None] - z) ** 2).sum(-1) / 200).sum() / (40 * 39) + 1 / 39 for z in (x, y)]
    assert of_halves.at_half - of_halves.value == pytest.approx(1000 * sum(different) / 40, rel=0.05)
    monkeypatch.setattr(metrics, "SUBSET_SIZE", 10)
    smaller = gaussian_mmd_score(x, y, subsets=50)
    assert (smaller.value, smaller.at_half) == (of_halves.value, None)
    assert "subsets of 10 and 10" in smaller.method


# Precision, recall, density, coverage


def line(*places):
    return np.array(places, np.float64)[:, None]


def test_precision_and_the_others_for_points_on_a_line():
    reals, pictures = line(0, 1, 2, 10), line(0.5, 3.5, 30)
    found = neighborhoods(pictures, reals, k=1, k_density=2)
    # to the first neighbour: reals reach 1, 1, 1 and 8, pictures 3, 3 and 26.5
    assert found.precision.tolist() == [True, True, False]  # 3.5 lies in the wide ball around 10
    assert found.recall.tolist() == [True, True, True, True]  # 10 lies in the ball around 30
    # to the second neighbour: reals reach 2, 1, 2 and 9
    assert found.density.tolist() == [3 / 2, 2 / 2, 0]
    assert found.coverage.tolist() == [True, True, True, True]


def test_a_set_and_itself_and_two_sets_far_apart():
    x = normal(50, 4)
    same, apart = neighborhoods(x, x.copy()), neighborhoods(x, x + np.float32(1000))
    for name in ("precision", "recall", "coverage"):
        assert getattr(same, name).all()
        assert not getattr(apart, name).any()
    # each ball to the k-th neighbour holds k others and its own centre
    assert same.density.mean() == pytest.approx(6 / 5)
    assert apart.density.sum() == 0
    twice = np.concatenate([x, x])
    assert neighborhoods(twice, twice).precision.all()


def test_copies_of_one_real_are_precise_and_dense_and_cover_nothing():
    reals = normal(200, 2)
    found = neighborhoods(np.repeat(reals[:1], 50, axis=0), reals)
    assert found.precision.all()
    assert found.recall.mean() <= 0.01
    assert found.coverage.mean() < 0.1


def test_density_and_coverage_of_one_kind_of_set_are_as_the_paper_derives_them():
    """Naeem et al. 2020, section 3.3: E density = 1, and E coverage -> 1 - 2^-k for as many of both."""
    found = neighborhoods(normal(1500, 3), normal(1500, 3, seed=1), k_density=5)
    assert found.density.mean() == pytest.approx(1, abs=0.08)
    assert found.coverage.mean() == pytest.approx(1 - 2**-5, abs=0.03)


def test_precision_and_recall_beside_torch_fidelity(monkeypatch):
    from torch_fidelity.metric_prc import prc_features_to_metric

    x, y = normal(120, 5, scale=0.8), normal(90, 5, seed=1, mean=0.4)
    theirs = prc_features_to_metric(
        torch.from_numpy(x), torch.from_numpy(y), prc_neighborhood=3, prc_batch_size=100, verbose=False
    )
    found = neighborhoods(x, y, k=3)
    assert 0.1 < found.precision.mean() < 1
    assert found.precision.mean() == pytest.approx(theirs["precision"])
    assert found.recall.mean() == pytest.approx(theirs["recall"])
    monkeypatch.setattr(metrics, "CHUNK", 7)
    small = neighborhoods(x, y, k=3)
    for name in ("precision", "recall", "density", "coverage"):
        np.testing.assert_array_equal(getattr(small, name), getattr(found, name))


def test_density_and_coverage_equal_their_definitions():
    """Naeem et al. 2020, equations 3 and 4, pair by pair; the others as Kynkaanniemi et al. 2019, equation 2."""
    pictures, reals = normal(25, 3), normal(30, 3, seed=1, mean=0.3)

    def distance(a, b):
        return float(np.linalg.norm(a.astype(np.float64) - b))

    def radius(points, i, k):
        return sorted(distance(points[i], points[j]) for j in range(len(points)) if j != i)[k - 1]

    found = neighborhoods(pictures, reals, k=2, k_density=4)
    wide = [radius(reals, i, 4) for i in range(30)]
    narrow, own = [radius(reals, i, 2) for i in range(30)], [radius(pictures, i, 2) for i in range(25)]
    inside = np.array([[distance(x, y) <= r for y, r in zip(reals, wide, strict=True)] for x in pictures])
    np.testing.assert_allclose(found.density, inside.sum(axis=1) / 4)
    np.testing.assert_array_equal(found.coverage, inside.any(axis=0))
    precise = [any(distance(x, y) <= r for y, r in zip(reals, narrow, strict=True)) for x in pictures]
    recalled = [any(distance(x, y) <= r for x, r in zip(pictures, own, strict=True)) for y in reals]
    np.testing.assert_array_equal(found.precision, precise)
    np.testing.assert_array_equal(found.recall, recalled)
    nearest = metrics.nearest_rows(pictures, reals, 3)
    brute = [sorted(range(30), key=lambda j, x=x: distance(x, reals[j]))[:3] for x in pictures]
    np.testing.assert_array_equal(nearest, brute)


def test_too_few_pictures_for_balls():
    with pytest.raises(ConfigError, match="5th neighbour need more than 5 pictures in each set, and there are 5 and 9"):
        neighborhoods(normal(5, 2), normal(9, 2))


@pytest.mark.parametrize(("n", "m"), [(100, 100), (40, 200)])
def test_the_intervals_of_all_four_hold_the_mean_over_fresh_pictures_and_reals(n, m):
    def both(i):
        return normal(n, 6, seed=2 * i) + 0.7 * (np.arange(6) == 0), normal(m, 6, seed=2 * i + 1)

    fresh = [neighborhoods(*both(i)) for i in range(1000, 1150)]
    drawn = [neighborhood_scores(*both(i), subsets=25, seed=i) for i in range(150)]
    for name in metrics.NEIGHBORHOODS:
        mean = np.mean([getattr(each, name).mean() for each in fresh])
        assert np.mean([each[name].low <= mean <= each[name].high for each in drawn]) >= 0.88, name
        assert np.mean([each[name].high - each[name].low for each in drawn]) < 0.6, name  # by being narrow enough


def test_the_four_scores_are_the_means_and_shares_of_1_have_width():
    x, y = normal(40, 3), normal(60, 3, seed=1)
    found, values = neighborhood_scores(x, y, subsets=5), neighborhoods(x, y)
    for name in metrics.NEIGHBORHOODS:
        assert found[name].value == getattr(values, name).mean()
        assert found[name].low <= found[name].value <= found[name].high
    of_which = {name: score.n for name, score in found.items()}
    assert of_which == {"precision": 40, "density": 40, "recall": 60, "coverage": 60}
    same = neighborhood_scores(x, x, subsets=5)
    assert (same["recall"].value, same["recall"].high) == (1.0, 1.0)
    assert same["recall"].low <= wilson(1.0, 40)[0] < 1
    few = neighborhood_scores(x[:11], y)
    assert {(each.low, each.high) for each in few.values()} == {(None, None)}
    assert "fewer than 12 pictures" in few["density"].method
    assert (few["density"].n, few["recall"].n) == (11, 60)


# Inception score


def test_the_inception_score_of_sure_unsure_and_equal_answers():
    sure = 1e3 * np.eye(4)
    assert inception_score(sure) == pytest.approx(4)  # sure of each, and of as many of every class
    assert inception_score(np.zeros((4, 4))) == pytest.approx(1)  # never sure
    assert inception_score(np.repeat(sure[:1], 9, axis=0)) == pytest.approx(1)  # always the same


def test_the_inception_score_beside_torch_fidelity_and_torchmetrics():
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torchmetrics.image.inception import InceptionScore

    logits = normal(50, 12, scale=2.0)
    theirs = isc_features_to_metric(torch.from_numpy(logits), splits=1, shuffle=False)["inception_score_mean"]
    assert inception_score(logits) == pytest.approx(theirs, rel=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it speaks of memory, and asks one split for its spread
        other = InceptionScore(feature=torch.nn.Identity(), splits=1)
        other.update(torch.from_numpy(logits))
        mean, _ = other.compute()
    assert inception_score(logits) == pytest.approx(float(mean), rel=1e-5)


# Pictures and texts


def test_clip_scores_are_cosines():
    pictures, texts = np.array([[3.0, 0.0], [1.0, 1.0], [0.0, 2.0]]), np.array([[1.0, 0.0], [1.0, 0.0], [0.0, -5.0]])
    np.testing.assert_allclose(clip_scores(pictures, texts), [100, 50 * math.sqrt(2), -100])


def test_r_precision_of_perfect_blind_and_wrong_pictures():
    texts = np.eye(20)
    own = np.arange(20)
    assert r_precision_hits(texts, texts, own, candidates=20).all()
    assert not r_precision_hits(np.roll(texts, 1, axis=0), texts, own, candidates=20).any()
    assert not r_precision_hits(np.ones((20, 20)), texts, own, candidates=2).any()  # all alike: a tie is no hit


def test_r_precision_of_chance_is_one_in_as_many_as_there_are_candidates():
    pictures, texts = normal(2000, 16), normal(100, 16, seed=1)
    own = np.arange(2000) % 100
    for candidates in (2, 10, 100):
        share = r_precision_hits(pictures, texts, own, candidates=candidates).mean()
        assert share == pytest.approx(1 / candidates, abs=4 * math.sqrt(0.25 / 2000))


def test_r_precision_does_not_depend_on_the_order_of_the_texts_when_all_are_asked():
    pictures, texts = normal(30, 8), normal(30, 8, seed=1)
    order = np.random.default_rng(0).permutation(30)
    place = np.argsort(order)
    one = r_precision_hits(pictures, texts, np.arange(30), candidates=30)
    np.testing.assert_array_equal(one, r_precision_hits(pictures, texts[order], place, candidates=30))
    # brute force
    cosines = (pictures / np.linalg.norm(pictures, axis=1)[:, None]) @ (
        texts / np.linalg.norm(texts, axis=1)[:, None]
    ).T
    np.testing.assert_array_equal(one, cosines.argmax(axis=1) == np.arange(30))
    fewer = r_precision_hits(pictures, texts, np.arange(30), candidates=5)
    assert (fewer >= one).all()  # whoever beats all beats some
    with pytest.raises(ConfigError, match="among 100 captions needs as many different ones, and there are 30"):
        r_precision_hits(pictures, texts, np.arange(30))


# Classifiers


def test_object_accuracy_over_pictures_and_over_classes():
    asked = np.array([7, 7, 7, 2])
    answers = np.array([[7, 1], [1, 7], [3, 1], [2, 5]])
    found = object_accuracy(asked, answers)
    assert found.by_picture.value == 3 / 4
    assert found.by_class.value == pytest.approx((2 / 3 + 1) / 2)
    assert (found.by_picture.n, found.by_class.n) == (4, 2)
    assert object_accuracy(asked, answers[:, :1]).by_picture.value == 2 / 4
    relabelled = object_accuracy(asked + 10, answers + 10)
    assert relabelled.by_class.value == found.by_class.value


# Retrieval


def test_recall_hits_and_reciprocal_ranks_by_hand():
    found = [[5, 1, 9], [4, 3], []]
    relevant = [{1, 9}, [3], [8]]
    assert recalls(found, relevant, 2).tolist() == [0.5, 1, 0]
    assert recalls(found, relevant, 1).tolist() == [0, 0, 0]
    assert hits(found, relevant, 2).tolist() == [True, True, False]
    assert reciprocal_ranks(found, relevant).tolist() == [0.5, 0.5, 0]
    with pytest.raises(ConfigError, match="at least one item that is relevant"):
        recalls(found, [{1}, [], [8]], 2)


def test_recall_grows_with_k_and_ends_at_1_when_all_is_found():
    rng = np.random.default_rng(0)
    found = [rng.permutation(30).tolist() for _ in range(20)]
    relevant = [set(rng.permutation(30)[:4].tolist()) for _ in range(20)]
    steps = np.array([recalls(found, relevant, k) for k in range(1, 31)])
    assert (np.diff(steps, axis=0) >= 0).all()
    assert (steps[-1] == 1).all()


# Intervals


def test_a_share_has_an_interval_at_0_and_1_and_others_one_around_their_mean():
    none, all_of_them = mean_score(np.zeros(20, bool)), mean_score(np.ones(20, bool))
    assert (none.value, none.low, all_of_them.high) == (0, 0, 1)
    assert none.high > 0.1 > 1 - all_of_them.low - 0.1
    values = normal(400, 1)[:, 0] + 5
    score = mean_score(values)
    assert (score.high - score.low) / 2 == pytest.approx(metrics.Z95 * values.std() / 20, rel=0.15)
    assert score.low < score.value < score.high
    assert mean_score(values, seed=3) == mean_score(values, seed=3) != score
    assert mean_score(np.array([2.5])).low is None


@pytest.mark.parametrize("c", [0.25, 3.0, -5.0])
@pytest.mark.parametrize("share", [0.1, 0.7, 1.0])
def test_the_interval_of_values_that_are_0_or_c_is_c_times_that_of_the_share(c, share):
    flags = np.arange(20) < 20 * share
    whole, scaled = mean_score(flags), mean_score(c * flags)
    assert scaled.value == pytest.approx(c * whole.value)
    assert [scaled.low, scaled.high] == pytest.approx(sorted([c * whole.low, c * whole.high]))
    assert scaled.low <= scaled.value <= scaled.high
    assert scaled.high - scaled.low > 0.1 * abs(c)
    assert scaled.method == f"Wilson times {c:.4g}, " + (
        "as if each could be 0 too" if share == 1 else f"each is 0 or {c:.4g}"
    )


def test_first_hits_of_queries_with_four_relevant_pairs_have_width():
    values = recalls([[1, 9]] * 30, [{1, 2, 3, 4}] * 30, 1)
    score = mean_score(values)
    assert (score.value, score.high) == (0.25, 0.25)
    assert score.low == pytest.approx(wilson(1.0, 30)[0] / 4)
    assert mean_score(np.full(7, 0.1)).high >= mean_score(np.full(7, 0.1)).value  # whatever is rounded


def test_the_bootstrap_holds_the_true_mean_nineteen_times_of_twenty():
    inside = [
        score.low <= 1 <= score.high
        for score in (mean_score(np.random.default_rng(i).exponential(size=80), seed=i) for i in range(150))
    ]
    assert 0.88 <= np.mean(inside) <= 0.99


def test_the_jackknife_of_a_mean_is_its_standard_error():
    x = normal(200, 1)
    score = subset_score(lambda each: float(each.mean()), (x,), subsets=2000, floor=None)
    assert (score.high - score.value) / metrics.Z95 == pytest.approx(x.std(ddof=1) / math.sqrt(200), rel=0.06)
    assert subset_score(lambda each: float(each.mean()), (x[:3],)).low is None


# What cannot be measured


@pytest.mark.parametrize("measure", [frechet_distance, polynomial_mmd, gaussian_mmd, neighborhoods])
def test_features_that_are_not_finite_are_refused(measure):
    broken = normal(10, 3)
    broken[4, 1] = np.nan
    for pair in ((broken, normal(10, 3)), (normal(10, 3), broken)):
        with pytest.raises(ModelError, match="1 of 10 rows of features are not finite, the first is number 5"):
            measure(*pair)


def test_logits_and_vectors_that_are_not_finite_are_refused():
    broken = normal(5, 3)
    broken[0] = np.inf
    with pytest.raises(ModelError, match="not finite"):
        inception_score(broken)
    with pytest.raises(ModelError, match="not finite"):
        clip_scores(broken, normal(5, 3))
    with pytest.raises(ModelError, match="not finite"):
        mean_score(np.array([1.0, np.nan]))


@pytest.mark.parametrize("measure", [frechet_distance, polynomial_mmd])
def test_one_picture_has_no_spread(measure):
    with pytest.raises(ConfigError, match="at least 2 pictures in each, and there are 1 and 9"):
        measure(normal(1, 3), normal(9, 3))


def test_nothing_has_no_mean():
    with pytest.raises(ConfigError, match="nothing to take the mean of"):
        mean_score(np.array([]))
