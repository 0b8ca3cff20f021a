from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from dynad.choice import Mixture, StoredMaps, candidates, choose, found, gain, mixed
from dynad.config import make_config, with_overrides
from dynad.fusion import score
from dynad.ranking import sorted_metrics

T = (100, 200)
PRIOR = Mixture(T, (2, 3), lam=.5, neighbour=.5)


def stored(latent=0., feature=0., neighbour=0., normal=10, n=20, seed=0):
    "Noise, in which the maps see the defects with some strength."
    g = torch.Generator().manual_seed(seed)
    masks = torch.zeros(n, 1, 32, 32, dtype=torch.bool)
    for i, (r, c) in enumerate(torch.randint(2, 24, (n, 2), generator=g).tolist()): masks[i, :, r:r+6, c:c+6] = True
    def maps(signal, side):
        seen = F.interpolate(masks.float(), side, mode='area')*signal
        return torch.rand(normal + n, 1, side, side, generator=g) + torch.cat([torch.zeros(normal, 1, side, side), seen])
    keys = [(t, r, j) for t in T for r in ('input', 'decoded') for j in (1, 2, 3)]
    return StoredMaps(normal, masks, [i % normal for i in range(n)], {t: maps(latent, 8) for t in T},
                      {k: maps(feature, 8) for k in keys}, (maps(neighbour, 16), maps(neighbour, 8)))


def test_the_three_numbers_are_auroc_and_overlap():
    maps = stored(feature=2.)
    A, f = mixed(maps, PRIOR), found(maps, PRIOR)
    s, n = score(A, 'max'), maps.normal
    image = sorted_metrics(s[:n].sort().values.double().numpy(), s[n:].sort().values.double().numpy())['auroc']
    assert f[:, 0].mean().item() == pytest.approx(image, abs=1e-6)
    normal = torch.cat([A[:n].flatten(), A[n:][~maps.masks]]).sort().values.double().numpy()
    anomalous = A[n:][maps.masks].sort().values.double().numpy()
    m = sorted_metrics(normal, anomalous, region_w=torch.full((len(anomalous),), 1/36).double().numpy())
    assert f[:, 1].mean().item() == pytest.approx(m['auroc'], abs=2e-3)
    assert f[:, 2].mean().item() == pytest.approx(m['pro'], abs=2e-3)


@pytest.mark.parametrize('sees, right', [
    (dict(latent=3.), lambda m: m.lam > .5 and m.neighbour < .5),
    (dict(feature=3.), lambda m: m.lam < .5 and m.neighbour <= .5),
    (dict(neighbour=3.), lambda m: m.neighbour > .5)])
def test_the_map_that_sees_the_defects_gets_the_weight(sees, right):
    assert right(choose(stored(**sees), PRIOR).chosen)


def test_equal_maps_keep_the_prior_weights():
    held = [choose(stored(.8, .8, .8, seed=s), PRIOR).chosen for s in range(4)]
    assert sum(m.neighbour in (0., 1.) for m in held) == 0


def test_one_source_image_changes_nothing():
    "The error over images is unknown, so nothing is sure."
    maps = stored(latent=3., normal=1)
    assert choose(maps, PRIOR).chosen == PRIOR


def test_of_a_single_t_hat_there_is_none_to_choose():
    "`reconstruction.average = 1` with a choice: all other groups are tried."
    m = stored(feature=3.)
    one = replace(m, latent={100: m.latent[100]}, features={k: v for k, v in m.features.items() if k[0] == 100})
    made = choose(one, replace(PRIOR, t_hat=(100,)))
    assert made.chosen.t_hat == (100,) and made.chosen.lam < .5 and {r['group'] for r in made.rows} == {'weights', 'features', 'σ and score'}


def test_few_images_stay_nearer_to_the_prior_than_many():
    noise = [sum(choose(stored(.3, .3, .3, normal=k, n=n, seed=s), PRIOR).chosen != PRIOR for s in range(5))
             for k, n in ((2, 4), (12, 48))]
    assert noise[0] <= noise[1]


def test_same_maps_same_choice():
    assert choose(stored(.5, 1.), PRIOR) == choose(stored(.5, 1.), PRIOR)


def test_gain_counts_images_not_defects():
    new, old = torch.ones(40, 3), torch.zeros(40, 3)
    new[20:] = 0
    mean, error = gain(new, old, [0]*20 + [1]*20)
    assert mean == .5 and error == pytest.approx(.5)


def test_without_a_neighbour_map_it_gets_no_weight():
    maps = replace(stored(feature=2.), neighbours=())
    prior = replace(PRIOR, neighbour=0.)
    assert all(m.neighbour == 0 for group in candidates(prior, T, False).values() for m in group)
    assert choose(maps, prior).chosen.neighbour == 0


@pytest.mark.parametrize('m', [PRIOR, replace(PRIOR, t_hat=(200,))])
def test_settings_are_settings_of_a_run(m):
    cfg = with_overrides(make_config('small', {'fusion.choice': 'synthetic'}), m.settings)
    assert cfg.fusion.lam == m.lam and cfg.fusion.choice == 'synthetic'
    assert cfg.reconstruction.average == (2 if m is PRIOR else 0)


def test_who_names_a_setting_has_chosen():
    for key, value in {'fusion.lam': .3, 'fusion.layers': [1, 2], 'reconstruction.average': 0}.items():
        assert make_config('small', {key: value}).fusion.choice == 'fixed'
        assert make_config('small', {key: value, 'fusion.choice': 'synthetic'}).fusion.choice == 'synthetic'
    assert make_config('small', {'reconstruction.t_max': 320}).fusion.choice == make_config('small').fusion.choice


def test_old_settings_keep_their_form():
    "Keys of runs from before these settings existed hang on it."
    raw = make_config('paper').model_dump(mode='json')
    assert set(raw['fusion']) == {'lam', 'layers', 'sigma', 'calibration', 'quantile', 'threshold_quantile'}
    assert 'enlarge' not in raw['features'] and 'average' not in raw['reconstruction']
