import numpy as np
import pytest
import torch

from dynad.conformal import ConformalError, Guarantee, images_needed, in_words, p_values, rank_for


@pytest.mark.parametrize('n', [3, 6, 19, 20, 41, 150])
@pytest.mark.parametrize('rate', [.01, .05, .2])
@pytest.mark.parametrize('draw', ['normal', 'lognormal', 'standard_cauchy'])
def test_false_alarms_stay_within_the_promise(n, rate, draw):
    rng, sets = np.random.default_rng(n), 4000
    scores = np.sort(getattr(rng, draw)(size=(sets, n)))
    g = Guarantee.of(n, rate)
    alarms = (getattr(rng, draw)(size=(sets, 50)) > scores[:, [g.k - 1]]).mean(1)
    assert alarms.mean() <= g.rate + 3*alarms.std()/sets**.5
    assert alarms.mean() >= g.rate - 3*alarms.std()/sets**.5 - .002  # and it gives nothing away
    if not g.missing: assert g.rate <= rate


def test_the_confidence_is_the_share_of_sets_that_keep_the_rate():
    rng, n, rate = np.random.default_rng(0), 60, .05
    g = Guarantee.of(n, rate)
    true_rate = 1 - np.sort(rng.random((20_000, n)))[:, g.k - 1]  # of uniform scores it is known exactly
    assert abs((true_rate <= rate).mean() - g.confidence) < .015


def test_p_values_of_normal_images_are_valid_and_agree_with_the_threshold():
    rng, n, rate = np.random.default_rng(1), 39, .1
    normal = torch.from_numpy(rng.random((3000, n)))
    new = torch.from_numpy(rng.random((3000, 1)))
    p = torch.stack([p_values(s, m) for s, m in zip(new, normal)])
    for a in (.05, .1, .5): assert (p <= a).double().mean() <= a + .02
    above = new > normal.sort(1).values[:, rank_for(n, rate) - 1, None]
    assert torch.equal(p <= rate + 1e-12, above)


def test_ties_are_no_alarm():
    assert p_values(torch.tensor([1.]), [1.]*9) == 1.
    assert p_values(torch.tensor([1.5]), [1.]*9) == .1


def test_order_does_not_matter():
    s = torch.rand(7)
    assert torch.equal(p_values(s, [3., .2, .5]), p_values(s, [.2, .5, 3.]))


def test_images_needed():
    assert images_needed(.05) == 19 and rank_for(19, .05) == 19 and Guarantee.of(19, .05).rate == .05
    assert images_needed(.05, .95) == 59  # with the largest score as the threshold
    assert Guarantee(59, 59, .05).confidence >= .95 - 1e-9 > Guarantee(58, 58, .05).confidence
    assert images_needed(1/3) == 2


def test_words():
    few, many = in_words(Guarantee.of(6, .05)), in_words(Guarantee.of(190, .05))
    assert '1 normal image in 7' in few and '13 more' in few
    assert '1 normal image in 2' in many and 'confidence' in many and 'more' not in many


@pytest.mark.parametrize('rate', [0., 1., -.1])
def test_rates_that_are_none(rate):
    with pytest.raises(ConformalError, match='false alarms'): rank_for(10, rate)


def test_nothing_held_out():
    with pytest.raises(ConformalError): p_values(torch.zeros(1), [])
    with pytest.raises(ConformalError): rank_for(0, .05)
