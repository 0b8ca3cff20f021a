"The choice judged where it was not made: folds by image, products left out."
from dataclasses import replace

import pytest, torch

from dynad.choice import Mixture, StoredMaps, choose, found
from dynad.left_out import LeftOutError, best_weights, cross_chosen, gains, grid_found, leave_one_out, of_images

PRIOR = Mixture((100,), (1, 2))

def stored(images, defects, seed=0, feature=.6, neighbour=0.):
    "Maps of 16² that see the defects with some strength; defect k lies in image k % images."
    g = torch.Generator().manual_seed(seed)
    masks = torch.zeros(defects, 1, 32, 32, dtype=torch.bool)
    for i, (r, c) in enumerate(torch.randint(2, 24, (defects, 2), generator=g).tolist()): masks[i, :, r:r+6, c:c+6] = True
    seen = torch.nn.functional.interpolate(masks.float(), 16, mode='area')
    def noisy(signal): return torch.rand(images + defects, 1, 16, 16, generator=g) + torch.cat([torch.zeros(images, 1, 16, 16), seen*signal])
    features = {(100, r, j): noisy(feature) for r in ('input', 'decoded') for j in (1, 2, 3)}
    return StoredMaps(images, masks, [k % images for k in range(defects)], {100: noisy(0.)}, features, (noisy(neighbour),))

def test_a_part_holds_the_maps_of_its_own_images_in_their_order():
    m = stored(5, 12)
    part = of_images(m, [3, 1])
    assert part.normal == 2 and part.source == [1, 0, 1, 0, 1] # defects 1, 3, 6, 8, 11, of images 1, 3, 1, 3, 1
    assert torch.equal(part.latent[100], m.latent[100][[3, 1, 6, 8, 11, 13, 16]]) and torch.equal(part.masks, m.masks[[1, 3, 6, 8, 11]])
    assert torch.equal(part.neighbours[0], m.neighbours[0][[3, 1, 6, 8, 11, 13, 16]])
    assert all(torch.equal(v, m.features[k][[3, 1, 6, 8, 11, 13, 16]]) for k, v in part.features.items())

def test_all_images_are_the_whole():
    m = stored(4, 8)
    assert torch.equal(found(of_images(m, range(4)), PRIOR), found(m, PRIOR))

def test_no_fold_is_chosen_by_its_own_defects():
    "Every defect is judged with what was chosen without its image: the choice of the fold, made anew."
    m = stored(5, 15)
    after, choices = cross_chosen(m, PRIOR, .5, folds=5)
    assert len(choices) == 5
    for k in range(5):
        own = choose(of_images(m, [i for i in range(5) if i != k]), PRIOR, .5).chosen
        rows = [r for r, i in enumerate(m.source) if i == k]
        assert choices[k].chosen == own and torch.equal(after[rows], found(m, own)[rows])

def test_a_defect_that_changes_does_not_change_what_it_is_judged_by():
    m, other = stored(5, 15), stored(5, 15)
    for maps in (*other.features.values(), *other.neighbours): maps[5 + 2] = maps[5 + 2].flip(-1) # the third defect, of image 2
    fold = lambda maps: cross_chosen(maps, PRIOR, .5)[1][2].chosen
    assert fold(m) == fold(other)

def test_gains_are_those_over_the_prior():
    rows = gains(stored(6, 18), PRIOR)
    assert [r['rule'] for r in rows] == ['for sure', 'whatever is best'] and all(r['images'] == 6 and r['defects'] == 18 and r['folds'] == 5 for r in rows)
    assert rows[1]['gain'] > .1 # f_map alone sees these defects; the prior hardly looks at it
    assert rows[1]['gain'] == pytest.approx(sum(rows[1][k] for k in ('image', 'pixels', 'overlap'))/3, abs=1e-6)

def test_weights_of_the_others():
    "Two products that want the same weights choose them for each other, and a third that wants others gets theirs."
    grids = {'a': [grid_found(stored(5, 15, 1), PRIOR)], 'b': [grid_found(stored(5, 15, 2), PRIOR)],
             'c': [grid_found(stored(5, 15, s, feature=0., neighbour=.8), PRIOR) for s in (3, 4)]}
    rows = {r['product']: r for r in leave_one_out(grids, (.5, .5))}
    assert rows['c']['seeds'] == 2 and rows['c']['λ, λ_n of the others'] == best_weights([grids['a'][0], grids['b'][0]])
    assert rows['c']['with them'] < rows['c']['with the prior'] < rows['c']['with its own best']
    assert rows['a']['f_map alone'] == grids['a'][0][0., 0.] == pytest.approx(found(stored(5, 15, 1), replace(PRIOR, lam=0., neighbour=0.)).mean().item())

def test_too_little_to_leave_any_out():
    with pytest.raises(LeftOutError, match='1 normal images with defects.*at least 2'): cross_chosen(stored(1, 3), PRIOR)
    with pytest.raises(LeftOutError, match=r'one product \(a\)'): leave_one_out({'a': [grid_found(stored(2, 4), PRIOR)]}, (.5, .5))

def test_products_without_a_common_grid_are_refused():
    with_map, without = grid_found(stored(3, 6), PRIOR), grid_found(replace(stored(3, 6), neighbours=()), PRIOR)
    with pytest.raises(LeftOutError, match='b: not the pairs of λ and λ_n of a'): leave_one_out({'a': [with_map], 'b': [without]}, (.5, .5))
    with pytest.raises(LeftOutError, match='neighbour map'): leave_one_out({'a': [without], 'b': [without]}, (.5, 0.))
    with pytest.raises(LeftOutError, match=r'λ, λ_n = \(0.6, 0.5\)'): leave_one_out({'a': [with_map], 'b': [with_map]}, (.6, .5))
