"19ac_alternatives: other maps of the same networks, judged on synthetic defects in held-out images; the command."
import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from dynad import alternatives as A
from dynad.ablation import AblationError
from dynad.cached_walk import CachedWalk
from dynad.choosing import prior_mixture, stored_maps, synthetic_set
from dynad.cli import app
from dynad.config import make_config, with_overrides
from dynad.left_out import LeftOutError
from dynad.method import open_run
from dynad.patchcore import PatchCore
from dynad.speed_modes import with_images

MIX = {'fusion.neighbour': .5, 'fusion.lam': .5, 'reconstruction.average': 3}

@pytest.fixture(scope='module')
def mixed(smoke, boards, tmp_path_factory):
    "The smoke run with a neighbour map and three T̂; its networks are those of `smoke`."
    import shutil
    from conftest import SMOKE
    from dynad.detector import DynAD
    root = shutil.copytree(smoke[1], tmp_path_factory.mktemp('alternatives')/'run')
    return with_images(DynAD(make_config('smoke', SMOKE | MIX)).fit(boards, root, progress=False), boards), root

@pytest.fixture(scope='module')
def base(mixed): return stored_maps(mixed[0].parts, mixed[0].held_out_set, 12)

@pytest.mark.parametrize('overrides', [{}, {'reconstruction.t_max': 320}, {'reconstruction.average': 10}, {'reconstruction.severity': 'static', 'reconstruction.static_t': 130}], ids=str)
def test_every_setting_is_another_one(overrides):
    c = make_config('small', overrides)
    found = A.other_settings(c)
    assert len(found) >= 7 and all(with_overrides(c, v) != c for v in found.values())
    assert f'T_max = {c.reconstruction.t_max}' not in found

def test_blending_keeps_a_latent_where_the_share_says_so():
    z = torch.randn(4, 2, 3, 8, 8)
    for k in range(4): assert torch.allclose(A.blended(z, torch.full((2, 1, 32, 32), k/3)), z[k], atol=1e-5)
    half = torch.zeros(2, 1, 32, 32); half[..., 16:] = 9. # beyond the largest
    out = A.blended(z, half)
    assert torch.equal(out[..., :4], z[0][..., :4]) and torch.equal(out[..., 4:], z[3][..., 4:])

def test_a_place_with_a_low_distance_keeps_the_smallest_t_hat(mixed):
    model = mixed[0].with_settings({'reconstruction.average': 10})
    walk = CachedWalk(model.parts, model.held_out_set)
    z0, z, x = A.by_places(walk, [0, 1], A.PLACES, torch.zeros(2, 1, 64, 64))
    least = A.averaged_t_hat(model.config)[0]
    assert torch.equal(z0, walk.z0[[0, 1]]) and torch.equal(z, walk.cached_latents([0, 1], torch.full((2,), least))['z_hat']) and x.shape == (2, 3, 64, 64)

def test_the_walks_own_way_gives_the_stored_maps(mixed, base):
    def as_it_is(walk, rows, T, share):
        z = walk.cached_latents(rows, torch.full((len(rows),), T))['z_hat']
        return walk.z0[rows], z, A.decode(walk.parts, z)
    again = A.maps_by(mixed[0].parts, mixed[0].held_out_set, base, list(base.latent), as_it_is)
    for T in base.latent: assert torch.allclose(again.latent[T], base.latent[T], atol=1e-5)
    assert again.features.keys() == base.features.keys() and all(torch.allclose(again.features[k], base.features[k], atol=1e-4) for k in base.features)
    gained = A.gained(again, base, prior_mixture(mixed[0].parts))
    assert all(abs(g['gain']) < 1e-3 for g in gained.values())

