import math

import numpy as np
import pytest

from dynad.drift import SHOWN, DriftError, DriftMonitor, Earlier, SimpleJumper, online_p_value


def stream(n, every, most, draw, seed, change=None, shift=0.):
    "Images until the first warning, at most `most`."
    rng = np.random.default_rng(seed)
    normal = getattr(rng, draw)(size=n)
    m = DriftMonitor(normal, float(np.sort(normal)[max(0, math.ceil((n + 1)*.95) - 2)]), every)
    for i in range(most):
        s = float(getattr(rng, draw)()) + (shift if change is not None and i >= change else 0.)
        if m.update(s, s > m.threshold, rng.random()): return i + 1
    return most

@pytest.mark.parametrize('draw', ['normal', 'standard_cauchy'])
@pytest.mark.parametrize('n', [5, 60])
def test_false_warnings_keep_their_distance(n, draw):
    "Cut off at ten times the promise, which only lowers the mean."
    t = [stream(n, 40, 400, draw, seed) for seed in range(120)]
    assert np.mean(t) + 2*np.std(t)/120**.5 >= 40
    assert min(t) < 400                                         # and a warning is possible

def test_ranks_among_a_growing_set_are_uniform():
    "The reason for them: ranks among a few held-out scores alone are not, for a given set of those."
    rng = np.random.default_rng(0)
    before, p = Earlier(rng.normal(size=8)), []
    for s in rng.normal(size=4000):
        p.append(online_p_value(s, before, rng.random()))
        before.add(s)
    assert abs(np.mean(p) - .5) < .02 and abs(np.std(p) - 12**-.5) < .01 and abs(np.corrcoef(p[1:], p[:-1])[0, 1]) < .05

@pytest.mark.parametrize('digits', [0, 1, 3])
def test_ranks_of_counted_scores_are_those_of_all_scores(digits):
    "Ties and all; and of scores with more digits than are counted they are uniform, as above."
    rng = np.random.default_rng(digits)
    scores, before = np.round(rng.normal(5, 2, size=300), digits), Earlier()
    for i, s in enumerate(scores):
        u = rng.random()
        want = ((scores[:i] > s).sum() + u*(1 + (scores[:i] == s).sum()))/(i + 1)
        assert online_p_value(s, before, u) == pytest.approx(want)
        before.add(s)
    assert before.n == 300 and before.counts.sum() == 300 and before.values == sorted(set(before.values))

def test_a_long_stream_takes_no_more_memory_than_a_short_one():
    "Months of images, and a line where every few of them bring a warning."
    rng = np.random.default_rng(3)
    quiet, loud = DriftMonitor(rng.lognormal(sigma=.05, size=60), 10., 1e6), DriftMonitor([1., 2.], 1.5, 20)
    for _ in range(20_000):
        quiet.update(float(rng.lognormal(sigma=.05)), False, rng.random())
        loud.update(9., True, .5)
    assert quiet.before.n == 20_060 and len(quiet.before.values) == len(quiet.before.counts) < 3000 and len(quiet.ranks) == 50
    assert len(quiet.history) == len(loud.history) == SHOWN and not quiet.warned
    assert loud.warned > 1000 and len(loud.warnings) == 20 and loud.warnings[-1].image <= loud.seen == 20_000

@pytest.mark.parametrize('shift,kind', [(3., 'higher'), (-3., 'lower')])
def test_drift_is_found_and_named(shift, kind):
    rng = np.random.default_rng(1)
    m = DriftMonitor(rng.normal(size=40), 100., 1000)
    said = [w for i in range(160) if (w := m.update(float(rng.normal()) + shift*(i >= 100), False, rng.random()))]
    assert said and said[0].image > 100 and said[0].kind == kind and kind in said[0].text

def test_all_anomalous_is_drift():
    m = DriftMonitor([1., 2.], 1.5, 1000)
    said = [w for _ in range(40) if (w := m.update(9., True, 0.))]
    assert said[0].kind == 'anomalous' and said[0].image < 20

def test_the_expected_share_of_anomalous_images_is_no_drift():
    rng, first = np.random.default_rng(2), []
    for _ in range(60):
        m = DriftMonitor([1., 2.], 1.5, 40, expected=.5)
        first.append(next((i for i in range(400) if m.update(9. if (a := rng.random() < .5) else 1., a, rng.random())), 400))
    assert np.mean(first) >= 40

def test_a_warning_starts_the_test_anew():
    m = DriftMonitor([1., 2.], 1.5, 20)
    said = [w.image for _ in range(200) if (w := m.update(9., True, 0.))]
    assert len(said) > 5 and len(set(np.diff(said))) == 1

def test_no_held_out_score_is_no_information_and_no_error():
    m = DriftMonitor([], 1., 1000)
    assert m.update(.5, False, .5) is None and list(m.history) == [pytest.approx(1/2000)]

def test_capital_stays_positive_whatever_comes():
    bet = SimpleJumper()
    for p in [0., 1.]*200: assert bet(p) > 0
    assert sum(bet.capital.values()) == pytest.approx(1)

@pytest.mark.parametrize('wrong', [dict(every=0), dict(every=float('nan')), dict(expected=0.), dict(expected=1.)])
def test_values_that_are_not_allowed(wrong):
    with pytest.raises(DriftError, match='allowed'): DriftMonitor([1.], 1., **wrong)
