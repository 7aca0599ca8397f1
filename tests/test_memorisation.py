"""Copies of training patients show, chance does not; distances and p-values against SciPy's."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from scipy.spatial.distance import cdist, cosine

from cardiac_ldm.cohort import Volumes
from cardiac_ldm.errors import ParameterError, PrivacyError
from cardiac_ldm.evaluation import memorisation as module
from cardiac_ldm.evaluation.features import slice_features
from cardiac_ldm.evaluation.memorisation import Embedded, embed, embed_real, memorisation, patient_distances

RNG = np.random.default_rng
HALVES: Any = SimpleNamespace(encode=lambda volumes: volumes[:, None, :, ::2, ::2] - 0.5, parameters=lambda: iter(()))
"""An autoencoder whose latents are every second voxel."""


def cohort(points, groups=None):
    """One volume a patient."""
    return Embedded({"latent": points}, np.arange(len(points)), groups)


def fresh(rng, n_patients, width=20):
    return rng.normal(size=(n_patients, width))


def copied(rng, points, noise=0.2):
    return points + noise * rng.normal(size=points.shape)


def found(synthetic, train, held_out, permutations=199, resamples=100, suspicious=5, seed=0):
    options = {"permutations": permutations, "resamples": resamples, "suspicious": suspicious, "seed": seed}
    return memorisation(synthetic, train, held_out, **options)


def everybody(table, statistic):
    return table[table.grouping.isna() & (table.statistic == statistic)].iloc[0]


def of_group(table, group):
    return table[(table.grouping == "sex") & (table.group == group)].set_index("statistic")


def test_distances_are_the_smallest_of_scipys_over_the_pairs_of_volumes():
    rng = RNG(0)
    first, second = fresh(rng, 9).astype(np.float32), fresh(rng, 1100)
    patient_index, others = np.repeat([0, 1, 2], 3), np.repeat(np.arange(550), 2)
    expected = cdist(first, second).reshape(3, 3, 550, 2).min(axis=(1, 3))
    np.testing.assert_allclose(patient_distances(first, patient_index, second, others), expected, rtol=1e-9)


def test_spaces_are_what_they_say(monkeypatch):
    monkeypatch.setattr(module, "_BATCH", 3)  # so that there are two
    images = RNG(0).random((4, 13, 96, 96), np.float32)
    patient_index = np.array([0, 0, 1, 1])
    stored: Any = {"patient_index": patient_index, "attributes": np.ones((4, 14)), "groups": ["HCM", None]}
    embedded = embed(Volumes("v", images, stored["attributes"], patient_index), HALVES)
    patients: Any = SimpleNamespace(secret=False, images=lambda volumes: images[volumes], **stored)
    again = embed_real(patients, HALVES)
    assert again.groups is not None
    assert again.groups.to_dict("list") == {"sex": ["male"] * 2, "age": ["under 50"] * 2, "disease": ["HCM", None]}
    for space, vectors in embedded.vectors.items():
        np.testing.assert_allclose(vectors, again.vectors[space], atol=1e-6)
    np.testing.assert_array_equal(embedded.vectors["latent"], images[:, :, ::2, ::2].reshape(4, -1) - 0.5)
    pooled = torch.nn.functional.avg_pool2d(torch.from_numpy(images), 4).flatten(1).numpy()
    squared = cdist(embedded.vectors["image"], embedded.vectors["image"]) ** 2
    np.testing.assert_allclose(squared, 2 * (1 - np.corrcoef(pooled)), atol=1e-5)
    mean = slice_features(images).reshape(4, 7, -1).mean(axis=1)
    squared = cdist(embedded.vectors["feature"], embedded.vectors["feature"]) ** 2
    assert squared[0, 3] == pytest.approx(2 * cosine(mean[0], mean[3]), rel=1e-3)
    assert squared[0, 3] > 0


def test_blank_volumes_have_a_place():
    blank = Volumes("v", np.zeros((1, 13, 96, 96), np.float32), np.ones((1, 14)), np.array([0]))
    embedded = embed(blank, HALVES)
    assert all(np.isfinite(vectors).all() for vectors in embedded.vectors.values())


def test_copies_of_a_few_training_patients_light_up_and_are_named():
    rng = RNG(0)
    train, held_out, synthetic = (fresh(rng, n) for n in (60, 60, 60))
    victims = np.array([7, 7, 3, 50, 21, 22, 23, 24])
    synthetic[10:18] = copied(rng, train[victims])
    table, pairs = found(cohort(synthetic), cohort(train), cohort(held_out), permutations=999, suspicious=8)
    ratio, share = everybody(table, "log ratio"), everybody(table, "nearer to training")
    assert ratio.p_value <= 0.005
    assert ratio.high < 0
    assert share.value > 0.5
    assert set(zip(pairs.request, pairs.patient, strict=True)) == set(zip(range(10, 18), victims, strict=True))
    assert pairs.ratio.max() < 0.6
    assert pairs.ratio.is_monotonic_increasing


def test_when_all_are_copies_both_statistics_say_so_and_copies_of_held_out_patients_do_not():
    rng = RNG(1)
    train, held_out = fresh(rng, 40), fresh(rng, 40)
    table, _ = found(cohort(copied(rng, train)), cohort(train), cohort(held_out))
    assert table.p_value.max() == 1 / 200
    assert everybody(table, "nearer to training").value == 1
    table, _ = found(cohort(copied(rng, held_out)), cohort(train), cohort(held_out))
    assert table.p_value.min() == 1


def test_without_copies_p_values_are_uniform_where_a_vote_a_request_would_be_misled():
    rng, p_values, naive = RNG(0), [], []
    for seed in range(200):
        train, held_out, synthetic = (cohort(fresh(rng, n, 100)) for n in (20, 20, 80))
        table, _ = found(synthetic, train, held_out, permutations=99, resamples=2, seed=seed)
        share, ratio = everybody(table, "nearer to training"), everybody(table, "log ratio")
        p_values.append([share.p_value, ratio.p_value])
        naive.append(stats.binomtest(round(80 * share.value), 80, alternative="greater").pvalue)
    shares, ratios = np.transpose(p_values)
    low, high = stats.binom(200, 0.05).ppf([0.001, 0.999])
    assert low <= (ratios <= 0.05).sum() <= high
    assert (shares <= 0.05).sum() <= high < (np.array(naive) <= 0.05).sum()
    jitter = RNG(1).uniform(0, 0.01, 200)  # p-values are multiples of 1 / 100
    assert stats.kstest(ratios - jitter, "uniform").pvalue > 0.001


def test_p_values_are_scipys():
    rng = RNG(3)
    train, held_out, synthetic = fresh(rng, 8, 3), fresh(rng, 8, 3), fresh(rng, 10, 3)
    synthetic[:3] = copied(rng, train[:3], 0.5)
    distances = cdist(synthetic, np.concatenate([train, held_out]))

    def mean_log_ratio(ours, others):
        ours, others = ours.astype(int), others.astype(int)
        return np.log(distances[:, ours].min(axis=1) / distances[:, others].min(axis=1)).mean()

    exact = stats.permutation_test(
        (np.arange(8), np.arange(8, 16)), mean_log_ratio, vectorized=False, n_resamples=20_000, alternative="less"
    )
    table, _ = found(cohort(synthetic), cohort(train), cohort(held_out), permutations=4000)
    ratio = everybody(table, "log ratio")
    assert ratio.value == pytest.approx(exact.statistic)
    assert 0.01 < exact.pvalue < 0.5
    assert ratio.p_value == pytest.approx(exact.pvalue, abs=0.03)
    assert ratio.chance == pytest.approx(exact.null_distribution.mean(), abs=0.02)


def test_as_many_are_compared_of_both_and_pairs_are_sought_among_all():
    rng = RNG(2)
    train, held_out, synthetic = fresh(rng, 300, 5), fresh(rng, 30, 5), fresh(rng, 300, 5)
    table, _ = found(cohort(synthetic), cohort(train), cohort(held_out))
    share = everybody(table, "nearer to training")
    assert share.chance == pytest.approx(0.5, abs=0.03)  # of all 330 patients it would be 0.91
    assert share.low < 0.5 < share.high
    assert share.n_patients <= 60
    swapped, _ = found(cohort(synthetic), cohort(held_out), cohort(train))
    assert everybody(swapped, "nearer to training").low < 0.5 < everybody(swapped, "nearer to training").high
    _, pairs = found(cohort(copied(rng, train, 0.01)), cohort(train), cohort(held_out), suspicious=300)
    assert (pairs.patient == pairs.request).all()
    assert len(pairs) == 300


def test_volumes_of_a_request_have_one_vote():
    rng = RNG(4)
    train, held_out, synthetic = (cohort(fresh(rng, 30)) for _ in range(3))
    twice = Embedded({"latent": np.repeat(synthetic.vectors["latent"], 2, axis=0)}, np.repeat(np.arange(30), 2))
    once, _ = found(synthetic, train, held_out)
    pd.testing.assert_frame_equal(found(twice, train, held_out)[0], once)
    assert once.n_requests.eq(30).all()


def test_intervals_count_requests_at_the_same_patient_together():
    rng = RNG(5)
    train, held_out = 10 * fresh(rng, 12), 10 * fresh(rng, 12)
    synthetic = np.repeat(np.concatenate([train[:6], held_out[:6]]), 20, axis=0)
    table, _ = found(cohort(copied(rng, synthetic)), cohort(train), cohort(held_out), resamples=999)
    share = everybody(table, "nearer to training")
    assert (share.n_requests, share.n_patients) == (240, 12)
    low, high = stats.binom(12, 0.5).ppf([0.025, 0.975]) / 12
    assert share.low == pytest.approx(low, abs=0.05)
    assert share.high == pytest.approx(high, abs=0.05)


def test_ties_are_nobodys_and_exact_copies_have_a_logarithm():
    points = fresh(RNG(6), 10)
    table, _ = found(cohort(points), cohort(points), cohort(points))
    assert everybody(table, "nearer to training").value == 0.5
    assert everybody(table, "log ratio").value == 0
    assert table.p_value.min() > 0.3
    table, _ = found(cohort(points), cohort(points), cohort(points + 1))
    assert np.isfinite(everybody(table, "log ratio").value)
    table, _ = found(cohort(0 * points), cohort(0 * points), cohort(0 * points))
    assert everybody(table, "log ratio").value == 0


def sexes(women, men=0, unknown=0):
    return pd.DataFrame({"sex": women * ["female"] + men * ["male"] + unknown * [None]})


def test_a_group_whose_patients_are_copied_is_told_from_one_whose_are_not():
    rng = RNG(7)
    train, held_out, synthetic = fresh(rng, 60), fresh(rng, 60), fresh(rng, 80)
    for points, n in ((train, 30), (held_out, 30), (synthetic, 40)):
        points[:n, 0] += 20  # women lie elsewhere
    synthetic[:30] = copied(rng, train[:30])
    table, _ = found(cohort(synthetic), cohort(train, sexes(30, 30)), cohort(held_out, sexes(30, 30)))
    women, men = of_group(table, "female"), of_group(table, "male")
    assert women.n_requests.tolist() == men.n_requests.tolist() == [40, 40]
    assert women.p_value.max() == 1 / 200
    assert men.p_value.min() > 0.05
    assert men.low["log ratio"] < 0 < men.high["log ratio"]


def test_patients_are_exchanged_within_their_group():
    rng = RNG(8)
    train, held_out, synthetic = fresh(rng, 40, 5), fresh(rng, 40, 5), fresh(rng, 60, 5)
    for points, n in ((train, 30), (held_out, 10), (synthetic, 60)):
        points[:n, 0] += 20
    table, _ = found(cohort(synthetic), cohort(train, sexes(30, 10)), cohort(held_out, sexes(10, 30)))
    women = of_group(table, "female").loc["nearer to training"]
    assert women.chance == pytest.approx(0.75, abs=0.03)
    assert women.p_value > 0.05
    men = of_group(table, "male").loc["nearer to training"]
    assert men[["n_requests", "n_patients"]].eq(0).all()
    assert men[["value", "low", "high", "chance", "p_value"]].isna().all()


def test_small_groups_have_no_interval_and_unknown_ones_no_row():
    rng = RNG(9)
    train, held_out, synthetic = (fresh(rng, 20) for _ in range(3))
    groups = sexes(1, 10, 9)
    table, _ = found(cohort(synthetic), cohort(train, groups), cohort(held_out, groups))
    sex = table[table.grouping == "sex"]
    assert set(sex.group) == {"female", "male"}
    assert sex.n_requests.sum() < 2 * 20
    small = table[table.n_patients < 8]
    assert small.low.isna().all()
    assert len(small)


def test_everything_follows_from_the_seed():
    rng = RNG(10)
    synthetic, train, held_out = (cohort(fresh(rng, n)) for n in (20, 30, 20))
    table, pairs = found(synthetic, train, held_out)
    again, same_pairs = found(synthetic, train, held_out)
    pd.testing.assert_frame_equal(again, table)
    pd.testing.assert_frame_equal(same_pairs, pairs)
    assert not found(synthetic, train, held_out, seed=1)[0].equals(table)


GOOD, BROKEN = fresh(RNG(0), 8), fresh(RNG(0), 8)
BROKEN[3, 1] = np.nan


@pytest.mark.parametrize(
    ("part", "changed", "message"),
    [
        ("train", cohort(GOOD[:7]), "train: 7 patients .* at least 8"),
        ("synthetic", cohort(GOOD[:0]), "synthetic: 0 patients"),
        ("held_out", cohort(GOOD[:, :19]), r"held_out.vectors\['latent'\]: shape \(8, 19\), expected \(8, 20\)"),
        ("train", Embedded({"latent": GOOD[:7]}, np.arange(8)), r"train.*shape \(7, 20\), expected \(8, 20\)"),
        ("synthetic", cohort(BROKEN), r"synthetic.*volumes \[3\] .*finite"),
        ("train", Embedded({"image": GOOD}, np.arange(8)), r"train.vectors: spaces \['image'\], expected \['latent'\]"),
        (
            "held_out",
            Embedded({"latent": GOOD}, 1 + np.arange(8)),
            "held_out.patient_index: 8 patients, numbered 1 to 8",
        ),
        ("held_out", cohort(GOOD, sexes(8)), "held_out.groups: 8 rows, expected .* 8 patients, in train and held_out"),
        ("train", cohort(GOOD, sexes(8)), "held_out.groups: none"),
        ("train", cohort(GOOD, sexes(7)), "train.groups: 7 rows, expected .* 8 patients"),
    ],
)
def test_what_does_not_fit_is_named(part, changed, message):
    parts = {"synthetic": cohort(GOOD), "train": cohort(GOOD), "held_out": cohort(GOOD)} | {part: changed}
    with pytest.raises(ParameterError, match=message):
        memorisation(**parts, permutations=1, resamples=2, suspicious=1, seed=0)


def test_groupings_must_be_the_same():
    ages = pd.DataFrame({"age": range(8)})
    with pytest.raises(ParameterError, match=r"held_out.groups: columns \['age'\], expected \['sex'\]"):
        found(cohort(GOOD), cohort(GOOD, sexes(8)), cohort(GOOD, ages))


def test_real_private_patients_are_refused():
    patients: Any = SimpleNamespace(name="ward", secret=True)
    with pytest.raises(PrivacyError, match="ward"):
        embed_real(patients, HALVES)