def test_reflection_keeps_size_and_place(mixed, base):
    walk = CachedWalk(mixed[0].parts, synthetic_set(mixed[0].held_out_set, 12, mixed[0].config.seed))
    z0, z, x = A.by_reflection(walk, [0, 1], 0, torch.zeros(2, 1, 64, 64)) # T̂ = 0: E and D alone
    assert z0.shape == z.shape == walk.z0[:2].shape and torch.equal(z0, z) and x.shape == (2, 3, 64, 64)
    middle = (..., slice(2, -2), slice(2, -2))
    assert torch.allclose(z0[middle], walk.z0[[0, 1]][middle], atol=.3) and (x - walk.pixels([0, 1])).abs().mean() < .15
    assert not torch.allclose(z0, walk.z0[[0, 1]], atol=1e-3) # at the border it is another one

def test_a_better_map_gains_and_a_worse_one_loses(base, mixed):
    prior = prior_mixture(mixed[0].parts)
    side = lambda m: torch.nn.functional.interpolate(base.masks.float(), m.shape[-2:], mode='area')
    better = replace(base, latent={T: torch.cat([m[:base.normal], m[base.normal:] + 9*side(m)]) for T, m in base.latent.items()}, _parts={})
    worse = replace(base, latent={T: torch.rand_like(m) for T, m in base.latent.items()}, _parts={})
    up, down = (A.gained(m, base, prior)['the diffusion alone'] for m in (better, worse))
    assert up['gain'] > .01 and up['found'] > down['found']

def test_only_the_references_that_are_asked_for(mixed):
    both = mixed[0].with_settings({'fusion.choice': 'synthetic'})
    refs = lambda m: {r for _, r, _ in stored_maps(m.parts, m.held_out_set, 4).features}
    assert refs(mixed[0]) == {'input'} and refs(both) == {'input', 'decoded'}

@pytest.fixture(scope='module')
def result(mixed, boards): return A.alternatives(mixed[0], boards, 12, progress=False)

def test_result_and_tables(result, mixed):
    assert {r['what'] for r in result['rows']} > {'the mean over ten T̂', 'a T̂ for each place, of ten', 'continued by reflection', *A.other_settings(mixed[0].config)}
    assert json.loads(json.dumps(result, allow_nan=False)) == result and result['defects'] == 12 and len(result['rule']) == 2
    one, two = result, result | {'data': result['data'] | {'name': 'other'}, 'seed': 1}
    assert A.alternatives_table([one]).shape == (len(result['rows']), 1) and A.alternatives_table([one, two], 'the diffusion alone').shape[1] == 2
    flipped = two | {'data': one['data'], 'rows': [r | {k: r[k] | {'gain': -9.} for k in A.KINDS} for r in two['rows']]}
    sure = one | {'rows': [r | {k: r[k] | {'gain': 9., 'error': .1} for k in A.KINDS} for r in one['rows']]}
    assert A.alternatives_table([sure]).iloc[0, 0].endswith('*') and not A.alternatives_table([sure, flipped]).iloc[0, 0].endswith('*')
    assert len(A.left_out_table([one, two])) == 2
    with pytest.raises(LeftOutError, match='one product'): A.left_out_table([one])
    with pytest.raises(LeftOutError, match='other.*not the settings of'): A.left_out_table([one, two | {'prior': one['prior'] | {'fusion.sigma': 2.}}])

def test_a_run_without_a_neighbour_map_has_no_places(smoke, boards):
    "Opened, without its training images: no bank can be made."
    model = with_images(open_run(smoke[1], progress=False), boards)
    assert not model.config.fusion.neighbour
    result = A.alternatives(model, boards, 4, progress=False)
    found = {r['what'] for r in result['rows']}
    assert 'continued by reflection' in found and not any('each place' in f for f in found) and result['rule'] == []

def test_the_command(mixed, boards, tmp_path):
    out = CliRunner().invoke(app, ['alternatives', str(mixed[1]), '--data', str(boards.root), '--json', str(tmp_path/'a.json')])
    assert out.exit_code == 0, out.output
    [r] = json.loads((tmp_path/'a.json').read_text())
    assert r['defects'] == 56 and 'the diffusion alone' in out.output
    with pytest.raises(AblationError, match='method = patchcore'): A.alternatives(PatchCore(make_config('smoke', method='patchcore')), boards)
